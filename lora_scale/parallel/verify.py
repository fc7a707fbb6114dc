"""Whether PEFT, given an exported folder, computes what our own layers compute: one process, one whole base in fp32.

In fp32 both do the same operations in the same order, so any difference is a mistake in what was written.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_scale.adapters import initial, peft, tokens
from lora_scale.adapters.lora import adapt
from lora_scale.adapters.peft import Adapter
from lora_scale.adapters.trained import restore
from lora_scale.parallel import grid, load
from lora_scale.spec.config import RunConfig
from lora_scale.storage.folder import ModelFolder

SHAPE = (2, 32)  # sequences, tokens
TOLERANCE = 1e-5  # of the largest logit (of 1 at least): some fp32 roundings, far below what any wrong factor does


@dataclass(frozen=True, slots=True)
class Comparison:
    """Largest absolute values and differences of logits, over all tokens."""

    logit: float
    """Our logits."""
    difference: float
    """Our logits and PEFT's, both with the exported factors."""
    moved: float
    """Our logits and the base's: what the adapter does."""
    rounding: float
    """Our logits with the exported factors and with the trained fp32 ones."""

    @property
    def equal(self) -> bool:
        return self.difference <= TOLERANCE * max(1.0, self.logit)


def bytes_needed(base: ModelFolder) -> int:
    """Host memory for `compare`: the base in fp32, and room for the activations and the libraries."""
    return 4 * sum(entry.numel for entry in base.tensors.values()) + (1 << 30)


def bytes_free() -> int:
    """What this process may still take: the machine's available memory, or less inside a container with a limit."""
    free = _table(Path("/proc/meminfo"))["MemAvailable:"] * 1024
    limits = Path("/sys/fs/cgroup")
    if (limits / "memory.max").is_file() and (text := (limits / "memory.max").read_text().strip()) != "max":
        used = int((limits / "memory.current").read_text()) - _table(limits / "memory.stat")["inactive_file"]
        free = min(free, int(text) - used)  # inactive_file: page cache that the kernel gives up first
    return free


def _table(path: Path) -> dict[str, int]:
    return {row[0]: int(row[1]) for line in path.read_text().splitlines() if (row := line.split())}


def compare(
    base: ModelFolder, exported: Path, trained: Adapter, dtype: str, trust_remote_code: bool = False
) -> Comparison:
    """Logits of the base, of our layers, and of PEFT, for fixed token ids. Takes the time of loading the base once."""
    from peft import PeftModel  # seconds to import: only who verifies waits for them
    from transformers.utils import logging

    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries say about themselves
        model = _whole(base, trust_remote_code).eval()
        ids = torch.randint(model.config.vocab_size, SHAPE, generator=torch.Generator().manual_seed(0))
        plain = _logits(model, ids)
        layers = adapt(model, trained.lora_config(), seed=0)
        initial.load_factors(layers, trained)
        before = {name: p.clone() for name, p in model.named_parameters() if name in trained.others}
        restore(model, trained.others)
        exact = _logits(model, ids)
        for layer in layers.values():
            for factor in (layer.lora_A, layer.lora_B):
                factor.data = factor.data.to(peft.DTYPES[dtype][1]).float()
        restore(model, {name: value.to(peft.DTYPES[dtype][1]).float() for name, value in trained.others.items()})
        ours = _logits(model, ids)
        restore(model, before)
        tokens.remove(model)
        for name, layer in layers.items():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base_layer)
        theirs = _logits(PeftModel.from_pretrained(model, exported).eval(), ids)
    return Comparison(
        logit=ours.abs().max().item(),
        difference=_largest(ours, theirs),
        moved=_largest(ours, plain),
        rounding=_largest(ours, exact),
    )


def _whole(base: ModelFolder, trust_remote_code: bool) -> Any:
    """The base in fp32, as transformers reads it; fp8 blocks by our reader, for transformers wants whole blocks."""
    from transformers import AutoModelForCausalLM

    if not base.has_blocks:
        return AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32, trust_remote_code=trust_remote_code)
    tree = {"model": {"path": str(base.path), "trust_remote_code": trust_remote_code}, "precision": "fp32"}
    unused = {"data": {"train": "-"}, "run_dir": "-", "train": {"max_steps": 1}}  # a model is built without
    model = load.empty(base, RunConfig.model_validate(tree | unused))
    load.fill(model, base, torch.device("cpu"), None, {}, grid.alone())
    return model


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits.float()


def _largest(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().max().item()
