"""What servers demand of an adapter, read in their source, and the commands that start them. No torch, no files.

A server that ignores what it does not know would serve something else without a word: so each rule is a reason not to
use the adapter there. The version that a rule was read in stands beside it; a later one may take more.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_scale.spec.architecture import Architecture
from lora_scale.spec.config import RunConfig
from lora_scale.spec.targets import ranks as adapter_ranks

Config = Mapping[str, Any]

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # config/lora.py: MaxLoRARanks, without 1
VLLM_DEFAULT_RANK = 16
VLLM_WITHOUT_LORA = ("gpt2", "falcon", "bloom", "gpt_neox")  # their classes lack SupportsLoRA; version not known
SGLANG_MODULES = (
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head"),
)  # lora/utils.py: what get_normalized_target_modules makes one of _KNOWN_LORA_TARGET_MODULES


@dataclass(frozen=True, slots=True)
class Rules:
    """Of one server."""

    read: str
    reasons: Callable[[Config, Sequence[str], int, str | None], list[str]]
    """(adapter_config.json, adapted modules, largest r, model_type of the base if known) -> why not, or nothing."""
    command: Callable[[str, str, int], str]
    """(base, name=path, largest r) -> a shell line; both words are quoted already."""


def _unknown_to_both(config: Config) -> list[str]:
    reasons = []
    if config.get("use_dora"):
        reasons.append("it has no DoRA")
    if config.get("bias", "none") != "none":
        reasons.append("it leaves out trained biases")
    if config.get("modules_to_save"):
        reasons.append("it takes no modules_to_save")
    if config.get("trainable_token_indices"):
        reasons.append("it takes no trainable_token_indices")
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        reasons.append("it scales all layers by one lora_alpha / r: rank_pattern and alpha_pattern are ignored")
    return reasons


def _vllm(config: Config, modules: Sequence[str], rank: int, model_type: str | None) -> list[str]:
    """lora/peft_helper.py (_validate_features), lora/lora_model.py (from_local_checkpoint)."""
    reasons = _unknown_to_both(config)
    if model_type in VLLM_WITHOUT_LORA:
        reasons.append(f"it has no LoRA for models of type {model_type}")
    if rank > VLLM_RANKS[-1]:
        reasons.append(f"it takes ranks up to {VLLM_RANKS[-1]}, and this one has r = {rank}")
    return reasons


def _vllm_command(base: str, module: str, rank: int) -> str:
    limit = next(limit for limit in VLLM_RANKS if limit >= rank)
    return f"vllm serve {base} --enable-lora --max-lora-rank {limit} --lora-modules {module}"


def _sglang(config: Config, modules: Sequence[str], rank: int, model_type: str | None) -> list[str]:
    """lora/lora.py (LoRAAdapter), lora/utils.py; rsLoRA: https://github.com/sgl-project/sglang/issues/40835."""
    reasons = _unknown_to_both(config)
    if config.get("use_rslora"):
        reasons.append("it scales by lora_alpha / r, this one by lora_alpha / sqrt(r)")
    ends = dict.fromkeys(module.rsplit(".", 1)[-1] for module in modules)
    if unknown := [end for end in ends if end not in SGLANG_MODULES]:
        reasons.append(f"it has no LoRA for layers named {', '.join(unknown)}")
    if isinstance(config.get("target_modules"), str):
        reasons.append("it takes target_modules as a list only")
    return reasons


def _sglang_command(base: str, module: str, rank: int) -> str:
    return f"python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths {module}"


SERVERS = {
    "vLLM": Rules("0.22.1, read 2026-11-22", _vllm, _vllm_command),
    "SGLang": Rules("its main branch, read 2026-11-22", _sglang, _sglang_command),
}


def warnings(model: Architecture, cfg: RunConfig) -> list[str]:
    """One sentence for each choice of a config that vLLM will not serve, or not by default: said before the run."""
    if cfg.method != "lora":
        return []
    by_module = adapter_ranks(model, cfg.lora)
    largest = max(by_module.values())
    config = cfg.lora.model_dump()
    found = [
        f"vLLM will not serve this adapter: {why}" for why in _vllm(config, [*by_module], largest, model.model_type)
    ]
    if any(p.kind == "output" and p.module in by_module for p in model.parameters):
        found.append("lora.target_modules reaches the output layer, which not every version of vLLM serves")
    if VLLM_DEFAULT_RANK < largest <= VLLM_RANKS[-1]:
        limit = next(limit for limit in VLLM_RANKS if limit >= largest)
        found.append(
            f"lora.r is {largest}: vLLM serves rank {VLLM_DEFAULT_RANK} by default; start it with "
            f"--max-lora-rank {limit}"
        )
    return found
