"""How fast a folder is written and read. Writes one nameless file and leaves nothing behind, also when it is killed."""

import fcntl
import mmap
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

CHUNK = 8 << 20


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """Bytes a second. `direct`: reading went past the page cache; if not, memory may be what was measured."""

    write: float
    read: float
    direct: bool


def measure(folder: Path, nbytes: int) -> DiskSpeed:
    """Write `nbytes` in order, sync them, and read them back. OSError when the folder cannot be written."""
    with mmap.mmap(-1, CHUNK) as buffer:  # page-aligned, as O_DIRECT wants it
        buffer.write(os.urandom(CHUNK))  # not zeros: some file systems store those as nothing
        descriptor, name = tempfile.mkstemp(prefix=".lora-scale-doctor-", dir=folder)
        try:
            os.unlink(name)
            chunks = -(-nbytes // CHUNK)
            started = time.perf_counter()
            for _ in range(chunks):
                _whole(os.write(descriptor, buffer))
            os.fsync(descriptor)
            written = time.perf_counter() - started
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            direct = _without_cache(descriptor)
            started = time.perf_counter()
            for number in range(chunks):
                _whole(os.preadv(descriptor, [buffer], number * CHUNK))
            seconds = time.perf_counter() - started
        finally:
            os.close(descriptor)
    return DiskSpeed(chunks * CHUNK / written, chunks * CHUNK / seconds, direct)


def _whole(count: int) -> None:
    if count != CHUNK:
        raise OSError(f"moved {count:,} of {CHUNK:,} bytes: disk full, or a quota")


def _without_cache(descriptor: int) -> bool:
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError:  # tmpfs and some network file systems have no direct reads
        return False
    return True
