"""Who owns a run directory: a lock of the kernel's on this host, and a lease with a heartbeat for all hosts.

A lock goes with its process but may not be seen by other hosts (NFS, Lustre); a lease is seen by all and outlives a
killed process until it is stale. Times are the file system's own, so that clocks of hosts need not agree.
"""

import fcntl
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from lora_scale.spec.errors import UsageError

LOCK, LEASE = ".lock", ".lease"
LOCK_PATIENCE = 10.0  # seconds in which a killed predecessor on this host may still be dying
BEAT = 15.0  # seconds between signs of life
STALE = 120.0  # seconds without one, after which the owner is taken for dead


class Lease:
    """Hold the run directory while this is open. `warning` says that it was taken from an owner who seems dead."""

    def __init__(self, run_dir: Path, waiting: Callable[[str], None] = lambda text: None):
        self._path, self._probe = run_dir / LEASE, run_dir / f"{LEASE}.{os.getpid()}"
        self._host = socket.gethostname()
        self._text = f"process {os.getpid()} on {self._host} {time.time_ns()}"
        self.warning: str | None = None
        self._over = threading.Event()
        self._lock = _lock(run_dir)
        try:
            self._take(run_dir, waiting)
        except BaseException:
            self._lock.close()
            raise
        threading.Thread(target=self._beat, daemon=True).start()

    def close(self) -> None:
        """Give the directory back at once."""
        self._over.set()
        if self._holder() == self._text:
            with suppress(OSError):
                self._path.write_text("")
        self._lock.close()

    def _take(self, run_dir: Path, waiting: Callable[[str], None]) -> None:
        """Wait until another host's lease is given back or stale; refuse as soon as it is renewed."""
        seen = self._age()
        while (holder := self._holder()) and self._owner(holder).rpartition(" ")[2] != self._host:
            age = self._age()
            if age >= STALE:
                self.warning = f"taken over from {self._owner(holder)}, of which nothing was heard for {age:.0f} s"
                break
            if age < seen - 1.0:
                raise UsageError(
                    f"{run_dir} is in use by {self._owner(holder)}; wait for its end, or set another run_dir"
                )
            seen = max(seen, age)
            waiting(
                f"{run_dir} was in use by {self._owner(holder)} {age:.0f} s ago; waiting for a sign of life or its end"
            )
            time.sleep(min(1.0, BEAT / 4))
        self._write()

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            holder = self._holder()
            if holder not in (self._text, ""):
                sys.stderr.write(f"lora-scale: {self._path} is now of {self._owner(holder)}; this process ends\n")
                sys.stderr.flush()
                os._exit(1)  # two writers would spoil both runs; a save would be one
            with suppress(OSError):  # a file system that hangs for a while is no reason to end
                self._write()

    def _write(self) -> None:
        self._probe.write_text(self._text)
        os.replace(self._probe, self._path)

    def _holder(self) -> str:
        try:
            return self._path.read_text()
        except OSError:
            return ""

    @staticmethod
    def _owner(holder: str) -> str:
        return holder.rpartition(" ")[0]

    def _age(self) -> float:
        """Seconds since the last sign of life, by the clock of the file system."""
        try:
            self._probe.write_text("")
            return self._probe.stat().st_mtime - self._path.stat().st_mtime
        except FileNotFoundError:
            return STALE
        finally:
            self._probe.unlink(missing_ok=True)


def _lock(run_dir: Path) -> IO[str]:
    """The kernel's lock: let go of when the process ends, however it ends. A file system without locks is taken as it
    is."""
    file = (run_dir / LOCK).open("a+", encoding="utf-8")
    deadline = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read() or "another process"
                file.close()
                raise UsageError(f"{run_dir} is in use by {holder}; wait for its end, or set another run_dir") from None
            time.sleep(0.2)
        except OSError:
            break
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file
