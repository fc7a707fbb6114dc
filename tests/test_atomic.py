"""Whatever stops a save, a prune or a start: always a whole checkpoint, never an older one than the last reported.

Two ways to stop: SIGKILL of the process (written pages survive) and a power cut (only what was synced surely survives).
"""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import atomic_worker
import pytest

WORKER = Path(atomic_worker.__file__)


@pytest.mark.parametrize("n_kills", [60, pytest.param(1000, marks=pytest.mark.long)])
def test_kills(tmp_path: Path, n_kills: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(WORKER.parent.parent)}
    command = [sys.executable, str(WORKER), str(tmp_path), str(n_kills), "0"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    print(result)
    assert result["kills"] == n_kills
    assert result["with_leftovers"] > n_kills // 10  # the kills did hit the middle of saves
    assert result["steps"] > n_kills // 10  # and the worker still got on


class Disk:
    """What a power cut may leave of a folder: what was synced, and any part of the rest.

    A folder whose entries changed since its last fsync keeps, for each name, the old entry or the new one, by chance:
    more cruel than any journaling file system. A file that was not synced is cut anywhere. Both are known by their
    inode and kept open, so that no inode number is used twice.
    """

    def __init__(self, root: Path) -> None:
        self.kept: dict[int, int] = {}  # inode -> descriptor
        self.content: dict[int, bytes] = {}  # of synced files
        self.entries: dict[int, dict[str, int]] = {}  # of synced folders: name -> inode
        self.root = self._keep(os.open(root, os.O_RDONLY))

    def _keep(self, descriptor: int) -> int:
        inode = os.fstat(descriptor).st_ino
        if inode in self.kept:
            os.close(descriptor)
        self.kept.setdefault(inode, descriptor)
        return inode

    def _is_folder(self, inode: int) -> bool:
        return Path(f"/proc/self/fd/{self.kept[inode]}").is_dir()

    def _entries_now(self, inode: int) -> dict[str, int]:
        folder = self.kept[inode]
        return {name: self._keep(REAL_OPEN(name, os.O_RDONLY, dir_fd=folder)) for name in os.listdir(folder)}

    def fsync(self, descriptor: int) -> None:
        inode = self._keep(os.dup(descriptor))
        if self._is_folder(inode):
            self.entries[inode] = self._entries_now(inode)
        else:
            self.content[inode] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def cut(self, target: Path, rng: random.Random) -> None:
        """Writes to `target` what the disk may hold if the power is cut now."""
        shutil.rmtree(target, ignore_errors=True)
        self._restore(self.root, target, rng)

    def _restore(self, inode: int, target: Path, rng: random.Random) -> None:
        if not self._is_folder(inode):
            now = Path(f"/proc/self/fd/{self.kept[inode]}").read_bytes()
            target.write_bytes(self.content.get(inode, now[: rng.randrange(len(now) + 1)]))
            return
        target.mkdir()
        before, now = self.entries.get(inode, {}), self._entries_now(inode)
        for name in before.keys() | now.keys():
            child = rng.choice([before.get(name), now.get(name)])
            if child is not None:
                self._restore(child, target / name, rng)

    def close(self) -> None:
        for descriptor in self.kept.values():
            os.close(descriptor)


REAL_OPEN = os.open


def test_power_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every system call of a few lives the power is cut; the worker then lives on what the disk kept."""
    folder, after = tmp_path / "checkpoints", tmp_path / "after"
    folder.mkdir()
    disk, rng = Disk(folder), random.Random(0)
    disk.fsync(disk.kept[disk.root])
    reported, cuts, state = 0, 0, {"busy": False}

    def on_call(when: str, name: str, args: tuple[Any, ...]) -> None:
        nonlocal cuts
        if state["busy"]:  # the cut's own calls
            return
        state["busy"] = True
        if name == "fsync" and when == "after":
            disk.fsync(args[0])
        disk.cut(after, rng)
        assert atomic_worker.newest(after) in (reported, reported + 1)
        cuts += 1
        state["busy"] = False

    def report(event: str, step: int) -> None:
        nonlocal reported
        reported = max(reported, step)

    for name in atomic_worker.CALLS:
        monkeypatch.setattr(os, name, getattr(os, name))  # restored after the test
    atomic_worker.watch(on_call)
    try:
        for _ in range(3):
            atomic_worker.live(folder, report)
    finally:
        monkeypatch.undo()
        disk.close()
    assert cuts > 400
    assert reported == 3 * atomic_worker.SAVES_A_LIFE
