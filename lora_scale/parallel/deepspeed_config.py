"""What DeepSpeed is told of a run: its configuration and the optimizer. The only place where a DeepSpeed configuration
key is written."""

import json
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from lora_scale.parallel import zero3
from lora_scale.spec import cost, elsewhere, states
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError


def ds_config(
    cfg: RunConfig, accumulation: int, layer_numel: int, trainable_numel: int, layers: Sequence[str]
) -> dict[str, Any]:
    """DeepSpeed's configuration of this run.

    `layer_numel` is the largest decoder layer's size in elements and `layers` the class names of decoder layers: each
    is gathered as one, a prefetch bucket holds the next one, and nothing waits for reuse. Nothing is "persistent":
    DeepSpeed drops and re-gathers such parameters one by one at every step. The gradient bucket is allocated at once,
    so it is sized to what trains.
    """
    stage = states.deepspeed_stage(cfg, trainable_numel)
    full = cfg.method == "full"
    bf16_masters = full and cfg.precision == "bf16"  # adapters are fp32 themselves and need no second copy
    if bf16_masters and stage == 0:
        raise ConfigError(
            "method is full in bf16 with parallel.zero_stage = 0, which keeps no fp32 copy of the weights; use "
            "stage 1, 2 or 3"
        )
    zero: dict[str, Any] = {
        "stage": stage,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": cost.reduce_bucket(trainable_numel),
    }
    if stage == 3:
        zero |= {
            "stage3_param_persistence_threshold": 0,
            "stage3_prefetch_bucket_size": layer_numel,
            "stage3_max_live_parameters": 3 * layer_numel,
            "stage3_max_reuse_distance": 0,
            "leaf_module": {"classes": list(layers)},
        }
    ours = {
        "train_micro_batch_size_per_gpu": cfg.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0 if clips_itself(cfg) else cfg.train.max_grad_norm,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": bf16_masters},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": 10**9,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU twice a pass, to tell what is not read
    }
    return _merged(ours, passed_through(cfg))


def passed_through(cfg: RunConfig) -> dict[str, Any]:
    """`engine.deepspeed`: what DeepSpeed is told beside what this config says."""
    given = cfg.engine.deepspeed
    if isinstance(given, dict):
        return given
    try:
        tree = json.loads(given.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"engine.deepspeed is {given}, which cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"engine.deepspeed is {given}, which is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"engine.deepspeed is {given}, which holds no JSON object")
    if told := elsewhere.refused(tree):
        raise ConfigError("\n".join(f"{given}: {line}" for line in told))
    return tree


def _merged(base: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    """`more` over `base`, section by section."""
    both = {name: _merged(base[name], more[name]) for name in base.keys() & more.keys() if isinstance(more[name], dict)}
    return {**base, **more, **both}


def clips_itself(cfg: RunConfig) -> bool:
    """Whether `parallel.gradients` finishes the gradients. DeepSpeed knows no tensor that is whole on each rank while
    its gradient is not, and at stage 0 it does not tell the norm; full fine-tuning beyond that stage is all its own."""
    return cfg.method != "full" or cfg.parallel.zero_stage == 0


def optimizer_for(model: nn.Module, cfg: RunConfig, uneven: Collection[str] = ()) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; those with fewer than two dims (norms, biases) do not decay.

    A group's `lr_ratio` is its learning rate over the schedule's: other than 1 for lora_B in LoRA+. What tensor
    parallelism cuts into `uneven` shards is apart: ZeRO-1 and 2 lay a group end to end, and the other groups must be
    partitioned alike on the ranks that sum parts of a gradient.
    """
    members: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}  # no empty group: it breaks torch's bookkeeping
    for name, p in model.named_parameters():
        if p.requires_grad:
            lr_ratio = cfg.train.loraplus_lr_ratio if name.endswith(".lora_B") else 1.0
            members.setdefault((len(zero3.shape(p)) >= 2, lr_ratio, name in uneven), []).append(p)
    groups = [
        {
            "params": found,
            "weight_decay": cfg.train.weight_decay if decays else 0.0,
            "lr_ratio": lr_ratio,
        }
        for (decays, lr_ratio, _), found in members.items()
    ]
    return torch.optim.AdamW(groups, lr=cfg.train.lr, betas=cfg.train.betas, eps=cfg.train.eps)
