"""A command as a person runs it: on a terminal or not, watched, acted upon, and gone at the end with all it started."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRAIN = [sys.executable, "-m", "lora_scale", "train", "run.yaml"]


@dataclass(frozen=True)
class End:
    """How a command ended: exit code, everything it wrote on the screen, and seconds."""

    code: int
    screen: str
    seconds: float

    @property
    def lines(self) -> list[str]:
        return self.screen.splitlines()


Act = Callable[[str, subprocess.Popen[bytes]], bool]  # given the screen so far; true once it has acted


class Command:
    """A running command, on a terminal or not. Whatever it started is gone at the end, or the test fails."""

    def __init__(self, command: Sequence[str], folder: Path, terminal: bool = False, path: Path = ROOT, **env: str):
        self.mark = f"lora-scale-test-{os.getpid()}-{time.monotonic_ns()}"
        env = {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{path}:{ROOT}",
            "TERM": "xterm",
            "LORA_SCALE_MARK": self.mark,
        } | env
        launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE")
        clean = {name: value for name, value in os.environ.items() if name not in (*launchers, "DS_ACCELERATOR")}
        mine, theirs = pty.openpty() if terminal else os.pipe()
        if terminal:
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=clean | env,
            stdin=theirs if terminal else subprocess.DEVNULL,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=(lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)) if terminal else None,
        )
        os.close(theirs)
        self._screen = mine

    def end(self, act: Act = lambda _, __: True, limit: float = 600.0) -> End:
        """Read the screen, act when it is time, wait for the end."""
        seen, acted = b"", False
        try:
            while chunk := self._read(limit):
                seen += chunk
                acted = acted or act(seen.decode(errors="replace"), self.process)
            code = self.process.wait(timeout=60.0)
        except (TimeoutError, subprocess.TimeoutExpired):
            raise AssertionError(f"not over after {limit:.0f} s:\n{seen.decode(errors='replace')[-4000:]}") from None
        finally:
            os.close(self._screen)
            left = self.kill()
        assert acted, f"it ended before the test could act:\n{seen.decode(errors='replace')}"
        assert not left, f"processes outlived it: {left}"
        return End(code, seen.decode().replace("\r\n", "\n"), time.monotonic() - self.started)

    def kill_when(self, moment: Callable[[], bool], limit: float = 600.0) -> bool:
        """SIGKILL to everything once `moment()`; False if it has ended by itself before that."""
        while not moment():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() - self.started < limit, f"neither over nor to be killed after {limit:.0f} s"
            time.sleep(0.001)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # now; to look for processes takes longer than a save
        self.kill(at_once=True)
        os.close(self._screen)
        return True

    def _read(self, limit: float) -> bytes:
        left = self.started + limit - time.monotonic()
        if not select.select([self._screen], [], [], max(0.0, left))[0]:
            raise TimeoutError
        with contextlib.suppress(OSError):  # EIO: nobody has the terminal open any more
            return os.read(self._screen, 65536)
        return b""

    def processes(self) -> list[int]:
        """Everything that this command has started and that still runs; processes inherit the mark."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
        return found

    def kill(self, at_once: bool = False) -> list[int]:
        """SIGKILL to everything; returns what there was. What has closed the screen gets a moment to end by itself."""
        deadline = time.monotonic() + (0.0 if at_once else 3.0)
        while (left := self.processes()) and self.process.poll() is not None and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        return left


def once(text: str, action: Callable[[subprocess.Popen[bytes]], object]) -> Act:
    """Act when `text` is on the screen."""

    def act(screen: str, process: subprocess.Popen[bytes]) -> bool:
        if text not in screen:
            return False
        action(process)
        return True

    return act
