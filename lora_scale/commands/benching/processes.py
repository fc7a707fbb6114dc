"""Running the ranks of one case until they end or their time is up; then nothing of it is left.

Ranks are started here, each with a launcher's variables, as `torchrun` and `deepspeed` do at the end of theirs: two
programs fewer import torch, one after the other, for every case. What belongs to a run is told by a variable of its
environment: a rank may start processes in sessions of their own.
"""

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from lora_scale.parallel.network import free_port

MARK = "LORA_SCALE_BENCH_RUN"
EVERY = 0.05  # seconds between looks at the ranks
GRACE = 8.0  # seconds in which the others can say why, once a rank has failed
PATIENCE = 30.0  # seconds until a process that the kernel holds is given up


def run(command: Sequence[str], ranks: int, log: Path, limit: float, cwd: Path) -> int | None:
    """Exit code, of the first rank that failed; None where `limit` seconds were not enough.

    A rank gets this environment whole. All write to `log`. With 0 ranks it is one process without such variables.
    """
    token = secrets.token_hex(8)
    children = []
    try:
        with log.open("ab") as output:
            for place in _places(ranks):
                env = {**os.environ, **place, MARK: token}
                child = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=cwd, env=env
                )
                children.append(child)
        return _wait(children, time.monotonic() + limit)
    finally:  # also on Ctrl-C: a rank that is left holds its GPU
        end(token)
        for child in children:
            child.wait()


def _places(ranks: int) -> list[Mapping[str, str]]:
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(free_port())
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)] or [{}]


def _wait(children: list[subprocess.Popen[bytes]], deadline: float) -> int | None:
    failed = None
    while time.monotonic() < deadline:
        codes = [child.poll() for child in children]
        if failed is None and (bad := [code for code in codes if code]):
            failed, deadline = bad[0], min(deadline, time.monotonic() + GRACE)
        if None not in codes:
            return failed or 0
        time.sleep(EVERY)
    return failed


def end(token: str) -> None:
    """Kill what runs with this mark, again until there is nothing."""
    mark, deadline = f"{MARK}={token}".encode(), time.monotonic() + PATIENCE
    while (left := [pid for pid in _others() if mark in _environment(pid)]) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(EVERY)


def _others() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and path.name != str(os.getpid())]


def _environment(pid: int) -> list[bytes]:
    """Empty for the dead, and for processes of others."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
