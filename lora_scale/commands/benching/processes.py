"""Running one command with all that it starts, until it ends or its time is up; then nothing of it is left.

Launchers put ranks into sessions of their own, so what belongs to a run is told by a variable of its environment.
"""

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

MARK = "LORA_SCALE_BENCH_RUN"
PATIENCE = 30.0  # seconds


def run(command: Sequence[str], log: Path, limit: float, cwd: Path) -> int | None:
    """Exit code; None where `limit` seconds were not enough. It gets this environment whole; output goes to `log`."""
    token = secrets.token_hex(8)
    with log.open("w") as output:
        child = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=cwd, env={**os.environ, MARK: token}
        )
    try:
        return child.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:  # also on Ctrl-C: a rank that is left holds its GPU
        end(token)
        child.wait()


def end(token: str) -> None:
    """Kill what runs with this mark, again until there is nothing; a process that the kernel holds is given up."""
    mark, deadline = f"{MARK}={token}".encode(), time.monotonic() + PATIENCE
    while (left := [pid for pid in _others() if mark in _environment(pid)]) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.1)


def _others() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and path.name != str(os.getpid())]


def _environment(pid: int) -> list[bytes]:
    """Empty for the dead, and for processes of others."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
