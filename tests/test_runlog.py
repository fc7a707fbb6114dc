"""What a run directory holds after every way a writer can end, and what a reader says of a damaged one."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lora_scale.spec.errors import CheckpointError, UsageError
from lora_scale.storage import runlog
from lora_scale.storage.runlog import RunLog, read_manifest, read_metrics, read_resolved_config


def open_log(run_dir: Path, resumed_step: int | None = None) -> RunLog:
    return RunLog(run_dir, config_text="seed: 1  # mine\n", resolved={"seed": 1}, resumed_step=resumed_step)


def write_steps(run_dir: Path, steps: range, resumed_step: int | None = None) -> None:
    with open_log(run_dir, resumed_step) as log:
        for step in steps:
            log.write_row({"step": step, "loss": 1.0 / step})


def steps_in(run_dir: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run_dir)]


def test_the_tree_of_a_run(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "a"
    with open_log(run) as log:
        log.write_manifest({"command": "lora-scale train", "load": {"bytes": 10}})
        log.write_row({"step": 0, "val_loss": 4.5})
    assert (run / "config.yaml").read_text() == "seed: 1  # mine\n"
    assert read_resolved_config(run) == {"seed": 1}
    assert read_manifest(run) == {"command": "lora-scale train", "load": {"bytes": 10}}
    assert read_metrics(run) == [{"step": 0, "val_loss": 4.5}]
    assert (run / "checkpoints").is_dir()
    assert runlog.log_path(run, 7) == run / "log" / "rank-007.txt"
    assert {path.name for path in run.iterdir()} == {
        "config.yaml", "config.resolved.json", "manifest.json", "metrics.jsonl", "checkpoints", "log",
    }  # fmt: skip


def test_rows_are_readable_before_the_log_is_closed(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.write_row({"step": 1, "loss": 2.0})
        assert steps_in(tmp_path) == [1]


def test_a_row_grows_in_place(tmp_path: Path) -> None:
    """A step's row is written before its save, so that a resumed run misses none, and gets the save's seconds later."""
    with open_log(tmp_path) as log:
        log.write_row({"step": 1, "loss": 2.0})
        log.write_row({"step": 2, "loss": 1.5}, sync=True)
        before = (tmp_path / "metrics.jsonl").read_bytes()
        log.add_to_row(save_seconds=0.25)
        after = (tmp_path / "metrics.jsonl").read_bytes()
        log.write_row({"step": 3, "loss": 1.25})
    assert after.startswith(before[:-2]), "the row's first bytes are written again as they were"
    assert read_metrics(tmp_path) == [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": 1.5, "save_seconds": 0.25},
        {"step": 3, "loss": 1.25},
    ]
    with open_log(tmp_path, 2) as log:
        log.write_row({"step": 3, "loss": 1.0})
    assert steps_in(tmp_path) == [1, 2, 3] and read_metrics(tmp_path)[1]["save_seconds"] == 0.25


@pytest.mark.parametrize(("resumed", "expected"), [(5, [1, 2, 3, 4, 5, 6, 7]), (9, [*range(1, 10)]), (None, [6, 7])])
def test_resuming_leaves_one_row_a_step(tmp_path: Path, resumed: int | None, expected: list[int]) -> None:
    write_steps(tmp_path, range(1, 10))
    write_steps(tmp_path, range(6, 8) if resumed != 9 else range(0), resumed)
    assert steps_in(tmp_path) == expected


def test_a_row_out_of_order_is_our_mistake(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    with open_log(tmp_path, 3) as log, pytest.raises(AssertionError, match="step 3 after one of step 3"):
        log.write_row({"step": 3})


@pytest.mark.parametrize("cut", range(1, 20))
def test_a_last_line_cut_anywhere_is_dropped_and_written_again(tmp_path: Path, cut: int) -> None:
    write_steps(tmp_path, range(1, 5))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    # Without only its newline the row is whole, and counts.
    assert steps_in(tmp_path) == ([1, 2, 3, 4] if cut == 1 else [1, 2, 3])
    write_steps(tmp_path, range(4, 5), resumed_step=3)
    assert path.read_bytes() == whole


def test_a_killed_writer_leaves_whole_rows(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from lora_scale.storage.runlog import RunLog\n"
        "log = RunLog(Path(sys.argv[1]), config_text='', resolved={})\n"
        "[log.write_row({'step': step, 'text': 'x' * 100_000}) for step in range(5)]\n"
        f"os.kill(os.getpid(), {int(signal.SIGKILL)})\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert steps_in(tmp_path) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("damage", [b"{\n", b"\n", b"[1]\n", b'{"loss": 1.0}\n', b'{"step": "1"}\n', b"\xff\xfe\n"])
def test_damage_in_the_middle_is_named_by_line(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'{"step": 3}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl is damaged at line 2"):
        read_metrics(tmp_path)
    with pytest.raises(CheckpointError, match="line 2"):
        open_log(tmp_path, resumed_step=1)
    assert path.read_bytes().endswith(damage + b'{"step": 3}\n'), "a refusal must not touch the file"


def test_figures_that_are_not_finite_are_null(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.write_row({"step": 1, "loss": float("nan"), "memory": {"peak": [float("inf"), 1.5]}})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None, "memory": {"peak": [None, 1.5]}}]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere is not a folder"):
        read_metrics(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"has no manifest\.json"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps([1]))
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged: it holds no JSON object"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{"command": ')
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged: Expecting value"):
        read_manifest(tmp_path)
