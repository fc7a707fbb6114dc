"""A run that stops and goes on is the run that did not stop: to the bit at the same ranks, within fp32 sums at
others."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import tiny_folder
from training import config, everything, start, train, write_rows

from lora_scale.parallel import checkpoint, masters
from lora_scale.parallel.world import World
from lora_scale.spec.errors import CheckpointError

pytestmark = pytest.mark.ranks
HALF, WHOLE = 3, 6
UNSHARED = "lora, stage 2"  # there only the first rank sees the checkpoint


def save_and_go_on(here: World, trees: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """For each run: half the steps, save, the other half; then a fresh set-up, restore, the other half again."""
    found = {}
    for name, tree in trees.items():
        job = start(here, tree)
        first = train(job, 0, HALF)
        sent = _count_bytes(functools.partial(_save, job, HALF, Path(tree["run_dir"])))
        second = train(job, HALF, WHOLE - HALF)
        job.engine.ds.destroy()
        fresh = start(here, tree, randomise=False)
        path = Path(tree["run_dir"]) / f"step-{HALF:06d}"
        seen = path.with_name("on-another-host") if name == UNSHARED and here.rank else path
        checkpoint.restore(fresh.engine, seen, checkpoint.read_state(path), fresh.key)
        restored = {what: everything(fresh, what) for what in (masters.VALUE, *masters.MOMENTS)}
        again = train(fresh, HALF, WHOLE - HALF)
        fresh.engine.ds.destroy()
        found[name] = {
            "losses": first.losses + second.losses,
            "again": again.losses,
            "values": second.values,
            "values_again": again.values,
            "restored": restored,
            "sent": sent,
        }
    return found


def go_on(here: World, trees: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
    """Restore at this number of ranks what another number saved, and do the other half."""
    found = {}
    for name, tree in trees.items():
        job = start(here, tree, randomise=False)
        path = Path(tree["run_dir"]) / f"step-{HALF:06d}"
        checkpoint.restore(job.engine, path, checkpoint.read_state(path), job.key)
        found[name] = train(job, HALF, WHOLE - HALF).losses
        job.engine.ds.destroy()
    return found


def _save(job: Any, step: int, folder: Path) -> Path:
    return checkpoint.save(job.engine, job.state(step, 0), folder, job.write_adapter_config, job.key)


def _count_bytes(action: Any) -> int:
    """Bytes that this rank gives away through torch.distributed while `action` runs."""
    sent, original = 0, dist.send

    def counting(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        nonlocal sent
        sent += tensor.numel() * tensor.element_size()
        original(tensor, *args, **kwargs)

    dist.send = counting
    try:
        action()
    finally:
        dist.send = original
    return sent


def _trees(folder: Path, at: int) -> dict[str, dict[str, Any]]:
    model, rows = folder / "model", folder / "rows.jsonl"
    if not rows.exists():
        tiny_folder(model)
        write_rows(rows)
    common = {"train__global_batch_size": 12, "train__max_steps": WHOLE}
    cases = {
        "lora, stage 3": {"lora__dropout": 0.1},
        "lora, stage 3, adapter partitioned": {"parallel__adapter_sharding": "zero"},
        "lora, stage 2": {"parallel__zero_stage": 2},
        "lora, stage 0": {"parallel__zero_stage": 0},
        "full, stage 3": {"method": "full", "recompute": "all"},
        "full, stage 1, bf16": {"method": "full", "parallel__zero_stage": 1, "precision": "bf16"},
    }
    return {
        name: config(model, rows, folder / f"{at}-{number}", **common, **changes)
        for number, (name, changes) in enumerate(cases.items())
    }


def test_same_and_other_numbers_of_ranks(tmp_path: Path) -> None:
    trees = _trees(tmp_path, at=2)
    everyone = run_ranks(2, "test_resume:save_and_go_on", trees, folder=tmp_path / "save")
    for name, found in everyone[0].items():
        assert found["again"] == found["losses"][HALF:], f"{name}: a resumed run differs"
        for tensor, value in found["values"].items():
            assert torch.equal(value, found["values_again"][tensor]), (
                f"{name}: {tensor} differs after the resumed steps"
            )
        assert all(t.any() for t in found["restored"]["exp_avg"].values()), f"{name}: a moment was restored as zeros"
    _judge_traffic(everyone)
    for ranks in (1, 4):
        others = run_ranks(ranks, "test_resume:go_on", trees, folder=tmp_path / f"on-{ranks}")[0]
        for name, losses in others.items():
            wanted = torch.tensor(everyone[0][name]["losses"][HALF:])
            torch.testing.assert_close(
                torch.tensor(losses), wanted, rtol=_rounding(name), atol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


def _rounding(name: str) -> float:
    """Of losses at other ranks: fp32 sums are in another order, by which a bf16 weight may round the other way."""
    return 2**-8 if "bf16" in name else 1e-5


def _judge_traffic(everyone: list[dict[str, Any]]) -> None:
    """What travels to the first rank is what it does not have of the trainable tensors and their two moments: no
    base, no padding; and nothing where it has all of it."""
    partitioned = "lora, stage 3, adapter partitioned"
    for name in (partitioned, "lora, stage 3", "lora, stage 0"):
        values = everyone[0][name]["values"]
        half = sum(
            v.numel() - -(-v.numel() // 2) for v in values.values()
        )  # of 2 ranks, the second has what the first's half leaves
        expected = 3 * 4 * half if name == partitioned else 0
        assert everyone[0][name]["sent"] == 0
        assert everyone[1][name]["sent"] == expected, name


def test_a_run_resumes_only_onto_itself() -> None:
    saved = _state()
    checkpoint.check_resumable(saved, _state(), Path("c"))
    checkpoint.check_resumable(saved, _state(step=9, config_sha256="other"), Path("c"))
    with pytest.raises(CheckpointError, match="c was trained on another base model"):
        checkpoint.check_resumable(saved, _state(base_fingerprint="sha256:2"), Path("c"))
    with pytest.raises(CheckpointError, match=r"lora\.r: 8 -> 16"):
        checkpoint.check_resumable(saved, _state(lora={"r": 16}), Path("c"))
    with pytest.raises(CheckpointError, match=r"data\.fingerprint: 'a' -> 'b'"):
        checkpoint.check_resumable(saved, _state(data={"fingerprint": "b"}), Path("c"))
    with pytest.raises(CheckpointError, match="global_batch_size: 4 -> 8"):
        checkpoint.check_resumable(saved, _state(global_batch_size=8), Path("c"))


def _state(**changes: Any) -> checkpoint.State:
    usual: dict[str, Any] = {
        "step": 3,
        "method": "lora",
        "seed": 0,
        "global_batch_size": 4,
        "tokens_seen": 5,
        "base_fingerprint": "sha256:1",
        "config_sha256": "x",
        "data": {"fingerprint": "a"},
        "lora": {"r": 8},
        "versions": {},
    }
    return checkpoint.State(**usual | changes)


def test_damaged_state_is_named(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"step": 1}))
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.read_state(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no state\.json"):
        checkpoint.read_state(tmp_path / "nothing")
