"""What a person sees: rank 0's few lines and one live line. Everything libraries print goes to this rank's log file.

The redirection is at the level of file descriptors, because DeepSpeed, NCCL and tokenizers write past Python's streams.
Knows nothing of ranks but their number.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

PLAIN_EVERY = 30.0  # seconds between lines of progress where the output is no terminal


class Console:
    """The screen of one process. Only the first rank writes to it; an error may come from any."""

    def __init__(self, rank: int):
        self.rank = rank
        self._screen: TextIO = os.fdopen(os.dup(1), "w", buffering=1)
        self._live = False
        self._last_plain = time.monotonic()
        self.log_path: Path | None = None

    @property
    def is_terminal(self) -> bool:
        return self._screen.isatty() and os.environ.get("TERM", "") != "dumb"

    def redirect(self, log: Path) -> None:
        """Send this process's stdout and stderr, also those of libraries, to `log` (appended)."""
        log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        self.log_path = log

    def line(self, text: str = "") -> None:
        """A line that stays, from the first rank."""
        if self.rank == 0:
            self._clear()
            print(text, file=self._screen)

    def live(self, text: Callable[[], str], force: bool = False) -> None:
        """The one line that is overwritten; without a terminal, a plain line every 30 s (or when forced)."""
        if self.rank != 0:
            return
        if self.is_terminal:
            width = _width() - 1
            print("\r" + text()[:width].ljust(width), end="", file=self._screen, flush=True)
            self._live = True
        elif force or time.monotonic() - self._last_plain >= PLAIN_EVERY:
            print(text(), file=self._screen)
            self._last_plain = time.monotonic()

    def error(self, text: str) -> None:
        """From any rank, to the screen."""
        self._clear()
        print(text, file=self._screen, flush=True)

    def _clear(self) -> None:
        if self._live:
            print("\r" + " " * (_width() - 1), end="\r", file=self._screen)
            self._live = False


def _width() -> int:
    with contextlib.suppress(OSError):
        return max(40, os.get_terminal_size(1).columns)
    return int(os.environ.get("COLUMNS", "100"))


def bar(done: float, total: float, width: int = 24) -> str:
    """A plain progress bar of `width` characters."""
    filled = int(width * done / total) if total else width
    return "█" * filled + "░" * (width - filled)


def claim(run_dir: Path, token: str) -> bool:
    """True for the first process of this launch that asks: one error is shown, the one that came first."""
    marker = run_dir / "log" / f".error-{token}"
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return False
    except OSError:  # a full or vanished disk: better shown twice than never
        return True
    return True


class StopRequest:
    """Whether SIGTERM, SIGINT or SIGUSR1 asked this process to stop; the loop looks once a step. A second SIGINT kills."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _frame: object) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
