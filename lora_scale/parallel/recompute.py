"""Which decoder layers keep only their input and recompute the rest in backward. Knows transformers' own switch,
nothing of ZeRO."""

from torch import nn

from lora_scale.parallel import zero3
from lora_scale.spec.errors import ConfigError, ModelError


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The model's layers, in order: the modules of the classes that transformers never splits over devices; where an
    encoder names none, those that can be recomputed."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    if not names:
        names = {
            type(m).__name__ for m in model.modules() if type(m).__mro__[1].__name__ == "GradientCheckpointingLayer"
        }
    layers = [m for m in model.modules() if type(m).__name__ in names and hasattr(m, "gradient_checkpointing")]
    if not layers:
        raise ModelError(f"{type(model).__name__}: no decoder layers found; this model type is not supported")
    return layers


def layer_numel(layers: list[nn.Module]) -> int:
    """Elements of the largest decoder layer, whole."""
    return max(sum(zero3.numel(p) for p in layer.parameters()) for layer in layers)


def apply(model: nn.Module, recompute: str | int) -> int:
    """Switch recompute on for `all`, `none` or the first so many decoder layers; returns how many.

    Non-reentrant, because the reentrant form drops the gradient when a layer's input needs none: then nothing trains,
    silently.
    """
    layers = decoder_layers(model)
    count = {"all": len(layers), "none": 0}.get(str(recompute), recompute)
    assert isinstance(count, int)
    if count > len(layers):
        raise ConfigError(
            f"recompute is {count}; the model has {len(layers)} decoder layers: write a number up to that, or all"
        )
    if count:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        for layer in layers[count:]:
            layer.gradient_checkpointing = False  # type: ignore[assignment]
    return count
