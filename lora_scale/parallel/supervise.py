"""Watches the ranks of one launch from outside: what ended the job, on which host, at which step; and leaves nothing
running on any host.

Launchers' own words are not trusted: pdsh waits for ever for the hosts that are left, and several end with 0 after a
failure. A launch has succeeded when every rank has said so (`parallel.pulse`). Only processes that carry this launch's
token are ended. No torch.
"""

import contextlib
import ctypes
import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lora_scale.parallel import pulse, starters
from lora_scale.parallel.starters import Command
from lora_scale.spec import hosts as host_list
from lora_scale.spec.hosts import Host

SETTLE = 3.0  # seconds after the first sign of trouble in which others may say more
DEATH = 4.0  # more of them, where a launcher has yet to tell how a silent rank ended
SWEEP_SECONDS = 20.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_FROM_PDSH = re.compile(r"^(?P<host>[\w.@-]+): (?P<rest>.*)$")
_LOST_HOST = re.compile(r"^pdsh@\S+?: (?P<host>\S+?): (?:ssh|rcmd).* exit(?:ed with exit)? code (?P<code>\d+)")
_CHATTER = re.compile(r"^\[\d{4}-\d\d-\d\d|^pdsh@|^srun: |^slurmstepd|^-{10,}$|^\*{10,}$|^[EWI]\d{4} ")
# A rank that lost its connection to another says so: that is what followed, not what came first.
_CONSEQUENCE = re.compile(
    r"gloo|nccl|connection (reset|closed|refused)|broken pipe|DistBackend|DistNetwork|timed out", re.I
)

SWEEP = r"""
token=$1; action=$2
mine() { grep -lzx "LORA_SCALE_LAUNCH=$token" /proc/[0-9]*/environ 2>/dev/null | cut -d/ -f3; }
rank_of() { tr '\0' '\n' 2>/dev/null <"/proc/$1/environ" |
  sed -n 's/^\(RANK\|OMPI_COMM_WORLD_RANK\|PMI_RANK\|SLURM_PROCID\)=//p' | head -n 1; }
for p in $(mine); do
  r=$(rank_of $p)
  [ -n "$r" ] && echo "rank $r $(sed 's/.*) \(.\).*/\1/' /proc/$p/stat 2>/dev/null)"
  [ -n "$r" ] && [ "$action" = stop ] && kill -TERM $p 2>/dev/null
  [ -n "$r" ] && [ "$action" = stacks ] && kill -USR2 $p 2>/dev/null
done
[ "$action" = stop ] && exit 0
[ "$action" = stacks ] && sleep 0.5
n=0
while [ -n "$(mine)" ] && [ $n -lt 50 ]; do kill -KILL $(mine) 2>/dev/null; sleep 0.1; n=$((n + 1)); done
echo "left $(mine | wc -l)"
"""


@dataclass
class RankSeen:
    """What has been heard of a rank."""

    host: str
    at: float
    step: int = 0
    phase: str = ""
    code: int | None = None  # with its last words
    text: str = ""
    hung: str = ""  # where


