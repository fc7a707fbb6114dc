"""commands/training/books.py: a step is told of once, while the device is at the next one, whatever ends the run."""

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_scale.commands.training.books import Books
from lora_scale.spec.config import RunConfig
from lora_scale.storage.console import Console
from lora_scale.storage.runlog import RunLog, read_metrics


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Mapping[str, Any]]:
    """Rows as the trackers got them."""
    found: list[Mapping[str, Any]] = []
    monkeypatch.setattr("lora_scale.storage.trackers.Trackers.write", lambda _, row: found.append(dict(row)))
    return found


@pytest.fixture
def screen() -> Iterator[Console]:
    with closing(Console(rank=1)) as silent:
        yield silent


def books(run: Path, screen: Console) -> tuple[Books, RunLog]:
    tree = {"model": {"path": "m"}, "data": {"train": "x"}, "run_dir": str(run), "train": {"max_steps": 3}}
    job: Any = SimpleNamespace(
        cfg=RunConfig.model_validate(tree), data=SimpleNamespace(plan=SimpleNamespace(total_steps=3))
    )
    log = RunLog(run, config_text="", resolved={})
    return Books(job, log, screen, 0), log


def row(step: int) -> dict[str, Any]:
    figures = {"loss": 2.0, "lr": 0.1, "grad_norm": 1.0, "tokens_per_second": 5.0, "tflops_4n": 1.0}
    return {"step": step, **figures, "phase_seconds": {"forward": 1.0}}


def test_a_row_waits_for_the_next_step_and_what_is_saved_does_not(
    tmp_path: Path, told: list[Any], screen: Console
) -> None:
    one, log = books(tmp_path, screen)
    made = []
    with log, one:
        one.step(lambda: made.append(1) or row(1))  # type: ignore[func-returns-value]
        assert not made and not read_metrics(tmp_path), "nothing is read while the device waits"
        one.settle()
        one.settle()
        assert made == [1] and [found["step"] for found in told] == [1]
        one.step(lambda: row(2))
        one.write({"val_loss": 1.5}, sync=True)
        assert read_metrics(tmp_path)[-1] == {**row(2), "val_loss": 1.5}
        one.write({"save_seconds": 0.1})
        assert len(told) == 1, "told with all its figures"
        one.settle()
        assert told[-1]["save_seconds"] == 0.1 and told[-1]["val_loss"] == 1.5
        one.step(lambda: row(3))
    assert [found["step"] for found in read_metrics(tmp_path)] == [1, 2, 3] and len(told) == 3


def test_what_ends_the_run_is_not_hidden(tmp_path: Path, told: list[Any], screen: Console) -> None:
    """The last step's row is written before; where it cannot be made, the first error is the one that is raised."""
    one, log = books(tmp_path, screen)
    with log, pytest.raises(ValueError, match="the fan fell off"), one:
        one.step(lambda: row(1))
        raise ValueError("the fan fell off")
    assert [found["step"] for found in read_metrics(tmp_path)] == [1]
    two, log = books(tmp_path, screen)
    with log, pytest.raises(ValueError, match="the fan fell off"), two:
        two.step(lambda: {}["gone"])
        raise ValueError("the fan fell off")
    three, log = books(tmp_path, screen)
    with log, pytest.raises(KeyError), three:
        three.step(lambda: {}["gone"])
