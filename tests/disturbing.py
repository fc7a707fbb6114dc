"""SIGKILL, SIGTERM and SIGUSR1 to two-rank runs at random moments, queued again until each is finished.

    python tests/disturbing.py --each 30 --out docs/benchmarks/DATE-signals.json      about 10 minutes

A job is two ranks as a launcher starts them, each a fork of this process, so that nothing is imported again; a tiny
model on the CPU. SIGKILL hits one of the ranks; the other two hit both, as Slurm's do, or one of them. Who waits for
the ranks does as DeepSpeed's launcher does: when one has died, the other gets a SIGTERM, then a SIGKILL.
"""

import argparse
import json
import os
import random
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import wrong_inputs  # noqa: E402
from wrong_inputs import Case  # noqa: E402

from lora_scale.parallel.launchers import TOKEN  # noqa: E402
from lora_scale.parallel.network import free_port  # noqa: E402
from lora_scale.storage import checkpoints, provenance  # noqa: E402
from lora_scale.storage.runlog import read_metrics  # noqa: E402

RANKS = 2
CONFIG = ("train.micro_batch_size=3", "lora.dropout=0.1", "save.every=4", "save.keep=2")
SAME = ("step", "loss", "lr", "grad_norm", "tokens")  # figures of a row that do not depend on the clock
KINDS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
PATIENCE = 60.0  # seconds a job may take to end after its signal
GRACE = 5.0  # seconds that a rank has to end by itself after the other has died
STOPPED = 75  # "saved, queue me again"


@dataclass
class Tally:
    """What came of the signals of one kind; `faults` must stay empty."""

    signals: int = 0
    runs: int = 0
    before_a_step: int = 0  # so early that the job had made no step
    codes: Counter[str] = field(default_factory=Counter)  # of a job's two ranks
    seconds_to_end: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class End:
    """How a job ended: each rank's exit code (-n: by signal n), and whether the signal came before that."""

    codes: list[int]
    disturbed: bool
    seconds: float  # from the signal, or the start, to the end of the last rank


