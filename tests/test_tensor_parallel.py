"""Tensor parallelism, alone and under ZeRO, against one process of Hugging Face + PEFT: losses, gradients and norms.

A covering part of the grid in `parallel_grid.py`; all of it is a command with a record, and `-m long` here.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from parallel_grid import EPOCH, LONG, MODELS, cases_of, covering, run, unequal
from ranks import run_ranks
from tiny import tiny_folder
from training import Trace, config, reference, write_rows

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("world", [2, 4])
def test_equal_to_one_process(world: int, tmp_path: Path) -> None:
    assert not unequal(run(world, covering(world), tmp_path, EPOCH))


def test_bf16_is_as_near_to_fp32_as_plain_bf16(tmp_path: Path) -> None:
    """The ratio rule against Hugging Face + PEFT in bf16: gradients of the first step, and losses of eight steps
    that learn next to nothing, so that all are of the same weights; one loss may be near by chance."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 16}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    model = tiny_folder(tmp_path / "model", **sizes, **heads)
    rows = write_rows(tmp_path / "rows.jsonl", longest=90)
    wanted = {"data__seq_len": 96, "data__packing": False, "train__lr": 1e-9}
    layouts: dict[str, dict[str, Any]] = {
        "ZeRO-3": {},
        "tp 2": {"parallel__tensor_parallel_size": 2, "parallel__zero_stage": 0, "parallel__sequence_parallel": True},
    }
    trees = {
        name: config(model, rows, tmp_path / "run", precision="bf16", **wanted, **layout)
        for name, layout in layouts.items()
    }
    runs = run_ranks(2, "training:run_cases", trees, folder=tmp_path / "ranks")[0]
    exact = reference(trees["ZeRO-3"])
    plain = _errors(reference(trees["ZeRO-3"], dtype=torch.bfloat16), exact)
    assert plain["losses"] > 1e-4 and plain["gradients"] > 1e-2, "8 bits"
    for name, trace in runs.items():
        for what, error in _errors(trace, exact).items():
            assert error <= 2 * plain[what], f"{name}: {what}: {error:.2e}, plain {plain[what]:.2e}"


def _errors(trace: Trace, exact: Trace) -> dict[str, float]:
    """Root mean square of the losses' errors, and of the gradients' relative to their norms."""
    losses = torch.tensor(trace.losses) - torch.tensor(exact.losses)
    apart = [(trace.gradients[name] - g).norm() / g.norm() for name, g in exact.gradients.items()]
    return {
        "losses": float(losses.square().mean().sqrt()),
        "gradients": float(torch.stack(apart).square().mean().sqrt()),
    }


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_the_whole_grid(model: str, world: int, tmp_path: Path) -> None:
    assert not unequal(run(world, cases_of(world, [model]), tmp_path, LONG))
