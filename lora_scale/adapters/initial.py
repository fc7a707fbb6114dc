"""Starting values other than the drawn ones: the factors of an adapter that exists (`init_adapter`)."""

from collections.abc import Mapping
from pathlib import Path

import torch

from lora_scale.adapters import peft
from lora_scale.adapters.lora import LoRALinear
from lora_scale.adapters.peft import OTHERS, Adapter
from lora_scale.adapters.targets import exact_suffixes
from lora_scale.spec.errors import CheckpointError


def start_from(path: Path, layers: Mapping[str, LoRALinear]) -> None:
    """Copy the factors of the adapter folder `path` into a model's whole layers.

    The function must stay the same: CheckpointError, with the `lora` section that fits, when modules, shapes or
    scaling differ.
    """
    adapter = peft.read_adapter(path)
    if adapter.others:
        raise CheckpointError(f"init_adapter is {path}, which {OTHERS}; only factors can be started from")
    try:
        load_factors(layers, adapter)
        for name, layer in layers.items():
            if layer.scaling != adapter.scaling(name):
                raise CheckpointError(
                    f"the adapter scales {name} by {adapter.scaling(name):g}, this run by {layer.scaling:g}"
                )
    except CheckpointError as error:
        raise CheckpointError(f"init_adapter is {path}, but {error}; it was made with {_section(adapter)}") from error


def load_factors(adapted: Mapping[str, LoRALinear], adapter: Adapter) -> None:
    """Copy an adapter into a model; its modules and shapes must be the model's, all of them."""
    missing = sorted(adapted.keys() - set(adapter.modules))
    unexpected = sorted(set(adapter.modules) - adapted.keys())
    for names, what in ((missing, "lacks"), (unexpected, "has factors for what is no adapted layer here:")):
        if names:
            counts = f"{len(missing)} missing, {len(unexpected)} unexpected of {len(adapted)}"
            raise CheckpointError(f"the adapter {what} {names[0]} ({counts})")
    for module, layer in adapted.items():
        for key, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            factor = adapter.factors[f"{module}.{key}"]
            if factor.shape != parameter.shape:
                ours = tuple(parameter.shape)
                raise CheckpointError(f"the adapter's {module}.{key} is {tuple(factor.shape)}, this model's {ours}")
            with torch.no_grad():
                parameter.copy_(factor)


def _section(adapter: Adapter) -> str:
    """Its `lora` section as overrides; where layers differ, not the patterns but that there are some."""
    config = adapter.config
    targets = exact_suffixes(adapter.modules, adapter.modules)
    named = f"[{','.join(targets)}]" if isinstance(targets, list) and len(targets) <= 12 else "(see its tensors)"
    more = [f"lora.{key}" for key in ("use_rslora", "rank_pattern", "alpha_pattern") if config.get(key)]
    section = f"lora.r={config['r']} lora.lora_alpha={config['lora_alpha']:g} lora.target_modules={named}"
    return f"{section} and {', '.join(more)}" if more else section
