"""What a person sees: rank 0's few lines and one live line. Everything libraries print goes to this rank's log file.

The redirection is at the level of file descriptors, because DeepSpeed, NCCL and tokenizers write past Python's streams.
Knows nothing of ranks but their number.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, TextIO

from lora_scale.spec.errors import InterruptedRunError

PLAIN_EVERY = 30.0  # seconds between lines of progress where the output is no terminal
REDRAW = 0.05  # seconds between states of the live line on one
INTERRUPTED = InterruptedRunError.exit_code
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
ECHO = 2.0  # seconds in which one Ctrl-C can arrive twice: from the terminal, and passed on by torchrun
PATIENCE = 10.0  # seconds that set-up has to notice a signal, which a library waiting for other ranks does not


class Console:
    """The screen of one process. Only the first rank writes to it; an error may come from any.

    A screen that goes away (a closed terminal, `| head`) does not end the run.
    """

    def __init__(self, rank: int, verbosity: int = 0):
        self.rank, self.verbosity = rank, verbosity  # -1: errors only; 1: every step; 2: libraries too
        self._screen: TextIO = os.fdopen(os.dup(1), "w", buffering=1, errors="replace")
        self._live = False
        self._last_plain = time.monotonic()
        self._last_drawn = 0.0
        self._in_log = False

    @property
    def is_terminal(self) -> bool:
        return self._screen.isatty() and os.environ.get("TERM", "") != "dumb"

    def close(self) -> None:
        """Give the screen back; stdout and stderr stay where `redirect` has put them."""
        with contextlib.suppress(OSError):
            self._screen.close()

    def duplicate(self) -> int:
        """A descriptor of its own to where the screen is; for what must be written in one piece, from any thread."""
        return os.dup(self._screen.fileno())

    def redirect(self, log: Path) -> None:
        """Send this process's stdout and stderr, also those of libraries, to `log` (appended)."""
        if self.verbosity >= 2:
            return
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        self._in_log = True

    def line(self, text: str) -> None:
        """A line that stays, from the first rank; every rank's log has it too."""
        if self._in_log:
            print(text, flush=True)
        if self.rank == 0 and self.verbosity >= 0:
            self._write(self._cleared() + text + "\n")

    def clear(self) -> None:
        """Take the live line away."""
        self._write(self._cleared())

    def live(self, text: Callable[[], str], force: bool = False) -> None:
        """The one line that is overwritten; without a terminal, a plain line every 30 s (or when forced)."""
        if self.rank != 0 or self.verbosity < 0:
            return
        if self.is_terminal and self.verbosity == 0:
            if force or not self._live or time.monotonic() - self._last_drawn >= REDRAW:
                width = self._width()
                self._write("\r" + text()[:width].ljust(width))
                self._live, self._last_drawn = True, time.monotonic()
        elif force or self.verbosity or time.monotonic() - self._last_plain >= PLAIN_EVERY:
            self._write(text() + "\n")
            self._last_plain = time.monotonic()

    def error(self, text: str) -> None:
        """From any rank, to the screen, after whatever the first rank has on it."""
        self._live = self.is_terminal
        self._write(self._cleared() + text + "\n")

    def at_once(self, text: str) -> None:
        """A line from within a signal handler, where a buffered stream may be in the middle of a write."""
        if self.rank == 0:
            with contextlib.suppress(OSError):
                os.write(self._screen.fileno(), (self._cleared() + text + "\n").encode())

    def _cleared(self) -> str:
        """What empties the live line, if there is one."""
        was_live, self._live = self._live, False
        return "\r" + " " * self._width() + "\r" if was_live else ""

    def _width(self) -> int:
        """Columns that a line can take without wrapping."""
        with contextlib.suppress(OSError):
            return max(40, os.get_terminal_size(self._screen.fileno()).columns) - 1
        return 79

    def _write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._screen.write(text)
            self._screen.flush()


def bar(done: float, total: float, width: int = 24) -> str:
    """A plain progress bar of `width` characters."""
    filled = int(width * done / total) if total else width
    return "█" * filled + "░" * (width - filled)


