"""Starting local ranks through DeepSpeed's own launcher when no launcher started us, and ending them when we are ended.

The `deepspeed` command is two programs: one looks for hosts, the other (`deepspeed.launcher.launch`) starts the ranks
of a host. With one host the first has nothing to do, and a SIGTERM ends it and leaves the ranks running: we start the
second ourselves.
"""

import base64
import contextlib
import ctypes
import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from lora_scale.parallel.launchers import TOKEN
from lora_scale.parallel.network import free_port
from lora_scale.spec.errors import UsageError
from lora_scale.storage.console import ECHO, STOPPING, TOO_EARLY, Console, LastWords

TELLING = (0, 1, 2, 3, 75, 130)  # exit codes of a rank that has said on the screen what there is to say
GRACE = 60.0  # seconds for ranks that outlived a killed launcher to save and end
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def default_ranks() -> int:
    """One rank a visible GPU; one process where there is none."""
    return max(1, torch.cuda.device_count())


def shown(ranks: int, arguments: Sequence[str]) -> str:
    """The equivalent command as a person would type it."""
    return shlex.join(["deepspeed", "--num_gpus", str(ranks), "--module", "lora_scale", *arguments])


def run(ranks: int, arguments: Sequence[str], run_dir: Path) -> int:
    """Run `lora-scale ARGUMENTS` on `ranks` local ranks; their exit code. What the launcher says goes to a log."""
    gpus = torch.cuda.device_count()
    if gpus and ranks > gpus:
        raise UsageError(f"--ranks is {ranks}, but {gpus} GPUs are visible; use at most {gpus}")
    token, log = secrets.token_hex(8), run_dir / "log" / "launcher.txt"
    with log.open("ab") as chatter:
        launcher = subprocess.Popen(
            _command(ranks, gpus, arguments),
            env=_environment(ranks, gpus) | {TOKEN: token},
            stderr=chatter,
            process_group=0,  # Ctrl-C is ours to pass on: the launcher gives ranks 30 s and forgets their exit code
            preexec_fn=_end_with_parent,
        )
    with _Forward(launcher.pid) as stop:
        code = launcher.wait()
        _end_leftovers(launcher.pid)
    if stop.killed:
        _say("lora-scale: killed with Ctrl-C; the same command goes on from the last checkpoint")
        return 130
    if code == 0 or not LastWords(run_dir, token).claim():  # a rank has told
        return code if code in TELLING else 1
    if stop.asked:  # before the ranks could listen to signals
        _say(f"lora-scale: {TOO_EARLY}")
        return 75
    _say(f"lora-scale: error: a rank {_end_of(code)} and could not say why\n  log: {log.parent}")
    return 1


def _say(text: str) -> None:
    with closing(Console(0)) as screen:
        screen.error(text)


def _end_of(code: int) -> str:
    """How a rank ended, by the launcher's exit code: 256 - n for signal n; the launcher's own end is -n."""
    number = -code if code < 0 else 256 - code
    if number not in set(signal.Signals):
        return f"ended with code {code}"
    out_of_memory = ", often the kernel's when memory is short (see dmesg)" if number == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(number).name}{out_of_memory}"


def _command(ranks: int, gpus: int, arguments: Sequence[str]) -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if gpus else None
    devices: list[Any] = visible.split(",")[:ranks] if visible else list(range(ranks))
    hosts = base64.urlsafe_b64encode(json.dumps({"localhost": devices}).encode()).decode()
    launch = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", "--log_level", "critical", "--no_local_rank"]
    return [*launch, f"--world_info={hosts}", f"--master_port={free_port()}", "--module", "lora_scale", *arguments]


def _environment(ranks: int, gpus: int) -> dict[str, str]:
    env = dict(os.environ)
    if not gpus:  # unnamed, it is looked for and not found, with a warning; and threads of all ranks would fight
        env.setdefault("DS_ACCELERATOR", "cpu")
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    return env


def _end_with_parent() -> None:
    """In the launcher, before it runs: it is to get a SIGTERM when this process is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


class _Forward:
    """While the ranks run: the first signal asks them to save and stop, a second Ctrl-C kills them."""

    def __init__(self, launcher: int):
        self.asked = self.killed = False
        self._launcher, self._since = launcher, 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_Forward":
        for number in STOPPING:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup ignores SIGHUP
                self._before[number] = signal.signal(number, self._pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, _frame: object) -> None:
        now = time.monotonic()
        if not self.asked:
            self.asked, self._since = True, now
            ranks = [pid for pid, parent, _ in _processes() if parent == self._launcher]
            for pid in ranks or [self._launcher]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
        elif number == signal.SIGINT and now - self._since > ECHO:
            self.killed = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._launcher, signal.SIGKILL)


def _end_leftovers(group: int) -> None:
    """Nothing of the launcher's process group outlives this call; normally there is nothing left."""
    deadline = time.monotonic() + GRACE
    asked = False
    while left := [pid for pid, _, its_group in _processes() if its_group == group]:
        number = signal.SIGKILL if time.monotonic() > deadline else signal.SIGTERM
        for pid in left if number == signal.SIGKILL or not asked else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        asked = True
        time.sleep(0.2)


def _processes() -> Iterator[tuple[int, int, int]]:
    """(process, parent, process group) of everything that runs; the dead that nobody has waited for are left out."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                state, parent, group, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # gone meanwhile
                continue
            if state != "Z":
                yield int(folder.name), int(parent), int(group)
