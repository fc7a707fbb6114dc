"""What vLLM will not serve of an adapter that a config describes, said before it is trained. No torch, no vLLM.

Sources: `--max-lora-rank` takes one of `VLLM_RANKS` and is 16 by default (vLLM's config/lora.py and
https://github.com/vllm-project/vllm/issues/2847); its PEFT reader scales every module by the one lora_alpha / r.
"""

from lora_scale.spec.architecture import Architecture
from lora_scale.spec.config import RunConfig
from lora_scale.spec.targets import ranks as adapter_ranks

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16


def warnings(model: Architecture, cfg: RunConfig) -> list[str]:
    """One sentence for each choice that vLLM will not serve, or not by default."""
    if cfg.method != "lora":
        return []
    found, by_module = [], adapter_ranks(model, cfg.lora)
    largest = max(by_module.values())
    what = f"{'lora.r' if largest == cfg.lora.r else 'lora.rank_pattern'} is {largest}"
    if largest > VLLM_RANKS[-1]:
        found.append(f"{what}: vLLM serves rank {VLLM_RANKS[-1]} at most; lower it, or merge the adapter")
    elif largest > VLLM_DEFAULT_RANK:
        needed = next(r for r in VLLM_RANKS if r >= largest)
        found.append(f"{what}: vLLM serves rank {VLLM_DEFAULT_RANK} by default; start it with --max-lora-rank {needed}")
    if len(set(by_module.values())) > 1 or cfg.lora.alpha_pattern:
        found.append(
            "lora.rank_pattern or lora.alpha_pattern is set: vLLM scales every module by the one lora_alpha / r; merge "
            "the adapter to serve it"
        )
    if any(p.kind == "output" and p.module in by_module for p in model.parameters):
        found.append(
            "lora.target_modules reaches the output layer, which not every version of vLLM serves; merge the adapter"
        )
    return found
