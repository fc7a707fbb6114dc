"""Files and folders that are whole or not there, whatever kills the process or the machine.

Knows the order of write, fsync and rename; knows nothing of what is written. Every change to the disk goes through
`os.open`, `os.write`, `os.mkdir`, `os.fsync`, `os.rename`, `os.unlink` and `os.rmdir`, looked up at each call: the
tests kill the process before and after each of them.
"""

import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_scale.spec.errors import CheckpointError

_PARTIAL = re.compile(r"\..+\.partial-[0-9a-f]{8}")


@contextmanager
def whole_directory(final: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `final`; when the body succeeds it is synced and renamed, else it is removed.

    After a normal return `final` survives a power cut. A `final` that exists is an error before anything is written.
    """
    if os.path.lexists(final):
        raise CheckpointError(f"{final} already exists; move it away or choose another name")
    _make_durable_directory(final.parent)
    partial = _partial(final)
    os.mkdir(partial)
    try:
        yield partial
        for folder, _, files in os.walk(partial, topdown=False):
            for name in files:
                _sync(Path(folder, name))
            _sync(Path(folder))
        os.rename(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # what stays is a leftover; the first error is the one to show
        raise
    _sync(final.parent)


def remove_directory(path: Path) -> None:
    """Deletes a folder so that no crash leaves a part of it under its own name."""
    partial = _partial(path)
    os.rename(path, partial)
    _sync(path.parent)
    shutil.rmtree(partial)


def remove_leftovers(parent: Path) -> list[Path]:
    """Deletes what killed writers left in `parent`, and returns it. Call it while nobody else writes there."""
    if not parent.is_dir():
        return []
    leftovers = sorted(path for path in parent.iterdir() if _PARTIAL.fullmatch(path.name))
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            os.unlink(path)
    return leftovers


def write_text_atomically(path: Path, text: str) -> None:
    """Replaces `path`: a reader sees the old text or the new one, also after a power cut."""
    partial = _partial(path)
    try:
        write_file(partial, [text.encode()])
        os.rename(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def write_file(path: Path, chunks: Iterable[bytes | bytearray | memoryview]) -> None:
    """Writes a new file and syncs it; an OSError, as of a full disk, names the file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for chunk in chunks:
            view = memoryview(chunk)
            while view:
                view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # calls on a descriptor do not name the file
    finally:
        os.close(descriptor)


def _partial(final: Path) -> Path:
    return final.with_name(f".{final.name}.partial-{secrets.token_hex(4)}")


def _make_durable_directory(path: Path) -> None:
    """mkdir -p, each new folder synced into its parent."""
    if not path.is_dir():
        _make_durable_directory(path.parent)
        os.mkdir(path)
        _sync(path.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)