@dataclass(frozen=True)
class Swept:
    """What a sweep found on a host: state of each rank by the kernel's letter, and processes that outlived it."""

    reachable: bool
    states: dict[int, str] = field(default_factory=dict)
    left: int = 0


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended. `again`: whether the same command may go better."""

    code: int
    line: str
    again: bool
    seconds: float = 0.0  # from the first sign of trouble to an end on all hosts


class Supervisor:
    """One attempt: starts the commands, listens, and ends everything. `say` shows a line to the person."""

    def __init__(
        self,
        commands: Sequence[Command],
        hosts: Sequence[Host],
        mine: Sequence[str],
        token: str,
        patience: float,
        by_ssh: bool,
        chatter: Path,
        say: Callable[[str], None],
    ):
        self._commands, self._hosts, self._token, self._patience = commands, hosts, token, patience
        self._mine = set(mine)  # hosts whose ranks this supervisor sees: with no_ssh its own only
        self._by_ssh, self._chatter, self._say = by_ssh, chatter, say
        self._size = sum(host.slots for host in hosts if host.name in self._mine)
        self._ranks: dict[int, RankSeen] = {}
        self._lines: queue.Queue[tuple[int, str]] = queue.Queue()
        self._processes: list[subprocess.Popen[str]] = []
        self._lost: dict[str, str] = {}  # host: its launcher's last words
        self._last: dict[int, str] = {}  # process: its last line
        self._stops, self._stopped_at = 0, 0.0

    def stop(self, *_: object) -> None:
        """A signal handler: ask the ranks to save and end; the second time, at once."""
        self._stops += 1

    def run(self) -> Outcome:
        self._begun = time.monotonic()
        with self._chatter.open("a", encoding="utf-8") as log:
            try:
                for number, command in enumerate(self._commands):
                    self._start(number, command)
                trouble = self._listen(log)
            finally:
                began = time.monotonic()
                swept = self._end_all()
        outcome = self._judge(swept, trouble)
        took = time.monotonic() - (trouble or began)
        left = {name: found.left for name, found in swept.items() if found.left}
        line = outcome.line + "".join(f"; {count} processes are left on {name}" for name, count in left.items())
        return Outcome(outcome.code, line, outcome.again, took)

    def _start(self, number: int, command: Command) -> None:
        process = subprocess.Popen(
            command.argv,
            env=dict(command.env),
            stdin=subprocess.PIPE if command.stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is ours to pass on
            preexec_fn=_end_with_parent,
        )
        if process.stdin:
            with contextlib.suppress(OSError):
                process.stdin.write(command.stdin)
                process.stdin.flush()  # and stays open: the ranks may look at it
        self._processes.append(process)
        threading.Thread(target=self._read, args=(number, process), daemon=True).start()

    def _read(self, number: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        for line in process.stdout:
            self._lines.put((number, line.rstrip("\n")))

    def _listen(self, log: IO[str]) -> float | None:
        """Until everything is over or must be; the moment of the first sign of trouble, if there was one."""
        trouble: float | None = None
        told_at, over_at = 0.0, 0.0
        while True:
            self._hear(log)
            now = time.monotonic()
            running = [process for process in self._processes if process.poll() is None]
            if self._stops and not told_at:
                told_at = self._stopped_at = now
                self._say("stopping after this step, with a checkpoint; Ctrl-C again: at once, without")
                self._sweep("stop")
            if self._stops > 1 and now - told_at > 2.0:
                return trouble
            said = [seen for seen in self._ranks.values() if seen.code is not None]
            if len(said) == self._size and all(seen.code in (0, 75) for seen in said):
                over_at = over_at or now
            if not running or (over_at and now - over_at > self._patience / 4):
                self._hear(log)
                return trouble or (None if over_at else now)
            if trouble is None and not over_at and self._in_trouble(now):
                trouble = now
            if trouble and now - trouble > SETTLE + (DEATH if self._unexplained(running) else 0.0):
                return trouble

    def _in_trouble(self, now: float) -> bool:
        silence = self._patience / 2
        return (
            any(seen.code not in (None, 0, 75) or seen.hung for seen in self._ranks.values())
            or any(process.poll() for process in self._processes)
            or bool(self._lost)
            or any(now - seen.at > silence for seen in self._ranks.values() if seen.code is None)
            or bool(self._stopped_at and now - self._stopped_at > 2 * self._patience)
        )

    def _unexplained(self, running: Sequence[subprocess.Popen[str]]) -> bool:
        """Whether only consequences have been told so far, and a launcher may yet tell the cause."""
        told = [seen for seen in self._ranks.values() if seen.code not in (None, 0, 75) or seen.hung]
        return len(running) == len(self._processes) and all(_CONSEQUENCE.search(seen.text) for seen in told)

    def _hear(self, log: IO[str]) -> None:
        """Take in what was said, for a moment."""
        with contextlib.suppress(queue.Empty):
            number, line = self._lines.get(timeout=0.2)
            while True:
                self._take(number, line, log)
                number, line = self._lines.get_nowait()
        log.flush()

    def _take(self, number: int, line: str, log: IO[str]) -> None:
        if (told := pulse.read(line)) is not None:
            self._note(told)
            return
        if lost := _LOST_HOST.match(line):
            self._lost.setdefault(lost["host"], f"exit code {lost['code']}")
        where = self._commands[number].host
        from_host = _FROM_PDSH.match(line) if where is None else None
        if from_host and any(host.name == from_host["host"] for host in self._hosts):
            line = from_host["rest"]
        log.write(f"{where or 'launcher'}: {line}\n")
        if line.strip() and not _CHATTER.match(line):
            self._last[number] = line.strip()
            if 0 in self._ranks and self._ranks[0].code is None and not self._lost:
                self._say(line)

    def _note(self, told: dict[str, Any]) -> None:
        rank = told["rank"]
        now = time.monotonic()
        name = host_list.of_rank(self._hosts, rank) or told.get("host", "?")
        seen = self._ranks.setdefault(rank, RankSeen(name, now))
        seen.at, seen.step, seen.phase = now, told.get("step", 0), told.get("phase", "")
        if told["event"] == "end":
            seen.code, seen.text = told.get("code", 1), told.get("text", "")
        if told["event"] == "hung":
            seen.hung = f"{told.get('where', '?')} for {told.get('seconds', 0)} s"

    def _end_all(self) -> dict[str, Swept]:
        """End our own processes, then everything of this launch on every host."""
        running = any(process.poll() is None for process in self._processes)
        swept = self._sweep("stacks" if running else "kill")
        for process in self._processes:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return swept

    def _sweep(self, action: str) -> dict[str, Swept]:
        """On every host at once; without ssh, on this host."""
        if not self._by_ssh:
            found = sweep(("sh", "-s", self._token, action))
            return dict.fromkeys(self._mine, found)
        with ThreadPoolExecutor(len(self._hosts)) as pool:
            ways = [(*starters.SSH, host.name, f"sh -s {self._token} {action}") for host in self._hosts]
            return dict(zip((host.name for host in self._hosts), pool.map(sweep, ways), strict=True))

    def _judge(self, swept: dict[str, Swept], trouble: float | None) -> Outcome:
        ends = {rank: seen for rank, seen in self._ranks.items() if seen.code is not None}
        codes = {seen.code for seen in ends.values()}
        if self._stops > 1:
            return Outcome(130, "killed with Ctrl-C; the same command goes on from the last checkpoint", False)
        if len(ends) == self._size and codes == {0}:
            return Outcome(0, "", False)
        if len(ends) == self._size and codes <= {0, 75}:
            text = next(seen.text for seen in ends.values() if seen.code == 75)
            return Outcome(75, text.removeprefix("lora-scale: "), False)
        by_user = [seen for seen in ends.values() if seen.code in (2, 3, 4)]
        if by_user:
            return Outcome(by_user[0].code or 2, _plain(by_user[0].text), False)
        return Outcome(1, self._cause(swept, trouble), True)

    def _cause(self, swept: dict[str, Swept], trouble: float | None) -> str:
        """One line: rank, host, step and cause, as far as they are known."""
        dark = [name for name, found in swept.items() if not found.reachable]
        if dark:
            ranks = [rank for rank, seen in self._ranks.items() if seen.host in dark]
            return f"{' and '.join(dark)}{_ranks(ranks)} does not answer any more{self._at()}: switched off, or cut off"
        open_words = {r: s for r, s in self._ranks.items() if s.code is None and not s.hung}
        told = [(rank, seen) for rank, seen in self._ranks.items() if seen.code not in (None, 0, 75)]
        first = next(((r, s) for r, s in told if not _CONSEQUENCE.search(s.text)), None)
        if first:
            return f"{_who(*first)}: {_plain(first[1].text)}"
        states = {rank: state for found in swept.values() for rank, state in found.states.items()}
        if stopped := [rank for rank in open_words if states.get(rank) in ("T", "t")]:
            rank = stopped[0]
            return f"{_who(rank, open_words[rank])}: is stopped (SIGSTOP, or a debugger), and the others wait for it"
        if hung := {rank: seen for rank, seen in self._ranks.items() if seen.hung}:
            return self._hang(hung, open_words)
        if gone := [rank for rank in sorted(open_words) if rank not in states or trouble is None]:
            rank = gone[0]
            return f"{_who(rank, open_words[rank])}: {self._death(open_words[rank].host)}"
        if self._lost or any(process.poll() for process in self._processes):
            return self._launcher_said()
        if open_words:
            rank = max(open_words, key=lambda r: time.monotonic() - open_words[r].at)
            return f"{_who(rank, open_words[rank])}: gives no sign of life, though its process is there"
        return self._launcher_said()

    def _hang(self, hung: dict[int, RankSeen], silent: dict[int, RankSeen]) -> str:
        """The rank that is elsewhere than the others is the one they wait for."""
        places = Counter(seen.hung.partition(" for ")[0] for seen in hung.values())
        rank = min(hung, key=lambda r: (places[hung[r].hung.partition(" for ")[0]], "distributed" in hung[r].hung))
        odd = {**hung, **silent}
        if silent:
            rank = min(silent)
            return f"{_who(rank, odd[rank])}: the step hangs, and it does not say where; stacks in the log folder"
        return f"{_who(rank, hung[rank])}: the step hangs in {hung[rank].hung}; stacks of all ranks in the log folder"

    def _death(self, host: str) -> str:
        """How a rank ended that has no last words, by the code of what started it."""
        for command, process in zip(self._commands, self._processes, strict=True):
            code = process.returncode
            if command.host in (host, None) and code and code > 128 and code != 255:
                number = 256 - code if code > 192 else code - 128
                if number in set(signal.Signals):
                    memory = ", often the kernel's when memory is short (dmesg there)" if number == 9 else ""
                    return f"was killed by {signal.Signals(number).name}{memory}"
        if said := self._lost.get(host):
            return f"ended without a word ({said})"
        return "ended without a word: killed, often by the kernel when memory is short (dmesg there)"

    def _launcher_said(self) -> str:
        for number, (command, process) in enumerate(zip(self._commands, self._processes, strict=True)):
            if process.returncode and process.returncode > 0:
                why = self._last.get(number, f"exit code {process.returncode}")
                if process.returncode == 255 and command.host:
                    why = f"the ssh connection ended ({why})"
                return f"{command.host or 'the launcher'}{self._at()}: {why}"
        for host, why in self._lost.items():
            return f"{host}{self._at()}: the launcher lost it ({why})"
        quiet = sorted(set(range(host_list.size(self._hosts))) - self._ranks.keys())
        if quiet and len(self._mine) == len(self._hosts):
            name = host_list.of_rank(self._hosts, quiet[0])
            return f"rank {quiet[0]} on {name}: never started, though the launcher ended without an error"
        return "the launcher ended before the ranks had finished, without an error"

    def _at(self) -> str:
        step = max((seen.step for seen in self._ranks.values()), default=0)
        return f", step {step}" if step else ""


def sweep(way: Sequence[str]) -> Swept:
    """Run the sweep through `way`; the ssh that a host does not answer is no error."""
    try:
        done = subprocess.run(way, input=SWEEP, capture_output=True, text=True, timeout=SWEEP_SECONDS)
    except subprocess.TimeoutExpired:
        return Swept(False)
    if done.returncode == 255:
        return Swept(False)
    lines = [line.split() for line in done.stdout.splitlines()]
    states = {int(line[1]): line[2] for line in lines if len(line) == 3 and line[0] == "rank" and line[1].isdecimal()}
    left = next((int(line[1]) for line in lines if len(line) == 2 and line[0] == "left"), 0)
    return Swept(True, states, left)


def _end_with_parent() -> None:
    """In a child, before it runs: it ends when this process is killed; then ranks find their pipe broken."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _who(rank: int, seen: RankSeen) -> str:
    where = f"step {seen.step}" if seen.step else seen.phase
    return f"rank {rank} on {seen.host}, {where}"


def _ranks(ranks: Sequence[int]) -> str:
    return f" (rank{'s' * (len(ranks) > 1)} {', '.join(map(str, sorted(ranks)))})" if ranks else ""


def _plain(text: str) -> str:
    """A rank's words without the program's name, which the last line gets again."""
    lines = [line.removeprefix("lora-scale: ").removeprefix("error: ") for line in text.splitlines()]
    return "\n".join(lines)
