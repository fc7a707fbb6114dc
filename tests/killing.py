"""SIGKILL to end-to-end runs at random moments, the same command again until each is finished; nothing may be missing.

    python tests/killing.py --kills 50 --out docs/benchmarks/DATE-kills.json      about 10 minutes

A tiny model on the CPU, so that most of a run is starting, saving and resuming. A fifth of the kills fall anywhere
between the start of the process and its first step, two fifths into the middle of a save, the others shortly after one.
`--forks` takes forks of this process for processes: nothing is imported again, and a life takes a second.
"""

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import wrong_inputs  # noqa: E402
from outside import TRAIN, Command, End  # noqa: E402
from tiny import tiny_folder  # noqa: E402
from training import write_rows  # noqa: E402

from lora_scale.storage import checkpoints, provenance  # noqa: E402
from lora_scale.storage.runlog import log_path, read_metrics  # noqa: E402

STEPS = 30
CONFIG = f"""\
model: {{path: model}}
data: {{train: rows.jsonl, seq_len: 48}}
run_dir: run
precision: fp32
lora: {{r: 4, lora_alpha: 8, dropout: 0.1}}
train: {{max_steps: {STEPS}, global_batch_size: 4, lr: 3e-3, warmup_steps: 2}}
save: {{every: 2}}
"""
SAME = ("step", "loss", "lr", "grad_norm", "tokens")  # figures of a row that do not depend on the clock
EARLY, SAVING = 0.2, 0.4  # parts of the kills before the first step, and in the middle of a save
SAVED = re.compile(r"^saved \S*step-(\d+) in ", re.MULTILINE)
RESUMED = re.compile(r"^resumed .*: (\d+) of ", re.MULTILINE)


@dataclass
class Tally:
    """What happened to runs that were killed; `faults` must stay empty."""

    kills: int = 0
    runs: int = 0
    kills_before_a_step: int = 0
    resumed_from: list[int] = field(default_factory=list)
    leftovers: int = 0  # half checkpoints, under temporary names, that a kill left for the next start to remove
    faults: list[str] = field(default_factory=list)


class Fork:
    """What of `Command` is needed here, for a fork of this process."""

    def __init__(self, arguments: list[str], folder: Path):
        self.screen = folder / "screen.txt"
        self.screen.write_text("")
        case = wrong_inputs.Case("", "", tuple(arguments), env={"LORA_SCALE_COMMIT": "none"})
        self.begun = time.monotonic()
        self.pid = wrong_inputs._fork(case, folder, self.screen, {})
        self.code: int | None = None

    def kill_when(self, moment: Callable[[], bool], limit: float = 300.0) -> bool:
        """SIGKILL once `moment()`; False if it has ended by itself before that."""
        while not moment():
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
                return False
            assert time.monotonic() - self.begun < limit, f"neither over nor to be killed after {limit:.0f} s"
            time.sleep(0.001)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return True

    def end(self) -> End:
        if self.code is None:
            self.kill_when(lambda: False)
        assert self.code is not None
        return End(self.code, self.screen.read_text(), time.monotonic() - self.begun)


class Victim:
    """One run directory, and what its log has said of it."""

    def __init__(self, folder: Path, name: str, ranks: int, forks: bool = False):
        self.folder, self.run, self.forks = folder, folder / name, forks
        started = ["--ranks", str(ranks)] if ranks > 1 else []
        self.command = [*TRAIN, f"run_dir={name}", *started]
        self.log = log_path(self.run, 0)
        self.log.touch()

    def start(self) -> Command | Fork:
        if self.forks:
            return Fork(self.command[len(TRAIN) - 1 :], self.folder)
        return Command(self.command, self.folder, LORA_SCALE_COMMIT="none")

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def reported(self) -> int:
        """The newest checkpoint that the log calls saved."""
        return max(map(int, SAVED.findall(self.said())), default=0)

    def on_disk(self) -> int:
        return max((step for step, _ in checkpoints.list_checkpoints(self.run / "checkpoints")), default=0)

    def leftovers(self) -> list[Path]:
        return [path for path in (self.run / "checkpoints").glob(".*") if path.is_dir()]

    def result(self) -> tuple[list[tuple[Any, ...]], list[bytes]]:
        """All that must not depend on kills: figures of every step, and the last checkpoint's tensors."""
        rows = [tuple(row.get(key) for key in SAME) for row in read_metrics(self.run)]
        last = self.run / "checkpoints" / checkpoints.name(STEPS)
        return rows, [file.read_bytes() for file in sorted(last.glob("*.safetensors"))]


def prepare(folder: Path) -> None:
    tiny_folder(folder / "model")
    write_rows(folder / "rows.jsonl")
    (folder / "run.yaml").write_text(CONFIG)


