"""A rank's sign of life: where it is, what ended it, and an end to a step that hangs. No torch, no process group.

Under `lora-scale launch` a rank writes lines `@lora-scale {json}` to the stdout that its launcher gave it, and every
launcher brings them to the supervisor: nothing listens for them. A broken pipe says that the supervisor is gone.
Without a supervisor only the watch over hanging steps remains.
"""

import contextlib
import errno
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Self

from lora_scale.storage.console import Console

EVERY = "LORA_SCALE_PULSE"  # seconds between signs of life; set by `lora-scale launch`
HANG = "LORA_SCALE_HANG_SECONDS"  # instead of parallel.hang_seconds
MARK = "@lora-scale "
LONGEST = 3000  # characters of a text: with the rest below 4096 bytes, which a pipe takes whole or not at all
SLOWER = 10.0  # a step hangs that takes so many times the slowest before it
LAST_RESORT = 10.0  # seconds after which C ends a rank whose Python cannot
TICK = 0.5
DUMP = signal.SIGUSR2  # asks a rank for the stacks of all its threads
RETIRE = 20.0  # seconds to finish a step and save when the supervisor is gone


class Pulse:
    """From `with` to the end of the run. `phase` may be set at will; only a `step` is watched for hanging."""

    def __init__(self, rank: int, screen: Console, log: Path, hang_seconds: float):
        self.step_number, self.phase = 0, "meeting"
        self._rank, self._screen = rank, screen
        self._every = float(os.environ.get(EVERY, 0))
        self._hang = float(os.environ.get(HANG, hang_seconds))
        self._stacks = log.with_name(f"stacks-rank-{rank:03d}.txt")
        self._out = screen.duplicate()
        self._since, self._limit, self._slowest, self._steps = 0.0, 0.0, 0.0, 0
        self._said = 0.0
        self._ended = threading.Event()
        self._writing = threading.Lock()
        self._main = threading.main_thread().ident or 0

    @property
    def supervised(self) -> bool:
        return self._every > 0

    def __enter__(self) -> Self:
        self._stacks.unlink(missing_ok=True)  # of an earlier run
        self._file = self._stacks.open("w")
        faulthandler.register(DUMP, self._file, all_threads=True)
        self._say("start", pid=os.getpid())
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(DUMP)
        self._file.close()
        self._forget_empty()

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """One training step. The first of a process may compile and allocate: it is not watched."""
        limit = max(self._hang, SLOWER * self._slowest) if self._hang and self._steps else 0.0
        began = time.monotonic()
        self._since, self._limit, self.step_number = began, limit, number
        self.phase = "step"  # last: from here on the other thread looks at the clock
        if not self._steps:
            self._say("alive")  # set-up is over: nobody should call a fault one of set-up
        if limit:
            faulthandler.dump_traceback_later(limit + LAST_RESORT, exit=True, file=self._file)
        yield
        if limit:
            faulthandler.cancel_dump_traceback_later()
        self.phase = "between"
        if self._steps:
            self._slowest = max(self._slowest, time.monotonic() - began)
        self._steps += 1

    def end(self, code: int, text: str = "") -> bool:
        """This rank's last words; True where a supervisor gets them, who shows them."""
        self._ended.set()
        self._forget_empty()
        return self._say("end", code=code, text=text[:LONGEST])

    def _watch(self) -> None:
        while not self._ended.wait(TICK):
            now = time.monotonic()
            if self.supervised and now - self._said >= self._every:
                self._said = now
                self._say("alive")
            if self.phase == "step" and 0 < self._limit < now - self._since:
                self._end_hung(now - self._since)

    def _end_hung(self, seconds: float) -> None:
        """Stacks into a file, one line to whom it concerns, and the end of this process."""
        faulthandler.dump_traceback(self._file, all_threads=True)
        self._file.flush()
        where = place(sys._current_frames().get(self._main))
        if not self._say("hung", where=where, seconds=round(seconds)):
            who = f"rank {self._rank} on {socket.gethostname()}"
            self._screen.error(
                f"lora-scale: error: step {self.step_number} hangs: {who} has been in {where} for {seconds:.0f} s "
                f"(parallel.hang_seconds)\n  stacks: {self._stacks}"
            )
        os._exit(1)

    def _forget_empty(self) -> None:
        with contextlib.suppress(OSError):
            if not self._stacks.stat().st_size:
                self._stacks.unlink()

    def _say(self, event: str, **facts: Any) -> bool:
        if not self.supervised:
            return False
        told = {"event": event, "rank": self._rank, "host": socket.gethostname(), "step": self.step_number}
        line = f"{MARK}{json.dumps({**told, 'phase': self.phase, **facts})}\n"
        with self._writing:
            try:
                os.write(self._out, line.encode())
            except OSError as error:
                if error.errno == errno.EPIPE:
                    self._retire()
                return False
        return True

    def _retire(self) -> None:
        """The supervisor is gone and nobody would end this rank: ask for a save, as a SIGTERM does, and end in time."""
        if not self._ended.is_set():
            self._every = 0.0
            os.kill(os.getpid(), signal.SIGTERM)
            timer = threading.Timer(RETIRE, os._exit, (1,))
            timer.daemon = True
            timer.start()


def place(frame: FrameType | None) -> str:
    """Where a thread is: its innermost function, and the innermost of ours that led there."""
    if frame is None:
        return "no Python code"
    innermost, ours = _named(frame), ""
    while frame is not None and not ours:
        if f"{os.sep}lora_scale{os.sep}" in frame.f_code.co_filename:
            ours = _named(frame)
        frame = frame.f_back
    return innermost if ours in ("", innermost) else f"{innermost} from {ours}"


def _named(frame: FrameType) -> str:
    return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def read(line: str) -> dict[str, Any] | None:
    """What a line of a launcher's output holds of a rank, or None. A launcher may put words before it."""
    _, mark, told = line.partition(MARK)
    if not mark:
        return None
    with contextlib.suppress(ValueError):
        found = json.loads(told)
        if isinstance(found, dict) and isinstance(found.get("rank"), int) and isinstance(found.get("event"), str):
            return found
    return None
