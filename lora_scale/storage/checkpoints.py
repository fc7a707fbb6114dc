"""The checkpoints of a run directory: `checkpoints/step-000500/`, which are whole, and which are deleted.

Knows names, state.json's step and that safetensors headers must fit their files; what the tensors mean is
`parallel.checkpoint`'s. Writing one is `durable.whole_directory`'s.
"""

import json
import os
import re
import shutil
from pathlib import Path

from lora_scale.spec.errors import DoesNotFitError, ModelError
from lora_scale.storage import durable, weights

BEST = "best"  # a link to one of them
_NAME = re.compile(r"step-(\d{6,})")


def name(step: int) -> str:
    return f"step-{step:06d}"


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of every whole checkpoint, oldest first. A damaged one is left out; `damage` says why."""
    return [(step, path) for step, path in _named(folder) if damage(path) is None]


def list_damaged(folder: Path) -> list[tuple[Path, str]]:
    """Checkpoints that something has damaged since they were written, each with what is wrong."""
    return [(path, what) for _, path in _named(folder) if (what := damage(path))]


def damage(checkpoint: Path, named: bool = True) -> str | None:
    """What is wrong with a checkpoint, judged by state.json and the headers of its safetensors files, or None.

    `named`: its folder must be called after its step, as in a run directory.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        step = state.get("step") if isinstance(state, dict) else None
        if not isinstance(step, int) or (named and name(step) != checkpoint.name):
            return f"{checkpoint / 'state.json'} is of step {step}"
        files = sorted(checkpoint.glob("*.safetensors"))
        for file in files:
            weights.read_safetensors(file)
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    except ValueError as error:
        return f"{checkpoint / 'state.json'} is not valid JSON: {error}"
    except ModelError as error:
        return str(error)
    return None if files else f"{checkpoint} has no safetensors files"


def nbytes(checkpoint: Path) -> int:
    """Bytes of its files."""
    return sum(file.stat().st_size for file in checkpoint.iterdir())


def set_aside_damaged(folder: Path) -> list[tuple[Path, str]]:
    """Renames damaged checkpoints (to `step-000500.damaged`), so that a run can write those steps again.

    Returns the new path and what is wrong with each; nothing is deleted.
    """
    moved = []
    for path, what in list_damaged(folder):
        tries = (path.with_name(f"{path.name}.damaged{suffix}") for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
        aside = next(name for name in tries if not name.exists())
        path.rename(aside)
        moved.append((aside, what))
    return moved


def mark_best(folder: Path, step: int) -> None:
    """Makes `best` a link to the checkpoint of that step."""
    link = folder / f".best.{os.getpid()}"
    link.unlink(missing_ok=True)
    os.symlink(name(step), link)
    os.replace(link, folder / BEST)


def check_space(folder: Path, each: int, count: int) -> None:
    """A DoesNotFitError where the disk has no room for so many checkpoints of so many bytes."""
    free = shutil.disk_usage(folder).free
    if free < each * count:
        raise DoesNotFitError(
            f"run_dir is {folder}, with {free / 1e9:,.1f} GB free; {count} checkpoints (save.keep + 1) of "
            f"{each / 1e9:,.2f} GB need {each * count / 1e9:,.1f} GB; free some, lower save.keep, or set another "
            "run_dir"
        )


def prune(folder: Path, keep: int) -> list[Path]:
    """Deletes all whole checkpoints but the newest `keep` and the best, and returns them. Damaged ones are left to
    people."""
    assert keep >= 1
    best = (folder / BEST).resolve()
    old = [path for _, path in list_checkpoints(folder)[:-keep] if path.resolve() != best]
    for path in old:
        durable.remove_directory(path)
    return old


def _named(folder: Path) -> list[tuple[int, Path]]:
    if not folder.is_dir():
        return []
    return sorted((int(match[1]), path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name)))
