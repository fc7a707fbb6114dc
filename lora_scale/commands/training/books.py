"""What is told of each step: its row in the log and with the trackers, and its line on the screen."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from lora_scale.parallel import documents, metrics, world
from lora_scale.parallel.setup import Job
from lora_scale.spec import configfile
from lora_scale.storage import provenance, runlog
from lora_scale.storage.console import Console, bar
from lora_scale.storage.runlog import RunLog
from lora_scale.storage.trackers import Trackers

Row = dict[str, Any]


class Books:
    """Of the first rank; the others have no log and tell nothing.

    To make a row, thousands of a GPU's events are read, at 100B for 30 ms: not while the GPU waits for its next step.
    So a step is told of when the device is at work again (`settle`), one that is saved at once.
    """

    def __init__(self, job: Job, log: RunLog | None, screen: Console, first: int, label: str = ""):
        self._label = label  # before its lines on the screen
        self._log, self._screen, self._first, self._total = log, screen, first, job.data.plan.total_steps
        self._trackers = Trackers(job.cfg, first, screen.line) if log else None
        self._started = time.perf_counter()
        self._make: Callable[[], Row] | None = None
        self._untold = False
        self._val_loss: float | None = None

    @property
    def seconds(self) -> float:
        """Since the first step of this job began."""
        return time.perf_counter() - self._started

    def step(self, make: Callable[[], Row]) -> None:
        """The step that has ended, by what makes its row."""
        self._make = make

    def write(self, figures: Mapping[str, Any], sync: bool = False) -> None:
        """The row, if it is not written yet, with more figures; with `sync` it survives the end of the machine."""
        make, self._make = self._make, None
        if self._log and make:
            self._log.write_row({**make(), **figures}, sync)
            self._untold = True
        elif self._log and figures:
            self._log.add_to_row(**figures)

    def settle(self) -> None:
        """Nothing of the last step is left to be written or told."""
        self.write({})
        if not (self._log and self._trackers and self._untold):
            return
        row, self._untold = self._log.row, False
        self._val_loss = row.get("val_loss", self._val_loss)
        self._trackers.write(row)
        if row["step"] > self._first:
            self._screen.live(partial(self._line, row), force=row["step"] in (self._first + 1, self._total))

    def _line(self, row: Mapping[str, Any]) -> str:
        """Where the run stands, how well, how fast, and when it ends."""
        done = row["step"]
        left = self.seconds / (done - self._first) * (self._total - done)
        text = f"{self._label}step {done}/{self._total} {bar(done, self._total, 16)} loss {row['loss']:.4f}"
        if self._val_loss is not None:
            text += f" val {self._val_loss:.4f}"
        text += f" lr {row['lr']:.1e} norm {row['grad_norm']:.2f} {row['tokens_per_second']:,.0f} tokens/s"
        if done >= self._first + 3:
            text += f" {left / 60:.0f} min left" if left > 90 else f" {left:.0f} s left"
        return f"{text}, {metrics.in_words(row)}"  # a terminal shows what it has room for

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        with suppress(*([Exception] if kind else [])):  # what ended the run is what is told
            self.settle()
        if self._trackers:
            self._trackers.close()


def open_log(job: Job, config: Path, step: int, planned: dict[str, Any], loading: dict[str, Any]) -> RunLog:
    """The run directory's records, with the manifest written; for the first rank."""
    runlog.unmark_finished(job.cfg.run_dir)
    log = RunLog(
        job.cfg.run_dir,
        config_text=config.read_text(encoding="utf-8"),
        resolved=job.cfg.model_dump(mode="json"),
        resumed_step=step or None,
    )
    log.write_deepspeed(job.engine.config)
    log.write_manifest(
        {
            "command": provenance.command(),
            "commit": provenance.commit(),
            "versions": provenance.versions(),
            "hardware": world.hardware(job.world),
            "attention": documents.kernel(job.cfg, job.world.device),
            "ranks": job.world.size,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "resumed_step": step,
            "base_fingerprint": job.base_fingerprint,
            "config_sha256": configfile.config_sha256(job.cfg),
            "parameters": asdict(job.parameters),
            "load": {"bytes": job.loaded.nbytes, "seconds": round(job.loaded.seconds, 3), "memory": loading},
            "data": job.data.blocks.stats(),
            "plan": planned,
        }
    )
    return log
