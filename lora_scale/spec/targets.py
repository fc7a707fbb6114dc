"""Which modules an adapter trains, by name alone: for a plan, before any model is built. No torch.

The rules are those of `adapters.targets`, which applies them to a built model; a test holds the two together.
"""

import re
from collections.abc import Mapping

from lora_scale.spec.architecture import Architecture, Parameter
from lora_scale.spec.config import LoraConfig
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.families import ALL_LINEAR, ROLES, has_suffix, roles

_PAPER_ROLES = {
    "q": ("attn.q",),
    "k": ("attn.k",),
    "v": ("attn.v",),
    "o": ("attn.c_proj",),
    "mlp": roles("gpt2")["mlp"],
}
"""Of the named shape gpt3-175b, whose q, k and v are apart."""


def ranks(model: Architecture, cfg: LoraConfig) -> dict[str, int]:
    """r of every module that `cfg.target_modules` names, in module order; ConfigError for an entry that names none."""
    linears = {p.module: p for p in model.parameters if p.is_linear}
    chosen = {module for entry in cfg.target_modules for module in _matches(model, linears, entry)}
    return {module: _r(cfg.rank_pattern, module, cfg.r) for module in linears if module in chosen}


def adapter_shapes(model: Architecture, cfg: LoraConfig) -> list[tuple[int, int]]:
    """The shapes of every lora_A (r, in) and lora_B (out, r)."""
    linears = {p.module: p for p in model.parameters if p.is_linear}
    shapes = []
    for module, r in ranks(model, cfg).items():
        d_in, d_out = linears[module].features
        shapes += [(r, d_in), (d_out, r)]
    return shapes


def fused(model: Architecture, cfg: LoraConfig) -> str | None:
    """A sentence for the user where q, k or v was asked for and its update covers all three."""
    known = roles_of(model.model_type)
    asked = [role for role in ("q", "k", "v") if role in cfg.target_modules]
    if not asked or len(asked) == 3 or not known.get("q") == known.get("k") == known.get("v"):
        return None
    return f"{model.model_type} keeps q, k and v in one matrix: adapting {' and '.join(asked)} adapts {known['q'][0]}"


def roles_of(model_type: str) -> Mapping[str, tuple[str, ...]]:
    """Module name suffixes by role, also of the named shape, which is no family."""
    return _PAPER_ROLES if model_type == "gpt3" else roles(model_type)


def _matches(model: Architecture, linears: Mapping[str, Parameter], entry: str) -> list[str]:
    if entry == ALL_LINEAR:
        return [module for module, p in linears.items() if p.kind != "output"]
    if entry.startswith("re:"):
        try:
            pattern = re.compile(entry.removeprefix("re:"))
        except re.error as error:
            raise ConfigError(f"lora.target_modules has {entry!r}, which is no regular expression: {error}") from None
        found = [module for module in linears if pattern.fullmatch(module)]
    else:
        suffixes = roles_of(model.model_type).get(entry, ()) if entry in ROLES else (entry,)
        found = [module for module in linears if has_suffix(module, suffixes)]
    if not found:
        ends = dict.fromkeys(module.rpartition(".")[2] for module in linears)
        raise ConfigError(
            f"lora.target_modules has {entry!r}, which names no linear layer of this {model.model_type}; there are the "
            f"roles {', '.join(roles_of(model.model_type))}, {ALL_LINEAR}, and the layers {', '.join(ends)}"
        )
    return found


def _r(patterns: Mapping[str, int], module: str, default: int) -> int:
    """PEFT's rule: the first pattern that matches the whole name, or its end after a dot."""
    return next((r for pattern, r in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module)), default)
