"""A folder that is written file by file, gets its name when it is whole, and can be gone on with after a kill.

Knows the order of lock, write, sync and rename; knows nothing of what is written. While it grows it is
`.NAME.unfinished` beside NAME, with the task in it, and a file in it that has its own name is whole. Compare
`durable.whole_directory`, which starts anew after a kill.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_scale.spec.errors import DoesNotFitError, LoraScaleError, UsageError
from lora_scale.storage import durable

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def unfinished(final: Path) -> Path:
    """Where `final` grows."""
    return final.with_name(f".{final.name}.unfinished")


@contextmanager
def resumable_directory(final: Path, task_file: str, task: Mapping[str, Any]) -> Iterator[Path]:
    """Yields the folder that becomes `final` when the body succeeds; if not, what is finished in it stays.

    `task` says what is written, and from what; it is in `final/task_file`, and a later call with an equal one goes on
    where this one stopped. Another task, or another process at it, is a UsageError. `final` must not exist.
    """
    assert not os.path.lexists(final), final
    growing = unfinished(final)
    durable.make_directory(final.parent)
    with suppress(FileExistsError):
        os.mkdir(growing)
    descriptor = os.open(growing, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _lock(descriptor, growing)
        _take_up(growing / task_file, task)
        for folder, _, _ in os.walk(growing):
            durable.remove_leftovers(Path(folder))
        yield growing
        for folder, _, _ in os.walk(growing, topdown=False):
            durable.sync(Path(folder))
        os.rename(growing, final)
        durable.sync(final.parent)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, folder: Path) -> None:
    """The kernel lets go when the process ends, however it ends. A file system without locks is taken as it is."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"{folder} is being written by another process; wait for its end") from None
    except OSError:
        pass
    if not folder.exists() or os.fstat(descriptor).st_ino != folder.stat().st_ino:
        raise UsageError(f"{folder} was finished by another process just now")


def _take_up(file: Path, task: Mapping[str, Any]) -> None:
    text = durable.as_json(task)
    if not file.exists():
        durable.write_text_atomically(file, text)
    elif file.read_text(encoding="utf-8") != text:
        raise UsageError(
            f"{file.parent} is unfinished work on other inputs (compare its {file.name}); delete it, or name another "
            "output folder"
        )


class WholeFile:
    """A new file of known size, written at any offset by any thread; it has its name when `finish` returns."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self._partial = durable.partial_name(path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._descriptor: int | None = os.open(self._partial, flags, 0o666)

    def write(self, offset: int, data: memoryview) -> None:
        assert self._descriptor is not None
        try:
            while data:
                count = os.pwrite(self._descriptor, data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def finish(self) -> None:
        """Sync and rename."""
        assert self._descriptor is not None
        try:
            assert os.fstat(self._descriptor).st_size == self.size, f"{self.path} has a hole"
            os.fsync(self._descriptor)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        os.close(self._descriptor)
        self._descriptor = None
        os.rename(self._partial, self.path)
        durable.sync(self.path.parent)

    def discard(self) -> None:
        """Remove what is not finished; nothing if it is."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
            self._partial.unlink(missing_ok=True)


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Turns what the system says of a disk into one line: a full one is a DoesNotFitError."""
    try:
        yield
    except OSError as error:
        text = f"{what}: {error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        raise (DoesNotFitError if error.errno in _FULL else LoraScaleError)(text) from error


def free_for(out: Path) -> tuple[int, Path]:
    """Bytes that are free where `out` will be, and the nearest folder above it that is there."""
    parent = next(folder for folder in out.absolute().parents if folder.exists())
    return shutil.disk_usage(parent).free, parent
