"""storage.checkpoints: which are whole, which are damaged and how, and which go."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_scale.spec.errors import DoesNotFitError
from lora_scale.storage import checkpoints
from lora_scale.storage.weights import write_safetensors


def write(folder: Path, step: int) -> Path:
    path = folder / checkpoints.name(step)
    path.mkdir()
    write_safetensors(path / "adapter_model.safetensors", [("a", "F32", (2,))], [bytes(8)])
    (path / "state.json").write_text(json.dumps({"step": step}))
    return path


def test_names_sort_by_their_step(tmp_path: Path) -> None:
    """A million steps have a seventh digit; names then do not sort as text."""
    paths = {step: write(tmp_path, step) for step in (1_000_000, 500, 999_999)}
    assert [path.name for path in paths.values()] == ["step-1000000", "step-000500", "step-999999"]
    assert checkpoints.list_checkpoints(tmp_path) == sorted(paths.items())


def test_other_things_are_no_checkpoints(tmp_path: Path) -> None:
    for name in (".step-000500.partial-0123abcd", "step-5", "step-000500-copy", "best"):
        (tmp_path / name).mkdir()
    assert checkpoints.list_checkpoints(tmp_path) == []
    assert checkpoints.list_damaged(tmp_path) == []
    assert checkpoints.list_checkpoints(tmp_path / "none") == []


def _cut(path: Path) -> None:
    os.truncate(path / "adapter_model.safetensors", 50)


def _replace_by_a_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("")


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no state": (
        lambda path: (path / "state.json").unlink(),
        "{}/state.json cannot be read: No such file or directory",
    ),
    "state cut": (
        lambda path: (path / "state.json").write_text('{"step"'),
        "{}/state.json is not valid JSON: Expecting ':' delimiter: line 1 column 8 (char 7)",
    ),
    "a list": (lambda path: (path / "state.json").write_text("[]"), "{}/state.json is of step None"),
    "of another step": (
        lambda path: (path / "state.json").write_text('{"step": 400}'),
        "{}/state.json is of step 400",
    ),
    "tensors cut": (
        _cut,
        "{}/adapter_model.safetensors: is truncated: its header has 56 bytes, the file has 50; "
        "copy or download it again",
    ),
    "no tensors": (lambda path: (path / "adapter_model.safetensors").unlink(), "{} has no safetensors files"),
    "a file": (
        _replace_by_a_file,
        "{}/state.json cannot be read: Not a directory",
    ),
}


@pytest.mark.parametrize("harm, what", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named(tmp_path: Path, harm: Callable[[Path], object], what: str) -> None:
    whole, path = write(tmp_path, 400), write(tmp_path, 500)
    assert checkpoints.damage(path) is None
    harm(path)
    assert checkpoints.damage(path) == what.format(path)
    assert checkpoints.list_damaged(tmp_path) == [(path, what.format(path))]
    assert checkpoints.list_checkpoints(tmp_path) == [(400, whole)]


def test_prune_keeps_the_newest_whole_ones(tmp_path: Path) -> None:
    """A damaged one counts for nothing and stays: what is in it may be all that somebody has."""
    paths = [write(tmp_path, step) for step in (100, 200, 300, 400, 500)]
    _cut(paths[4])
    _cut(paths[1])
    assert checkpoints.prune(tmp_path, keep=2) == [paths[0]]
    assert sorted(tmp_path.iterdir()) == [paths[1], paths[2], paths[3], paths[4]]
    assert checkpoints.prune(tmp_path, keep=5) == []
    assert checkpoints.prune(tmp_path, keep=1) == [paths[2]]


def test_a_damaged_one_makes_room_for_the_same_step(tmp_path: Path) -> None:
    for suffix in ("", "-2"):
        path = write(tmp_path, 500)
        _cut(path)
        what = checkpoints.damage(path)
        assert checkpoints.set_aside_damaged(tmp_path) == [(tmp_path / f"step-000500.damaged{suffix}", what)]
        assert not path.exists()
    assert checkpoints.list_damaged(tmp_path) == []
    assert checkpoints.set_aside_damaged(tmp_path) == []


def test_the_best_is_never_rotated_away(tmp_path: Path) -> None:
    paths = [write(tmp_path, step) for step in (1, 2, 3, 4)]
    checkpoints.mark_best(tmp_path, 1)
    assert checkpoints.prune(tmp_path, keep=1) == paths[1:3]
    assert (tmp_path / "best").resolve() == paths[0].resolve()
    checkpoints.mark_best(tmp_path, 4)
    assert checkpoints.prune(tmp_path, keep=1) == [paths[0]] and (tmp_path / "best" / "state.json").is_file()


def test_a_disk_without_room_is_told_before_it_is_full(tmp_path: Path) -> None:
    checkpoints.check_space(tmp_path, 1, 3)
    with pytest.raises(DoesNotFitError, match=r"GB free; 3 checkpoints \(save.keep \+ 1\) of 1,000,000,000.00 GB need"):
        checkpoints.check_space(tmp_path, 10**18, 3)
