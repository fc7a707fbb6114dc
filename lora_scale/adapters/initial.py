"""Starting values other than the drawn ones: those of an adapter that exists (`init_adapter`)."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_scale.adapters import peft, tokens
from lora_scale.adapters.lora import LoRALinear, file_name
from lora_scale.adapters.peft import Adapter
from lora_scale.adapters.peft_config import TOKENS
from lora_scale.adapters.targets import exact_suffixes
from lora_scale.spec.errors import CheckpointError


def start_from(path: Path, model: nn.Module, layers: Mapping[str, LoRALinear]) -> None:
    """Copy the factors of the adapter folder `path` into a model's whole layers. What else it brings waits for the
    base: `brought`.

    The function must stay the same: CheckpointError, with the `lora` section that fits, when modules, shapes, scaling
    or what trains beside the factors differ.
    """
    adapter = peft.read_adapter(path)
    try:
        load_factors(layers, adapter)
        for name, layer in layers.items():
            if layer.scaling != adapter.scaling(name):
                raise CheckpointError(
                    f"the adapter scales {name} by {adapter.scaling(name):g}, this run by {layer.scaling:g}"
                )
        _check_others(model, adapter)
    except CheckpointError as error:
        raise CheckpointError(f"init_adapter is {path}, but {error}; it was made with {_section(adapter)}") from error


def brought(path: Path) -> dict[str, Tensor]:
    """What the adapter brings beside factors: whole, fp32, by name in the base's files, for PEFT may leave
    `.base_layer` out of a bias's name."""
    return {file_name(name): value.float() for name, value in peft.read_adapter(path).others.items()}


def _check_others(model: nn.Module, adapter: Adapter) -> None:
    brought = {file_name(name): value for name, value in adapter.others.items()}
    wanted = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not name.endswith((".lora_A", ".lora_B"))
    }
    for name, parameter in wanted.items():
        if (value := brought.get(file_name(name))) is None or value.shape != parameter.shape:
            has = "lacks it" if value is None else f"has it as {tuple(value.shape)}"
            raise CheckpointError(f"{name} {tuple(parameter.shape)} trains here, and the adapter {has}")
    if extra := brought.keys() - {file_name(name) for name in wanted}:
        raise CheckpointError(f"the adapter brings {min(extra)}, which does not train here")
    rows = tokens.rows_of(model)
    if rows is not None and (given := rows[1].given()) != adapter.config[TOKENS]:
        raise CheckpointError(f"the adapter has rows of the tokens {adapter.config[TOKENS]}, this run of {given}")


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
    section += " lora.use_dora=true" * bool(config.get("use_dora"))
    section += f" lora.bias={config['bias']}" * (config.get("bias", "none") != "none")
    for key in ("modules_to_save", TOKENS):
        section += f" lora.{key}=[{','.join(map(str, config[key]))}]" if config.get(key) else ""
    return f"{section} and {', '.join(more)}" if more else section
