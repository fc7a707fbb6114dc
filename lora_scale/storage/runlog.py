"""The run directory: where its files are, how its records are written, and how they are read again.

Knows the tree and the two formats, one JSON object a line (metrics) and one JSON object (manifest), but not what a
figure means; that is the writer's and `commands.report`'s. Checkpoints are `parallel.checkpoint`'s. No torch.

    <run>/  manifest.json   config.yaml   config.resolved.json   deepspeed.json   metrics.jsonl   checkpoints/
            finished.json (once it is)   log/rank-000.txt   log/memory-000.jsonl   one of each a rank
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from lora_scale.spec.errors import CheckpointError, UsageError
from lora_scale.storage.durable import write_text_atomically

MANIFEST = "manifest.json"
METRICS = "metrics.jsonl"
CONFIG = "config.yaml"
RESOLVED = "config.resolved.json"
CHECKPOINTS = "checkpoints"
DEEPSPEED = "deepspeed.json"
FINISHED = "finished.json"


def log_path(run_dir: Path, rank: int) -> Path:
    """The text log of one rank; its folder is made."""
    path = run_dir / "log" / f"rank-{rank:03d}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def memory_path(run_dir: Path, rank: int) -> Path:
    """The rows of one rank's memory, one a step."""
    return run_dir / "log" / f"memory-{rank:03d}.jsonl"


def mark_finished(run_dir: Path, facts: Mapping[str, Any]) -> None:
    """Say on disk that the run came to its last step: some launchers end with 0 although a rank failed."""
    write_text_atomically(run_dir / FINISHED, _pretty(facts))


def unmark_finished(run_dir: Path) -> None:
    """Take the mark away: the run goes on."""
    (run_dir / FINISHED).unlink(missing_ok=True)


class RunLog:
    """The records of one run, written by one process. Each row is on disk when `write_row` returns, one row a step.

    `resumed_step` is the last step that counts: later rows, of steps that are run again, are dropped. None drops all.
    """

    def __init__(
        self, run_dir: Path, *, config_text: str, resolved: Mapping[str, Any], resumed_step: int | None = None
    ) -> None:
        kept = _rows_up_to(run_dir / METRICS, resumed_step)  # first: it may refuse, and then nothing is touched
        self.run_dir = run_dir
        (run_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        write_text_atomically(run_dir / CONFIG, config_text)
        write_text_atomically(run_dir / RESOLVED, _pretty(resolved))
        write_text_atomically(run_dir / METRICS, "".join(_line(row) for row in kept))
        self.last_step = kept[-1]["step"] if kept else -1
        self._metrics = (run_dir / METRICS).open("r+b")  # not "ab": a row that grows is written where it stands
        self._row: dict[str, Any] = {}
        self._start = 0  # byte at which the last row begins

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._metrics.close()

    def write_row(self, row: Mapping[str, Any], sync: bool = False) -> None:
        """Appends the row of one step. Figures that are not finite are written as null: JSON has no word for them.

        The row survives the end of this process, whatever ends it; with `sync`, also that of the machine.
        """
        step = row["step"]
        assert step > self.last_step, f"a row of step {step} after one of step {self.last_step}"
        self.last_step = step
        self._row, self._start = dict(row), self._metrics.seek(0, os.SEEK_END)
        self._write_row()
        if sync:
            os.fsync(self._metrics.fileno())

    def add_to_row(self, **figures: Any) -> None:
        """Adds figures to the last row, in place: one write of a longer line; a killed process leaves either."""
        self._row |= figures
        self._metrics.seek(self._start)
        self._write_row()

    @property
    def row(self) -> Mapping[str, Any]:
        """The last row, as it stands."""
        return self._row

    def _write_row(self) -> None:
        self._metrics.write(_line(self._row).encode())
        self._metrics.flush()

    def write_deepspeed(self, config: Mapping[str, Any]) -> None:
        """DeepSpeed's whole configuration as it was used."""
        write_text_atomically(self.run_dir / DEEPSPEED, _pretty(config))

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Replaces the manifest."""
        write_text_atomically(self.run_dir / MANIFEST, _pretty(manifest))


class RankMemory:
    """One rank's rows of memory, beside its text log; buffered, and on disk when asked and at the end.

    `resumed_step` as in `RunLog`: rows of steps that are run again are dropped.
    """

    def __init__(self, run_dir: Path, rank: int, resumed_step: int | None = None) -> None:
        path = memory_path(run_dir, rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _rows_up_to(path, resumed_step)
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(_line(row) for row in kept)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, row: Mapping[str, Any], flush: bool = False) -> None:
        self._file.write(_line(row))
        if flush:
            self._file.flush()


def read_memory(run_dir: Path) -> dict[int, list[dict[str, Any]]]:
    """The rows of every rank that wrote some, by rank."""
    found = sorted((run_dir / "log").glob("memory-*.jsonl"))
    return {int(path.stem.partition("-")[2]): _read_rows(path) for path in found}


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows written so far. A last line that a killed writer left half is skipped; any other damage is an error."""
    return _read_rows(_existing(run_dir, METRICS))


def read_manifest(run_dir: Path) -> dict[str, Any]:
    """What ran: see DESIGN.md section 7."""
    return _read_object(_existing(run_dir, MANIFEST))


def read_resolved_config(run_dir: Path) -> dict[str, Any]:
    """The config as run, defaults and overrides included."""
    return _read_object(_existing(run_dir, RESOLVED))


def _existing(run_dir: Path, name: str) -> Path:
    path = run_dir / name
    if not run_dir.is_dir():
        raise UsageError(f"{run_dir} is not a folder; give the run directory that `lora-scale train` wrote (run_dir)")
    if not path.is_file():
        raise UsageError(f"{run_dir} has no {name}; give the run directory that `lora-scale train` wrote (run_dir)")
    return path


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSON and UTF-8 errors both
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object")
    return value


def _read_rows(path: Path) -> list[dict[str, Any]]:
    *whole, last = path.read_bytes().split(b"\n")  # after the last newline comes nothing, or the half of a line
    rows = [_row(line) for line in whole]
    for number, row in enumerate(rows, start=1):
        if row is None:
            raise CheckpointError(
                f"{path} is damaged at line {number}: it is no JSON object with a step; mend or delete that line"
            )
    return [row for row in (*rows, _row(last)) if row is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _rows_up_to(path: Path, step: int | None) -> list[dict[str, Any]]:
    if step is None or not path.exists():
        return []
    return [row for row in _read_rows(path) if row["step"] <= step]


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_finite(row), allow_nan=False, separators=(",", ":")) + "\n"


def _pretty(value: Mapping[str, Any]) -> str:
    return json.dumps(_finite(value), allow_nan=False, indent=2) + "\n"


def _finite(value: Any) -> Any:
    """The same value with null for each float that JSON cannot hold."""
    match value:
        case float() if not math.isfinite(value):
            return None
        case Mapping():
            return {key: _finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_finite(item) for item in value]
        case _:
            return value
