"""The screen: what is shown when, in which units, once, and what signals do to a run."""

import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lora_scale.spec.errors import InterruptedRunError
from lora_scale.storage import console
from lora_scale.storage.console import Console, LastWords, StopRequest

ROOT = Path(__file__).parent.parent


@contextmanager
def screen_on(descriptor: int, rank: int = 0) -> Iterator[Console]:
    """A console whose screen is this descriptor. File descriptors 1 and 2 are what they were afterwards."""
    kept = os.dup(1), os.dup(2)
    os.dup2(descriptor, 1)
    screen = Console(rank)
    try:
        yield screen
    finally:
        screen.close()
        for number, copy in enumerate(kept, start=1):
            os.dup2(copy, number)
            os.close(copy)


@contextmanager
def screen_in(path: Path, rank: int = 0) -> Iterator[Console]:
    """A console whose screen is a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with screen_on(descriptor, rank) as screen:
        yield screen
    os.close(descriptor)


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (43_320, "43.3 kB"), (999_600, "1.00 MB"),
     (269_000_000, "269 MB"), (3_420_000_000, "3.42 GB"), (201_400_000_000, "201 GB"), (1.4e12, "1.40 TB")],
)  # fmt: skip
def test_sizes_read_well(nbytes: float, text: str) -> None:
    assert console.size(nbytes) == text


def test_without_a_terminal_progress_is_a_line_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with screen_in(tmp_path / "screen") as screen:
        screen.line("base")
        for step in range(1, 122):
            now[0] += 1.0
            screen.live(lambda step=step: f"step {step}", force=step == 1)
        screen.line("saved")
    assert (tmp_path / "screen").read_text() == "base\nstep 1\nstep 31\nstep 61\nstep 91\nstep 121\nsaved\n"


def test_other_ranks_are_silent_but_for_errors_and_their_logs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "rank-003.txt"
    with capfd.disabled(), screen_in(tmp_path / "screen", rank=3) as screen:
        screen.line("not for the log either: nothing is redirected yet")
        screen.redirect(log)
        screen.line("base")
        screen.live(lambda: "step 1", force=True)
        screen.at_once("stopping")
        os.system("echo words of a library; echo and an error >&2")
        screen.error("rank 3 failed")
    assert (tmp_path / "screen").read_text() == "rank 3 failed\n"
    assert log.read_text() == "base\nwords of a library\nand an error\n"


def everything(terminal: int) -> str:
    """What a terminal without writers shows; a read returns any part of it, and EIO after the last."""
    shown = b""
    with contextlib.suppress(OSError):
        while part := os.read(terminal, 100_000):
            shown += part
    return shown.decode()


def test_a_terminal_has_one_line_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 50, 0, 0))
    with screen_on(theirs) as screen:
        for step in range(1, 200):  # faster than anyone can look
            screen.live(lambda step=step: f"step {step} " + "x" * 80)
        screen.line("saved")
        screen.error("broken")
    os.close(theirs)
    shown = everything(mine).replace("\r\n", "\n")
    os.close(mine)
    parts = shown.split("\r")
    assert parts[1] == "step 1 " + "x" * 42, "cut to one column less than the terminal has"
    assert sum(part.startswith("step ") for part in parts) < 20
    assert re.search(r"\r {49}\rsaved\n\r {49}\rbroken\n$", shown), repr(shown[-200:])


def test_a_screen_that_goes_away_does_not_end_the_run() -> None:
    reader, writer = os.pipe()
    with screen_on(writer) as screen:
        os.close(writer)
        os.close(reader)
        for _ in range(3):
            screen.line("who reads this?")
            screen.at_once("or this?")


def test_one_process_of_a_launch_tells(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    one, same, other = (LastWords(tmp_path, token) for token in "aab")
    assert not one.failed() and not one.interrupted()
    assert [one.claim(), same.claim(75), other.claim()] == [True, False, True]
    assert one.failed() and same.failed() and not same.interrupted()
    console.forget_claims(tmp_path, but="b")
    assert (one.failed(), other.failed()) == (False, True)
    assert LastWords(tmp_path / "no such folder", "a").claim() is True


def test_an_interruption_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    one, other = (LastWords(tmp_path, "a") for _ in range(2))
    assert one.claim(console.INTERRUPTED) and not other.claim(1)
    assert other.interrupted() and not other.failed()


# --- signals --------------------------------------------------------------------------------------------------------


def alone(folder: Path) -> LastWords:
    """Of a launch in which nobody has ended."""
    return LastWords(folder, "alone")


@pytest.fixture
def stop(tmp_path: Path) -> Iterator[StopRequest]:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # ignored, and left so, where the tests run under nohup
    with screen_in(tmp_path / "screen") as screen, StopRequest(screen, alone(tmp_path)) as request:
        yield request
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("number", console.STOPPING)
def test_in_the_loop_a_signal_is_noted(stop: StopRequest, number: signal.Signals, tmp_path: Path) -> None:
    stop.in_loop = True
    os.kill(os.getpid(), number)
    assert stop.asked
    assert (
        tmp_path / "screen"
    ).read_text() == "stopping after this step, with a checkpoint; Ctrl-C again: at once, without\n"


@pytest.mark.parametrize("number", console.STOPPING)
def test_before_the_loop_a_signal_ends_the_run(stop: StopRequest, number: signal.Signals) -> None:
    with pytest.raises(InterruptedRunError, match="before the first step"):
        os.kill(os.getpid(), number)
    assert stop.asked


def test_a_signal_that_a_library_took_for_a_fault_is_still_the_cause(stop: StopRequest) -> None:
    fault = RuntimeError("trying to pop from empty mode stack")
    assert stop.cause(fault) is fault
    with pytest.raises(InterruptedRunError):
        os.kill(os.getpid(), signal.SIGTERM)
    assert isinstance(stop.cause(fault), InterruptedRunError)
    stop.in_loop = True
    assert stop.cause(fault) is fault, "in the loop a signal raises nothing"


def test_repeated_and_late_signals_change_nothing(stop: StopRequest, tmp_path: Path) -> None:
    """torchrun passes a Ctrl-C on that the terminal has sent already; who is about to end needs no telling."""
    stop.in_loop = True
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    stop.over()
    os.kill(os.getpid(), signal.SIGINT)
    assert (tmp_path / "screen").read_text().count("\n") == 1


def test_handlers_are_put_back(stop: StopRequest, tmp_path: Path) -> None:
    mine = signal.getsignal(signal.SIGTERM)
    with StopRequest(stop._screen, alone(tmp_path)):
        assert signal.getsignal(signal.SIGTERM) != mine
    assert signal.getsignal(signal.SIGTERM) == mine


def test_afterwards_no_thread_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(console, "PATIENCE", 0.3)
    monkeypatch.setattr(console.os, "_exit", ended.append)
    with screen_in(tmp_path / "screen") as screen, StopRequest(screen, alone(tmp_path)):
        with pytest.raises(InterruptedRunError):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)  # the watching thread has read it
    time.sleep(0.5)
    assert not ended


HANGING = """
import ctypes, signal, sys
from pathlib import Path
from lora_scale.storage import console
from lora_scale.storage.console import Console, LastWords, StopRequest
console.ECHO, console.PATIENCE = 0.5, 1.0
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with StopRequest(Console(0), LastWords(Path(sys.argv[1]), "a")) as stop:
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, "nohup's wish"
    stop.in_loop = sys.argv[2] == "loop"
    print("ready", flush=True)
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def hanging(run: Path, where: str) -> "subprocess.Popen[bytes]":
    """A process whose main thread runs no handler any more, as in a collective with a rank that is gone."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HANGING, str(run), where]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    time.sleep(0.2)
    return process


def test_a_hanging_rank_ends_when_another_has_failed(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    process = hanging(tmp_path, "loop")
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1.5)
    assert LastWords(tmp_path, "a").claim()
    process.send_signal(signal.SIGTERM)
    assert (process.communicate(timeout=60.0)[0], process.returncode) == (b"", 1)


def test_a_second_ctrl_c_ends_a_hanging_process(tmp_path: Path) -> None:
    process = hanging(tmp_path, "loop")
    process.send_signal(signal.SIGINT)
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60.0)
    assert process.returncode == 130
    assert out == b"lora-scale: stopped with Ctrl-C, without a checkpoint; the same command goes on from the last one\n"


def test_set_up_that_waits_for_other_ranks_can_be_stopped(tmp_path: Path) -> None:
    process = hanging(tmp_path, "set-up")
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60.0)
    assert (out, process.returncode) == (f"lora-scale: {console.TOO_EARLY}\n".encode(), 75)
