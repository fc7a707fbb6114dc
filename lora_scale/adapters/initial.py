"""Starting values other than the drawn ones: the factors of an adapter that exists (`init_adapter`)."""

from collections.abc import Mapping
from pathlib import Path

from lora_scale.adapters import peft
from lora_scale.adapters.lora import LoRALinear
from lora_scale.adapters.peft import Adapter
from lora_scale.adapters.targets import exact_suffixes
from lora_scale.spec.errors import CheckpointError


def start_from(path: Path, layers: Mapping[str, LoRALinear]) -> None:
    """Copy the factors of the adapter folder `path` into a model's whole layers.

    The function must stay the same: CheckpointError, with the `lora` section that fits, when modules, shapes or
    scaling differ.
    """
    adapter = peft.read_adapter(path)
    try:
        peft.load_factors(layers, adapter)
        for name, layer in layers.items():
            if layer.scaling != adapter.scaling(name):
                raise CheckpointError(
                    f"the adapter scales {name} by {adapter.scaling(name):g}, this run by {layer.scaling:g}"
                )
    except CheckpointError as error:
        raise CheckpointError(f"init_adapter is {path}, but {error}; it was made with {_section(adapter)}") from error


def _section(adapter: Adapter) -> str:
    """Its `lora` section as overrides; where layers differ, not the patterns but that there are some."""
    config = adapter.config
    targets = exact_suffixes(adapter.modules, adapter.modules)
    named = f"[{','.join(targets)}]" if isinstance(targets, list) and len(targets) <= 12 else "(see its tensors)"
    more = [f"lora.{key}" for key in ("use_rslora", "rank_pattern", "alpha_pattern") if config.get(key)]
    section = f"lora.r={config['r']} lora.lora_alpha={config['lora_alpha']:g} lora.target_modules={named}"
    return f"{section} and {', '.join(more)}" if more else section
