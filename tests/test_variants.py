"""LoRA+ under ZeRO-3 on two ranks is PEFT's in one process."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from ranks import run_ranks
from tiny import tiny_folder
from torch import Tensor
from training import _our_name, config, random_factors, write_rows
from transformers import AutoModelForCausalLM

from lora_scale.spec.config import RunConfig
from lora_scale.spec.schedule import learning_rate
from lora_scale.storage import prepared
from lora_scale.storage.folder import open_folder
from lora_scale.storage.steps import StepPlan

STEPS = 4


def peft_steps(cfg: RunConfig, ratio: float) -> dict[str, Tensor]:
    """The factors after the run's steps by PEFT, its own optimizer for LoRA+, and transformers."""
    model = AutoModelForCausalLM.from_pretrained(cfg.model.path, dtype=torch.float32)
    targets = [f"{role}_proj" for role in cfg.lora.target_modules]
    model = get_peft_model(model, LoraConfig(r=cfg.lora.r, lora_alpha=cfg.lora.lora_alpha, target_modules=targets))
    named = {_our_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    for name, value in random_factors({name: tuple(p.shape) for name, p in named.items()}).items():
        named[name].data.copy_(value)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=ratio, loraplus_weight_decay=cfg.train.weight_decay
    )
    ratios = [group["lr"] for group in optimizer.param_groups]
    folder = open_folder(cfg.model.path)
    blocks, _ = prepared.blocks_of_run(cfg, folder.path, folder.config["vocab_size"])
    plan = StepPlan(blocks, cfg.train.global_batch_size, 1, 0, 1, cfg.seed, None, STEPS)
    for number in range(STEPS):
        step = plan.step(number)
        for batch in step.micro_batches:  # one document a block, padded at its end, which a causal model does not see
            logits = model(input_ids=torch.from_numpy(batch.input_ids), use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.labels).flatten(), reduction="sum")
            (loss / step.target_tokens).backward()
        torch.nn.utils.clip_grad_norm_(named.values(), cfg.train.max_grad_norm)
        for group, own in zip(optimizer.param_groups, ratios, strict=True):
            group["lr"] = learning_rate(number, STEPS, cfg.train) * own
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in named.items()}


@pytest.mark.ranks
def test_lora_plus(tmp_path: Path) -> None:
    model, rows = tiny_folder(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    changes: dict[str, Any] = {"train__max_steps": STEPS, "train__weight_decay": 0.1, "data__packing": False}
    trees = {
        f"stage {stage}": config(
            model, rows, tmp_path / "run", train__loraplus_lr_ratio=8.0, parallel__zero_stage=stage, **changes
        )
        for stage in (3, 0)
    }
    cfg = RunConfig.model_validate(trees["stage 3"])
    theirs, plain = peft_steps(cfg, 8.0), peft_steps(cfg, 1.0)
    for name, trace in run_ranks(2, "training:run_cases", trees, folder=tmp_path / "ranks", timeout=280)[0].items():
        assert trace.values.keys() == theirs.keys()
        for factor, wanted in theirs.items():
            error = (trace.values[factor] - wanted).norm() / wanted.norm()
            assert error <= 1e-5, f"{name}: {factor} is off by {error:.1e}"  # fp32 sums in another order
    moved = max((theirs[f] - plain[f]).norm() / plain[f].norm() for f in theirs if f.endswith("lora_B"))
    assert moved > 1e-2, "the ratio changes nothing: the comparison would be empty"