def size(nbytes: float) -> str:
    """Bytes as a person reads them, in the units of disks: 812 kB, 41 MB, 3.42 GB, 201 GB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= 0.9995 * scale:
            return f"{nbytes / scale:#.3g}".rstrip(".") + f" {unit}"
    return f"{nbytes:.0f} bytes"


class LastWords:
    """How this launch ends before its time: the first process to end so claims the screen, and leaves its exit code."""

    def __init__(self, run_dir: Path, token: str):
        self.token = token  # names the launch
        self._run_dir = run_dir

    def claim(self, code: int = 1) -> bool:
        """True for the first process that asks: one end is told, the one that came first."""
        try:
            descriptor = os.open(_marker(self._run_dir, self.token), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            os.write(descriptor, str(code).encode())
            os.close(descriptor)
        except FileExistsError:
            return False
        except OSError:  # a full or vanished disk: better shown twice than never
            return True
        return True

    def failed(self) -> bool:
        """Whether some process has failed and said so."""
        return self._claimed() not in ("", str(INTERRUPTED))

    def interrupted(self) -> bool:
        """Whether some process was asked to end: a rank that then finds it gone has not failed."""
        return self._claimed() == str(INTERRUPTED)

    def _claimed(self) -> str:
        try:
            return _marker(self._run_dir, self.token).read_text()
        except OSError:
            return ""


def forget_claims(run_dir: Path, but: str) -> None:
    """Delete the marks that earlier launches left."""
    for marker in (run_dir / "log").glob(".error-*"):
        if marker != _marker(run_dir, but):
            marker.unlink(missing_ok=True)


def _marker(run_dir: Path, token: str) -> Path:
    return run_dir / "log" / f".error-{token}"


TOO_EARLY = "interrupted before the first step; the same command begins again"


class StopRequest:
    """Whether a signal asked this process to stop. The loop looks once a step; before it nothing is worth saving, and
    the signal raises InterruptedRunError.

    The main thread may hang in a collective, where no Python handler runs. So a thread ends the process, without a
    save, at a second Ctrl-C; when set-up does not end by itself; and at a SIGTERM after another rank has failed
    (`words`), which a launcher sends to those that are left.
    """

    def __init__(self, screen: Console, words: LastWords):
        self.asked = False
        self.in_loop = False
        self._screen, self._words = screen, words
        self._over = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                self._before[number] = signal.signal(number, self._ask)
        self._wake, pipe = os.pipe()
        os.set_blocking(pipe, False)
        self._pipe = os.fdopen(pipe, "wb")
        signal.set_wakeup_fd(pipe, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over()
        signal.set_wakeup_fd(-1)
        self._pipe.close()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def cause(self, error: BaseException) -> BaseException:
        """What ended the run: a signal before the loop also where a library took its exception for a fault."""
        return InterruptedRunError(TOO_EARLY) if self.asked and not self.in_loop else error

    def over(self) -> None:
        """From here on signals change nothing: the process ends by itself, and has something to say."""
        self._over = True

    def _ask(self, number: int, _frame: object) -> None:
        if self._over or self.asked or (number == signal.SIGTERM and self._words.failed()):
            return
        self.asked = True
        if not self.in_loop:
            raise InterruptedRunError(TOO_EARLY)
        self._screen.at_once("stopping after this step, with a checkpoint; Ctrl-C again: at once, without")

    def _watch(self) -> None:
        """Reads the numbers of signals, which C's own handler writes whatever the main thread does."""
        first: float | None = None
        with os.fdopen(self._wake, "rb", buffering=0) as signals:
            while number := signals.read(1):
                now = time.monotonic()
                if number[0] == signal.SIGTERM and self._words.failed():
                    self._end(1, "")
                elif first is None:
                    first = now
                    if not self.in_loop:
                        threading.Thread(target=self._end_if_still_early, daemon=True).start()
                elif number[0] == signal.SIGINT and now - first > ECHO:
                    self._end(
                        130, "stopped with Ctrl-C, without a checkpoint; the same command goes on from the last one"
                    )

    def _end_if_still_early(self) -> None:
        time.sleep(PATIENCE)
        if not self.in_loop:
            self._end(INTERRUPTED, TOO_EARLY)

    def _end(self, code: int, text: str) -> None:
        """End the process now, unless it is about to do so by itself."""
        if self._over:
            return
        self._screen.clear()
        if self._words.claim(code) and text:
            self._screen.error(f"lora-scale: {text}")
        sys.stdout.flush()
        os._exit(code)
