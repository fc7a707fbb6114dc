"""storage.durable without crashes: what callers see. What a crash leaves is tests/test_atomic.py."""

import errno
import os
from pathlib import Path

import pytest

from lora_scale.spec.errors import CheckpointError
from lora_scale.storage.durable import (
    remove_directory,
    remove_leftovers,
    whole_directory,
    write_file,
    write_text_atomically,
)

CALLS = ("mkdir", "open", "write", "fsync", "rename")


def save(final: Path) -> None:
    with whole_directory(final) as partial:
        write_file(partial / "a", [b"12", b"34"])
        (partial / "sub").mkdir()
        (partial / "sub" / "b").write_text("b")


def tree(folder: Path) -> dict[str, str | None]:
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    with whole_directory(tmp_path / "runs" / "x" / "step") as partial:
        (partial / "a").write_text("a")
        assert partial.parent == tmp_path / "runs" / "x"  # one file system, so that the rename is one
        assert not (tmp_path / "runs" / "x" / "step").exists()
    assert tree(tmp_path) == {"runs": None, "runs/x": None, "runs/x/step": None, "runs/x/step/a": "a"}


def test_a_failing_body_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), whole_directory(tmp_path / "step") as partial:
        (partial / "a").write_text("a")
        raise KeyboardInterrupt
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("existing", ["folder", "file", "dangling link"])
def test_an_existing_folder_is_never_replaced(tmp_path: Path, existing: str) -> None:
    final = tmp_path / "step"
    if existing == "folder":
        final.mkdir()
    elif existing == "file":
        final.write_text("mine")
    else:
        final.symlink_to("nowhere")
    before = tree(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        save(final)
    assert str(caught.value) == f"{final} already exists; move it away or choose another name"
    assert tree(tmp_path) == before


@pytest.mark.parametrize("call", CALLS)
def test_any_call_may_fail_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """The nth call of a kind fails with a full disk: an error, and nothing, or all of it, under the final name."""
    real, count, n = getattr(os, call), 0, 0

    def failing(*args: object, **kwargs: object) -> object:
        nonlocal count
        count += 1
        if count == n:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    whole = {"step": None, "step/a": "1234", "step/sub": None, "step/sub/b": "b"}
    while True:
        folder, n, count = tmp_path / f"{call}-{n + 1}", n + 1, 0
        folder.mkdir()
        monkeypatch.setattr(os, call, failing)
        try:
            save(folder / "step")
            failed = False
        except OSError as error:
            assert error.errno == errno.ENOSPC
            failed = True
        monkeypatch.undo()
        if not failed:
            break
        assert tree(folder) in ({}, whole)  # whole: the last fsync failed, that of the parent
        assert count == n or call == "open"  # removing the temporary folder opens it
        assert remove_leftovers(folder) == []
    assert n > {"mkdir": 2, "open": 5, "write": 2, "fsync": 5, "rename": 1}[call]
    assert tree(folder) == whole


def test_errors_on_a_descriptor_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '.*/f'$"):
        write_file(tmp_path / "f", [b"x"])
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '.*/\.f\.partial-[0-9a-f]{8}'$"):
        write_text_atomically(tmp_path / "f", "x")


def test_text_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_text_atomically(path, "old")
    write_text_atomically(path, "né")
    assert path.read_bytes() == "né".encode()

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    for call in ("write", "fsync", "rename"):
        monkeypatch.setattr(os, call, fail)
        with pytest.raises(OSError, match="Input/output error"):
            write_text_atomically(path, "new")
        monkeypatch.undo()
        assert tree(tmp_path) == {"state.json": "né"}


def test_leftovers_are_what_was_named_so(tmp_path: Path) -> None:
    """Only names of our own making go; a link goes without what it points to."""
    ours = [".state.json.partial-00c0ffee", ".step-000500.partial-0123abcd", ".weights.partial-deadbeef"]
    mine = [".git", "step-000500", ".x.partial-0123abcde", ".x.partial-", "x.partial-0123abcd"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("")
    (tmp_path / ours[0]).write_text("half")
    (tmp_path / ours[1]).mkdir()
    (tmp_path / ours[1] / "a").write_text("a")
    (tmp_path / ours[2]).symlink_to("elsewhere")
    for name in mine:
        (tmp_path / name).mkdir()
    assert remove_leftovers(tmp_path) == [tmp_path / name for name in ours]
    assert sorted(tree(tmp_path)) == sorted([*mine, "elsewhere", "elsewhere/kept"])
    assert remove_leftovers(tmp_path / "none") == []


def test_a_removed_folder_is_gone(tmp_path: Path) -> None:
    save(tmp_path / "step")
    remove_directory(tmp_path / "step")
    assert tree(tmp_path) == {}


def test_a_removal_that_fails_leaves_no_part_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "step")

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "unlink", fail)
    with pytest.raises(OSError, match="Input/output error"):
        remove_directory(tmp_path / "step")
    monkeypatch.undo()
    assert not (tmp_path / "step").exists()
    assert len(remove_leftovers(tmp_path)) == 1
    assert tree(tmp_path) == {}


def test_permissions_are_the_users_own(tmp_path: Path) -> None:
    """Not those of mkdtemp, which nobody else may read: a run directory is shared in a team."""
    before = os.umask(0o022)
    try:
        save(tmp_path / "step")
    finally:
        os.umask(before)
    assert (tmp_path / "step").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "step" / "a").stat().st_mode & 0o777 == 0o644
