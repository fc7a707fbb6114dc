"""`lora-scale train` from outside: how it is started, what the screen shows, how it ends, and what it leaves behind."""

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from outside import ROOT, TRAIN, Command, End, once
from tiny import tiny_folder
from training import write_rows

from lora_scale.parallel import local
from lora_scale.parallel.network import free_port
from lora_scale.storage import checkpoints
from lora_scale.storage.runlog import read_manifest, read_metrics

pytestmark = pytest.mark.ranks

DEEPSPEED = [str(Path(sys.executable).parent / "deepspeed")]
STEPS = 24
CONFIG = f"""\
model: {{path: model}}
data: {{train: rows.jsonl, seq_len: 48, validation: 0.2}}
run_dir: run
precision: fp32
lora: {{r: 4, lora_alpha: 8}}
train: {{max_steps: {STEPS}, global_batch_size: 4, lr: 3e-3, warmup_steps: 2}}
save: {{every: 2}}
"""
CHATTER = re.compile(r"deepspeed|torch|transformers|Warning|\[INFO\]|\[WARNING\]", re.IGNORECASE)
LAUNCHER = re.compile(r"\[\d{4}-\d\d-\d\d [\d:,]+\] \[(INFO|WARNING)\] \[(runner|launch|real_accelerator)\.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, rows, a config, and no network."""
    place = tmp_path_factory.mktemp("train")
    tiny_folder(place / "model")
    write_rows(place / "rows.jsonl")
    (place / "run.yaml").write_text(CONFIG)
    return place


def losses(run: Path) -> list[float]:
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == list(range(len(rows))), "not one row a step"
    return [row["loss"] for row in rows[1:]]


def judge_quiet(end: End, launcher: bool = False) -> None:
    """A screen that is no terminal: few lines, nothing of the libraries, no control characters."""
    own = [line for line in end.lines if not (launcher and LAUNCHER.match(line))]
    before = next(i for i, line in enumerate(own) if line.startswith("step "))
    assert before <= 25 and not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", "\n".join(own)), end.screen
    assert not [line for line in own if CHATTER.search(line) and "local ranks: deepspeed" not in line], end.screen
    assert len([line for line in own if line.startswith("step ")]) <= 2 + end.seconds / 30, end.screen


# --- one run, three ways; torchrun: test_hosts.py --------------------------------------------------------------------


def test_every_way_of_starting_gives_the_same_losses(folder: Path) -> None:
    alone = Command([*TRAIN, "run_dir=alone", "parallel.base_engine=deepspeed"], folder).end()
    assert alone.code == 0, alone.screen
    judge_quiet(alone)
    wanted = losses(folder / "alone")
    assert len(wanted) == STEPS and alone.lines[-1].startswith(f"finished {STEPS} steps in ")
    assert "reduce_scatter" in (folder / "alone/log/rank-000.txt").read_text(), "where did the libraries' words go?"

    ctrl_c = once("step 1/", lambda _: os.write(terminal._screen, b"\x03"))
    terminal = Command([*TRAIN, "--ranks", "2"], folder, terminal=True)
    _judge_interrupted(terminal.end(ctrl_c), folder / "run")

    port = ["--num_gpus", "2", "--master_port", str(free_port())]
    by_hand = Command([*DEEPSPEED, *port, "--module", "lora_scale", "train", "run.yaml"], folder).end()
    assert by_hand.code == 0, by_hand.screen
    assert "--local_rank=1" in by_hand.screen, "the launcher no longer does what this tests"
    judge_quiet(by_hand, launcher=True)
    assert sum(line.startswith("resumed  ") for line in by_hand.lines) == 1

    assert losses(folder / "run") == pytest.approx(wanted, rel=1e-5), "fp32 sums in another order"
    assert read_manifest(folder / "run")["ranks"] == 2


def _judge_interrupted(end: End, run: Path) -> None:
    """A live bar on the terminal, a Ctrl-C there, and a checkpoint of the step that was under way."""
    assert end.code == 75, end.screen
    assert re.search(rf"\rstep 1/{STEPS} █*░+ loss [\d.]+ ", end.screen), "no live line"
    assert re.search(r"\rloading  █*░* .* of [0-9.]+ kB a rank, .*B/s", end.screen), "no bar of loading"
    *_, last = end.lines
    told = re.search(
        rf"lora-scale: interrupted after step (\d+) of {STEPS}, checkpoint saved; the same command goes on", last
    )
    assert told and end.screen.count("lora-scale: ") == 1, end.screen
    assert checkpoints.list_checkpoints(run / "checkpoints")[-1][0] == int(told[1]) < STEPS
    assert end.screen.count("stopping after this step") == 1
    bars = [part for part in end.screen.replace("^C", "").split("\r") if part.startswith(("step ", "loading "))]
    assert max(map(len, bars)) <= 99, "a live line that wraps would scroll the terminal"


SLOW = """\
import sys, time
if "train" in sys.argv:
    from lora_scale.parallel import beside
    original = beside.Factors.put

    def put(self, model):
        time.sleep(0.5)
        original(self, model)

    beside.Factors.put = put
"""


def test_a_step_that_was_begun_early_has_all_its_seconds(folder: Path, tmp_path: Path) -> None:
    """Whatever the processor does between steps. On GPUs it once took their first forward pass away."""
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    end = Command([*TRAIN, "run_dir=slow", "train.max_steps=6", "save.every=3", "--ranks", "1"], folder, path=tmp_path)
    assert (ended := end.end()).code == 0, ended.screen
    with_pause = []
    for row in read_metrics(folder / "slow")[1:]:
        phases = {name: seconds for name, seconds in row["phase_seconds"].items() if name not in ("between", "data")}
        assert row["seconds"] >= 0.999 * sum(phases.values()), row
        if row["seconds"] - sum(phases.values()) >= 0.5:
            with_pause.append(row["step"])
    assert with_pause == [3, 5, 6], "not begun: the first, the one after it, and that after the save of 3"


# --- when something goes wrong on one rank --------------------------------------------------------------------------

PATCH = """\
import os, signal, threading
if os.environ.get("RANK") in {ranks!r}:
    from lora_scale.parallel import engine
    original = engine.Engine.start_step

    def start_step(self, step, number, *rest):
        if number == 2:
            {fault}
        return original(self, step, number, *rest)

    engine.Engine.start_step = start_step
"""


def patched(place: Path, **faults: str) -> Path:
    """A folder for PYTHONPATH that breaks step 3 on some ranks; the product knows nothing of it."""
    place.mkdir()
    parts = [PATCH.format(ranks=(rank.removeprefix("rank"),), fault=fault) for rank, fault in faults.items()]
    (place / "sitecustomize.py").write_text("\n".join(parts))
    return place


HANG = "lock = threading.Lock(); lock.acquire(); lock.acquire()"  # as in a collective whose peer is gone


def test_a_fault_of_one_rank_ends_the_job_and_is_told_once_and_last(folder: Path, tmp_path: Path) -> None:
    path = patched(tmp_path / "patch", rank0=HANG, rank1="raise RuntimeError('the fan fell off\\nand the lid')")
    moment = [0.0]
    seen = once("the fan fell off", lambda _: moment.__setitem__(0, time.monotonic()))
    command = Command([*TRAIN, "--ranks", "2", "run_dir=fault"], folder, path=path)
    end = command.end(seen)
    assert time.monotonic() - moment[0] < 29, "a hanging rank was waited for"  # DeepSpeed's launcher gives each 30 s
    assert end.code == 1, end.screen
    log = Path("fault/log/rank-001.txt")
    assert end.lines[-2:] == ["lora-scale: error: rank 1 failed: RuntimeError: the fan fell off", f"  log: {log}"]
    assert end.screen.count("the fan fell off") == 1 and "Traceback" not in end.screen
    text = (folder / log).read_text()
    assert "Traceback (most recent call last)" in text and "and the lid" in text


def test_ranks_that_die_without_a_word_are_told_of(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    """As when the kernel kills them for memory: exit code 1, not a signal's, and one line that says what happened."""
    (tmp_path / "sitecustomize.py").write_text("import os\nif 'RANK' in os.environ: os.kill(os.getpid(), 9)\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.chdir(folder)
    Path("killed/log").mkdir(parents=True)
    assert local.run(2, ["train", "run.yaml", "run_dir=killed"], Path("killed")) == 1
    out, err = capfd.readouterr()
    assert (out, err) == (
        "lora-scale: error: a rank was killed by SIGKILL, often the kernel's when memory is short (see dmesg) "
        "and could not say why\n  log: killed/log\n",
        "",
    )


def test_ranks_do_not_outlive_the_command_that_started_them(folder: Path) -> None:
    """Killed, it cannot ask them to stop; they are asked by the kernel and DeepSpeed's launcher, and save."""
    command = Command([*TRAIN, "--ranks", "2", "run_dir=orphans"], folder)
    end = command.end(once("step 1/", lambda process: os.kill(process.pid, signal.SIGKILL)))
    assert end.code == -signal.SIGKILL
    told = re.match(r"lora-scale: interrupted after step (\d+) of ", end.lines[-1])
    assert told, end.screen
    assert checkpoints.list_checkpoints(folder / "orphans/checkpoints")[-1][0] == int(told[1])