def kill_often(folder: Path, kills: int, ranks: int = 1, seed: int = 0, forks: bool = False) -> Tally:
    """Runs in `folder`, each until it is finished, until there were so many kills; compared with one left in peace."""
    draw, tally = random.Random(seed), Tally()
    calm = Victim(folder, "calm", ranks, forks)
    begun = time.monotonic()
    end = calm.start().end()
    seconds = time.monotonic() - begun
    assert end.code == 0, end.screen
    while tally.kills < kills:
        tally.runs += 1
        victim = Victim(folder, f"killed-{tally.runs}", ranks, forks)
        while not _life(victim, tally, _moment(victim, draw, seconds) if tally.kills < kills else lambda: False):
            pass
        _judge(victim, calm, tally)
    return tally


def _moment(victim: Victim, draw: random.Random, seconds: float) -> Callable[[], bool]:
    """When to kill the next life: anywhere before its first step, in the middle of a save, or shortly after one."""
    begun, kind = time.monotonic(), draw.random()
    if kind < EARLY:
        after = draw.uniform(0.0, 0.8 * seconds)
        return lambda: time.monotonic() - begun > after
    saves = len(SAVED.findall(victim.said())) + draw.randint(0 if kind < EARLY + SAVING else 1, 4)
    rest = draw.uniform(0.0, 0.02 if kind < EARLY + SAVING else 0.4)
    at: list[float] = []

    def now() -> bool:
        if not at and len(SAVED.findall(victim.said())) >= saves and (kind > EARLY + SAVING or victim.leftovers()):
            at.append(time.monotonic() + rest)
        return bool(at) and time.monotonic() > at[0]

    return now


def _life(victim: Victim, tally: Tally, moment: Callable[[], bool]) -> bool:
    """One start of the command, to its kill (False) or its own end (True)."""
    before, said = victim.on_disk(), len(victim.said())
    command = victim.start()
    killed = command.kill_when(moment)
    end = None if killed else command.end()
    words = victim.said()[said:]
    if resumed := RESUMED.findall(words):
        tally.resumed_from.append(int(resumed[0]))
        if int(resumed[0]) != before:
            tally.faults.append(f"{victim.run.name}: resumed from {resumed[0]}; the newest on disk was {before}")
    if victim.reported() > victim.on_disk():
        tally.faults.append(f"{victim.run.name}: {victim.reported()} was reported; the disk has {victim.on_disk()}")
    if end is not None:
        if end.code:
            tally.faults.append(f"{victim.run.name}: exit code {end.code}: {end.screen}")
        return True
    tally.kills += 1
    tally.leftovers += len(victim.leftovers())
    tally.kills_before_a_step += not SAVED.search(words)
    return False


def _judge(victim: Victim, calm: Victim, tally: Tally) -> None:
    rows, tensors = victim.result()
    wanted_rows, wanted_tensors = calm.result()
    if [row[0] for row in rows] != list(range(1, STEPS + 1)):
        tally.faults.append(f"{victim.run.name}: rows of the steps {[row[0] for row in rows]}")
    elif rows != wanted_rows:
        tally.faults.append(f"{victim.run.name}: figures differ from those of the undisturbed run")
    if tensors != wanted_tensors or len(tensors) != 2:
        tally.faults.append(f"{victim.run.name}: the last checkpoint differs from the undisturbed run's")
    if victim.leftovers():
        tally.faults.append(f"{victim.run.name}: left {victim.leftovers()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--forks", action="store_true", help="of one rank each, in place of new processes")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    assert not arguments.forks or arguments.ranks == 1, "--forks goes with one rank"
    commit = provenance.commit_of_record("killing", refuse=arguments.out is not None)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        prepare(Path(place))
        tally = kill_often(Path(place), arguments.kills, arguments.ranks, arguments.seed, arguments.forks)
    record = provenance.head(
        f"SIGKILLs of end-to-end runs of {STEPS} steps (save.every=2) at random moments, the same command "
        "again until each run is finished: one row a step, losses and the last checkpoint equal to the undisturbed "
        "run's to the bit, and never an older checkpoint than the last one reported",
        "tests/killing.py",
        commit,
    ) | {
        "ranks": arguments.ranks,
        "seconds": round(time.monotonic() - begun, 1),
        **asdict(tally),
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"resumed {len(tally.resumed_from)} times, {tally.kills_before_a_step} kills before a step")
    print(f"{tally.kills} kills, {len(tally.faults)} faults, {record['seconds']} s", *tally.faults, sep="\n")
    sys.exit(bool(tally.faults))


if __name__ == "__main__":
    main()