def job(
    folder: Path, run: str, number: int = 0, after: float = 0.0, hit: tuple[int, ...] = (), in_loop: bool = False
) -> End:
    """Two ranks of the same run, of which those in `hit` get a signal so many seconds after their start, or after the
    job's first step."""
    screen = folder / f"{run}.txt"
    screen.touch()
    place = {
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        TOKEN: secrets.token_hex(8),
    }
    case = Case("", run, ("run.yaml", *CONFIG, f"run_dir={run}"))
    children = [
        wrong_inputs._fork(case, folder, screen, place | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(RANKS)
    ]
    begun = time.monotonic()
    codes: dict[int, int] = {}
    before = _steps(folder / run)
    while in_loop and not codes and _steps(folder / run) == before and time.monotonic() - begun < PATIENCE:
        codes = _wait(children, codes, time.monotonic() + 0.02)
    codes = _wait(children, codes, time.monotonic() + after if hit else begun + PATIENCE)
    if disturbed := bool(hit) and len(codes) < RANKS:
        begun = time.monotonic()
        for rank in hit:
            if children[rank] not in codes:
                os.kill(children[rank], number)
        codes = _wait(children, codes, begun + PATIENCE)
    if len(codes) < RANKS:
        _end(children, codes, signal.SIGABRT)  # faulthandler writes where it hangs
    return End([codes[child] for child in children], disturbed, time.monotonic() - begun)


def _wait(children: list[int], known: Mapping[int, int], deadline: float) -> dict[int, int]:
    """Exit codes by process, of those that have ended by the deadline; a launcher ends what outlives a dead rank."""
    codes, died = dict(known), 0.0
    while len(codes) < len(children) and time.monotonic() < deadline:
        for child in set(children) - set(codes):
            pid, status = os.waitpid(child, os.WNOHANG)
            if pid:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if any(code < 0 for code in codes.values()):
            died = died or time.monotonic()
            if time.monotonic() - died > 2 * GRACE:
                _end(children, codes, signal.SIGKILL)
            elif time.monotonic() - died > GRACE:
                for child in set(children) - set(codes):
                    os.kill(child, signal.SIGTERM)
        time.sleep(0.01)
    return codes


def _end(children: list[int], codes: dict[int, int], number: int) -> None:
    for child in set(children) - set(codes):
        os.kill(child, number)
        codes[child] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def result(folder: Path, run: str) -> tuple[list[tuple[Any, ...]], dict[str, bytes]]:
    """All that must not depend on signals: figures of every step, and the last checkpoint's tensors."""
    rows = [tuple(row.get(key) for key in SAME) for row in read_metrics(folder / run)]
    _, last = checkpoints.list_checkpoints(folder / run / "checkpoints")[-1]
    return rows, {file.name: file.read_bytes() for file in sorted(last.glob("*.safetensors"))}


def disturb(folder: Path, name: str, numbers: Sequence[signal.Signals], length: float, seed: int) -> Tally:
    """Runs, each queued again until it is finished, until all these signals are given; held to the run `calm`.

    Half of them fall anywhere in a job, `length` seconds, the others anywhere in its loop. A signal that would come
    after the end of its job is given to another one.
    """
    draw, tally, left = random.Random(f"{name} {seed}"), Tally(), list(numbers)
    wanted = result(folder, "calm")
    assert wanted[0][-1][0] == len(wanted[0]) and len(wanted[1]) == 2
    while left:
        tally.runs += 1
        run = f"{name}-{tally.runs}"
        while not _slice(folder, run, left, draw, length, tally):
            pass
        if result(folder, run) != wanted:
            tally.faults.append(f"{run}: figures or the last checkpoint differ from those of the undisturbed run")
    return tally


def _slice(
    folder: Path, run: str, left: list[signal.Signals], draw: random.Random, length: float, tally: Tally
) -> bool:
    """One job of a run; whether the run is finished."""
    number = left[0] if left else None
    one = (draw.randrange(RANKS),)
    hit = () if number is None else one if number == signal.SIGKILL or draw.random() < 0.3 else tuple(range(RANKS))
    before = _steps(folder / run)
    in_loop = number is not None and draw.random() < 0.5
    loop = sum(row["seconds"] for row in read_metrics(folder / "calm") if "seconds" in row)
    end = job(folder, run, number or 0, draw.uniform(0.0, loop if in_loop else length), hit, in_loop)
    if end.disturbed and number is not None:
        tally.signals += 1
        left.pop(0)
        tally.before_a_step += _steps(folder / run) == before
        tally.seconds_to_end.append(round(end.seconds, 2))
        tally.codes[" ".join(map(str, end.codes))] += 1
    words = (folder / f"{run}.txt").read_text()
    if not _is_allowed(end, number):
        tally.faults.append(f"{run}: exit codes {end.codes}: {words[-2000:]}")
    made = _steps(folder / run)  # before its first step a job leaves the rows of one that was killed as they are
    if set(end.codes) == {STOPPED} and made not in (before, _saved(folder / run)):
        tally.faults.append(f"{run}: {made} steps are made, {_saved(folder / run)} are saved")
    if end.seconds > PATIENCE:
        tally.faults.append(f"{run}: had not ended after {PATIENCE:.0f} s: {words[-2000:]}")
    return end.codes == [0] * RANKS or len(tally.faults) > 5


def _is_allowed(end: End, number: int | None) -> bool:
    """Finished together, or saved together; beside a rank that a signal has killed, the other may fail or be ended."""
    if not end.disturbed or end.codes == [0] * RANKS:
        return end.codes == [0] * RANKS
    killed = [code for code in end.codes if code < 0]
    if not killed:
        return end.codes == [STOPPED] * RANKS
    return -(number or 0) in killed and set(end.codes) <= {-(number or 0), 1, STOPPED, -signal.SIGTERM}


def _steps(run: Path) -> int:
    rows = read_metrics(run) if (run / "metrics.jsonl").exists() else []
    return max((row["step"] for row in rows if "loss" in row), default=0)


def _saved(run: Path) -> int:
    return max((step for step, _ in checkpoints.list_checkpoints(run / "checkpoints")), default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", type=int, default=30, help="signals of each kind; 0: one run and one of each")
    parser.add_argument("--steps", type=int, default=40, help="of a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    commit = provenance.commit_of_record("disturbing", refuse=arguments.out is not None)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "prepared")
        wrong_inputs.prepare(folder)
        text = (folder / "run.yaml").read_text()
        (folder / "run.yaml").write_text(text.replace("max_steps: 4", f"max_steps: {arguments.steps}"))
        begun_calm = time.monotonic()
        assert job(folder, "calm").codes == [0] * RANKS, (folder / "calm.txt").read_text()
        length = time.monotonic() - begun_calm
        series = {number.name: [number] * arguments.each for number in KINDS} if arguments.each else {"mixed": KINDS}
        found = {name: disturb(folder, name, numbers, length, arguments.seed) for name, numbers in series.items()}
    record = provenance.head(
        f"signals to two-rank runs of {arguments.steps} steps (save.every=4) at random moments, each run "
        "queued again until it is finished: one row a step, losses and the last checkpoint equal to those of an "
        "undisturbed run, to the bit",
        "tests/disturbing.py",
        commit,
    ) | {
        "ranks": RANKS,
        "seconds": round(time.monotonic() - begun, 1),
        "signals": [
            {
                "signal": name, "times": one.signals, "runs": one.runs, "before_a_step_of_its_job": one.before_a_step,
                "exit_codes": dict(one.codes), "seconds_to_end": sorted(one.seconds_to_end), "faults": one.faults,
            }
            for name, one in found.items()
        ],
    }  # fmt: skip
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    faults = [fault for one in found.values() for fault in one.faults]
    print({name: (one.signals, one.runs, one.before_a_step, dict(one.codes)) for name, one in found.items()})
    print(f"{len(faults)} faults, {record['seconds']} s", *faults, sep="\n")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
