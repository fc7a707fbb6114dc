"""A run cut into jobs is the run that was not; a job without a network trains."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from ranks import run_script


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    done = run_script("requeue", folder=tmp_path_factory.mktemp("requeue"))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_four_jobs_equal_one_run_to_the_bit(found: Any) -> None:
    (whole_code, whole), (codes, words, cut) = found["slices"]["whole"], found["slices"]["cut"]
    assert whole_code == 0 and codes == [75, 75, 75, 0], words
    steps = [int(line.split("after step ")[1].split()[0]) for line in words[:3]]
    assert steps == [1, 2, 4], "Slurm's limit and max_hours after one step each; SIGUSR1 came in the fourth"
    assert cut["rows"] == whole["rows"] and len(whole["rows"]) == 6
    assert cut["tensors"] == whole["tensors"] and len(whole["tensors"]) == 2


def test_the_best_checkpoint_stays_whatever_save_keep_says(found: Any) -> None:
    for *_, run in (found["slices"]["whole"], found["slices"]["cut"]):
        losses = {row[0]: row[5] for row in run["rows"] if row[5] is not None and row[0]}
        best = min(losses, key=lambda step: (losses[step], step))
        assert run["best"] == f"step-{best:06d}" and run["best"] in run["kept"]


def test_early_stop_is_an_end_also_when_queued_again(found: Any) -> None:
    (code, last), (again, said) = found["early"]
    assert code == again == 0
    assert last.startswith("finished early, at step ") and "in 2 evaluations" in last
    assert said.startswith("finished already, at step ") and said.endswith("a larger early_stop.patience goes on")


@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")
def test_a_model_of_the_hub_trains_without_a_route(found: Any) -> None:
    (prepared, shown), (code, screen) = found["offline"]["prepare"], found["offline"]["train"]
    assert prepared == 0, shown
    assert "next     lora-scale train run.yaml" in shown
    assert code == 0, screen
    assert "finished 2 steps in" in screen
    code, message = found["offline"]["absent"]
    assert code == 2 and "the hub's cache does not hold it here: `lora-scale prepare` with the same config" in message


@pytest.mark.ranks
def test_a_signal_of_each_kind_and_the_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """30 of each are a record: python tests/disturbing.py."""
    done = run_script("disturbing", "--each", "0", "--steps", "9", folder=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "{'mixed': (3, " in done.stdout and "\n0 faults" in done.stdout
