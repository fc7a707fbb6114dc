"""A run's plan before it loads: what its data decide, and the end of a run that cannot fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_folder
from training import config, write_rows

from lora_scale.parallel import fits
from lora_scale.parallel.data import Data
from lora_scale.parallel.grid import Grid
from lora_scale.parallel.memory import PhaseMemory, Snapshot, Tracked, measure, since_start
from lora_scale.parallel.world import World
from lora_scale.spec import planning
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import DoesNotFitError
from lora_scale.storage import prepared
from lora_scale.storage.folder import open_folder
from lora_scale.storage.steps import StepPlan

ALONE = Grid(World("none", 0, 1, 0), 0, 1, 0, 1, None, None, None, None)


def data_of(place: Path, **changes: Any) -> tuple[RunConfig, Data, Any]:
    folder = tiny_folder(place / "model")
    cfg = RunConfig.model_validate(config(folder, write_rows(place / "rows.jsonl"), place / "run", **changes))
    opened = open_folder(cfg.model.path)
    blocks, _ = prepared.blocks_of_run(cfg, opened.path, opened.config["vocab_size"])
    train = cfg.train
    plan = StepPlan(blocks, train.global_batch_size, train.micro_batch_size, 0, 1, 0, None, train.max_steps)
    return cfg, Data(plan, blocks, [], [], ""), opened


def test_what_the_data_decide(tmp_path: Path) -> None:
    """With sdpa packed rows need a mask; logits are computed for the positions that the engine computes them for."""
    cfg, data, folder = data_of(tmp_path, model__attention="sdpa")
    job = fits.job_of(cfg, folder, data, ALONE)
    assert job is not None and job.work.masked
    batches = [batch for step in data.plan.steps() for batch in step.micro_batches]
    shares = [(batch.labels != -100).any(axis=0).mean() for batch in batches[: fits.SAMPLE + 2]]
    assert job.work.target_share == pytest.approx(1.0 if max(shares) > 0.9 else max(shares))
    assert 0.5 < job.work.target_share < 1.0, "the rows were to leave something out"


def test_full_blocks_of_one_document_have_no_mask(tmp_path: Path) -> None:
    rows = tmp_path / "full.jsonl"
    rows.write_text(8 * (json.dumps({"input_ids": [5] * 16}) + "\n"))
    cfg, data, folder = data_of(
        tmp_path, data__train=str(rows), data__seq_len=16, data__packing=False, model__attention="sdpa"
    )
    job = fits.job_of(cfg, folder, data, ALONE)
    assert job is not None and not job.work.masked and job.work.target_share == 1.0


def test_a_host_without_the_memory_for_activations_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits.verify, "bytes_free", lambda: 8 * 200 * 2**20)
    cfg, data, folder = data_of(tmp_path, activation_offloading="all")
    job = fits.job_of(cfg, folder, data, ALONE)
    assert job is not None
    row = planning.plan(job)
    assert fits.host_warnings(cfg, row, ranks=8) == []
    (said,) = fits.host_warnings(cfg, row, ranks=16)
    assert said.startswith("activation_offloading is all: 16 ranks of this host pin 3.0 GiB of its memory, 1.6 GiB are")
    without = cfg.model_copy(update={"activation_offloading": "none"})
    assert fits.host_warnings(without, row, ranks=16) == []


def test_a_run_that_cannot_fit_ends_with_a_way_out(tmp_path: Path) -> None:
    cfg, data, folder = data_of(tmp_path, train__micro_batch_size=6)
    job = fits.job_of(cfg, folder, data, ALONE)
    assert job is not None
    row = planning.plan(job)
    assert fits.check(job, row, None, ignore=False).endswith("of tensors a rank at the fullest moment")
    assert fits.check(job, row, 10.0, ignore=False).startswith("fits")
    needed = row["this_run"]["needed"] / 2**30
    with pytest.raises(DoesNotFitError, match=r"does not fit: .* short") as error:
        fits.check(job, row, needed * 0.9999, ignore=False)
    assert "this would make it fit: recompute=all" in str(error.value) and "--ignore-plan" in str(error.value)
    assert error.value.exit_code == 3
    assert fits.check(job, row, needed * 0.9999, ignore=True).startswith("does not fit")


def test_a_cpu_has_no_books(tmp_path: Path) -> None:
    """No limit, no phases, no snapshot; host memory all the same."""
    cpu = torch.device("cpu")
    assert fits.device_gib(cpu) is None and since_start(cpu, "load") == {}
    phases = PhaseMemory(cpu)
    with phases.phase("forward"):
        pass
    assert phases.take() == {}
    snapshot = Snapshot((1, 2), tmp_path / "rank-000.txt")
    snapshot.before(1)
    snapshot.after(2)
    assert not list(tmp_path.iterdir()) or not list(tmp_path.glob("*.pickle"))

    class Nothing:
        module = torch.nn.Linear(2, 2)
        optimizer = torch.optim.AdamW(module.parameters())

    found = measure(cpu, Tracked(Nothing), {})
    assert found["rss_anon_gib"] > 0 and found["tracked"] == found["categories"]["trained"] == 2 * 2 * 4 + 2 * 4
