"""What validation losses and clocks say a run should do: keep, stop, or save before its time is up. Pure functions of
metrics rows and seconds, so that three jobs decide as one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

RESERVE = 30.0  # seconds for ending: closing files, leaving the process group


@dataclass(frozen=True, slots=True)
class Validation:
    """The lowest validation loss so far, its step, and how many evaluations since were not lower."""

    best: float | None = None
    step: int = 0
    waited: int = 0

    def after(self, step: int, val_loss: float) -> "Validation":
        """With one more evaluation."""
        if self.best is None or val_loss < self.best:
            return Validation(val_loss, step, 0)
        return Validation(self.best, self.step, self.waited + 1)

    def is_best(self, step: int) -> bool:
        return self.best is not None and self.step == step


def validation_so_far(rows: Sequence[Mapping[str, Any]]) -> Validation:
    """From the rows of metrics.jsonl; one that was not finite, null there, counts as not lower."""
    found = Validation()
    for row in rows:
        if "val_loss" in row:
            found = found.after(row["step"], float("inf") if row["val_loss"] is None else row["val_loss"])
    return found


@dataclass(frozen=True, slots=True)
class Deadline:
    """When a job must be over, in seconds of the epoch; None: never."""

    at: float | None

    def is_near(self, now: float, step_seconds: float, save_seconds: float) -> bool:
        """Whether one more step, and a save after it, might not be over in time: each may take twice what it took."""
        return self.at is not None and now + 2 * (step_seconds + save_seconds) + RESERVE >= self.at


def deadline(started: float, max_hours: float | None, environment: Mapping[str, str]) -> Deadline:
    """The earlier of `max_hours` and Slurm's own limit (SLURM_JOB_END_TIME, seconds of the epoch)."""
    ends = [started + max_hours * 3600] if max_hours else []
    slurm = environment.get("SLURM_JOB_END_TIME", "")
    if slurm.isdigit() and int(slurm) > started:
        ends.append(float(slurm))
    return Deadline(min(ends) if ends else None)
