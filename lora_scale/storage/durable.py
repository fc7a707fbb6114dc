"""Files and folders that are whole or not there, whatever kills the process or the machine.

Knows the order of write, fsync and rename; knows nothing of what is written. Every change to the disk goes through
`os.open`, `os.write`, `os.mkdir`, `os.fsync`, `os.rename`, `os.unlink` and `os.rmdir`, looked up at each call: the
tests kill the process before and after each of them.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_scale.spec.errors import CheckpointError

_PARTIAL = re.compile(r"\..+\.partial-[0-9a-f]{8}")


@contextmanager
def whole_directory(final: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `final`; when the body succeeds it is synced and renamed, else it is removed.

    After a normal return `final` survives a power cut. A `final` that exists is an error before anything is written.
    """
    if os.path.lexists(final):
        raise CheckpointError(f"{final} already exists; move it away or choose another name")
    make_directory(final.parent)
    partial = partial_name(final)
    os.mkdir(partial)
    try:
        yield partial
        for folder, _, files in os.walk(partial, topdown=False):
            for name in files:
                sync(Path(folder, name))
            sync(Path(folder))
        os.rename(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # what stays is a leftover; the first error is the one to show
        raise
    sync(final.parent)


def remove_directory(path: Path) -> None:
    """Deletes a folder so that no crash leaves a part of it under its own name."""
    partial = partial_name(path)
    os.rename(path, partial)
    sync(path.parent)
    with suppress(FileNotFoundError):  # somebody clears leftovers away
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


def as_json(value: Mapping[str, Any]) -> str:
    """The one text of a small JSON file: equal values, equal bytes."""
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def write_text_atomically(path: Path, text: str) -> None:
    """Replaces `path`: a reader sees the old text or the new one, also after a power cut."""
    write_bytes_atomically(path, text.encode())


def write_bytes_atomically(path: Path, content: bytes) -> None:
    partial = partial_name(path)
    try:
        write_file(partial, [content])
        os.rename(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


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


def partial_name(final: Path) -> Path:
    """A name beside `final` that `remove_leftovers` knows."""
    return final.with_name(f".{final.name}.partial-{secrets.token_hex(4)}")


def make_directory(path: Path) -> None:
    """mkdir -p, each new folder synced into its parent."""
    if not path.is_dir():
        make_directory(path.parent)
        os.mkdir(path)
        sync(path.parent)


def sync(path: Path) -> None:
    """fsync of a file, or of a folder's entries."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)
