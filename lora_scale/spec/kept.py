"""What becomes of each decoder layer's activations: recomputed in backward, kept on the GPU, or brought to host memory
and back. No torch.

Recomputed are the first layers; of the others, those in host memory are spread evenly, so that each copy has a few
layers' time, and the last `BEHIND` are not among them: they would come back at once.
"""

from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError

BEHIND = 2


def recomputed_layers(cfg: RunConfig, layers: int) -> int:
    """How many layers, the first ones, keep only their input."""
    count = {"all": layers, "none": 0}.get(str(cfg.recompute), cfg.recompute)
    assert isinstance(count, int)
    if count > layers:
        raise ConfigError(
            f"recompute is {count}; the model has {layers} decoder layers: write a number up to that, or all"
        )
    return count


def offloaded_layers(cfg: RunConfig, layers: int) -> tuple[int, ...]:
    """Indices of the layers whose activations wait in host memory, in order."""
    recomputed = recomputed_layers(cfg, layers)
    able = offloadable(recomputed, layers)
    count = {"all": able, "none": 0}.get(str(cfg.activation_offloading), cfg.activation_offloading)
    assert isinstance(count, int)
    if count > able:
        raise ConfigError(
            f"activation_offloading is {count}; {layers} decoder layers with recompute = {cfg.recompute} leave {able} "
            f"(the last {BEHIND} stay): write a number up to that, or all"
        )
    return tuple(recomputed + i for i in range(able) if i * count % able < count)


def offloadable(recomputed: int, layers: int) -> int:
    """How many layers could have their activations in host memory."""
    return max(0, layers - recomputed - BEHIND)
