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
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from lora_scale.parallel import pulse, starters, verdict
from lora_scale.parallel.starters import Command, Reach
from lora_scale.parallel.verdict import CONSEQUENCE, Ended, Facts, Outcome, RankSeen, Swept
from lora_scale.spec import hosts as host_list
from lora_scale.spec.hosts import Host

SETTLE = 3.0  # seconds after the first sign of trouble in which others may say more
DEATH = 4.0  # more of them, where a launcher has yet to tell how a silent rank ended
LATE = 5.0  # times the patience: by then every rank has started, from a slow file system too
SWEEP_SECONDS = 20.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_FROM_PDSH = re.compile(r"^(?P<host>[\w.@-]+): (?P<rest>.*)$")
_LOST_HOST = re.compile(r"^pdsh@\S+?: (?P<host>\S+?): (?:ssh|rcmd).* exit(?:ed with exit)? code (?P<code>\d+)")
_CHATTER = re.compile(r"^\[\d{4}-\d\d-\d\d|^pdsh@|^srun: |^slurmstepd|^-{10,}$|^\*{10,}$|^[EWI]\d{4} ")

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
# The step of this launch, by its name; other steps of the same allocation are not touched.
SWEEP_SLURM = r"""
token=$1; action=$2
mine() { squeue -h -s -j "$SLURM_JOB_ID" -o '%i %j' | sed -n "s/ lora-scale-$token\$//p"; }
[ "$action" = stop ] && { for s in $(mine); do scancel -s TERM "$s"; done; exit 0; }
[ "$action" = stacks ] && { for s in $(mine); do scancel -s USR2 "$s"; done; sleep 0.5; }
n=0
while [ -n "$(mine)" ] && [ $n -lt 50 ]; do scancel -s KILL $(mine) 2>/dev/null; sleep 0.3; n=$((n + 1)); done
echo "left $(mine | wc -l)"
"""


class Supervisor:
    """One attempt: starts the commands, listens, and ends everything. `say` shows a line to the person."""

    def __init__(
        self,
        commands: Sequence[Command],
        hosts: Sequence[Host],
        mine: Sequence[str],
        token: str,
        patience: float,
        reach: Reach,
        chatter: Path,
        say: Callable[[str], None],
    ):
        self._commands, self._hosts, self._token, self._patience = commands, hosts, token, patience
        self._mine = set(mine)  # hosts whose ranks this supervisor sees: with no_ssh its own only
        self._reach, self._chatter, self._say = reach, chatter, say
        self._size = sum(host.slots for host in hosts if host.name in self._mine)
        self._ranks: dict[int, RankSeen] = {}
        self._lines: queue.Queue[tuple[int, str]] = queue.Queue()
        self._processes: list[subprocess.Popen[str]] = []
        self._lost: dict[str, str] = {}  # host: its launcher's last words
        self._last: dict[int, str] = {}  # process: its last line
        self._stops, self._stopped_at = 0, 0.0
        self._first = 0.0  # when the first rank was heard

    def stop(self, *_: object) -> None:
        """A signal handler: ask the ranks to save and end; the second time, at once."""
        self._stops += 1

    def run(self) -> Outcome:
        with self._chatter.open("a", encoding="utf-8") as log:
            try:
                for number, command in enumerate(self._commands):
                    self._start(number, command)
                trouble = self._listen(log)
            finally:
                began = time.monotonic()
                codes = [process.poll() or 0 for process in self._processes]  # before our own kills change them
                swept = self._end_all()
        ends = [Ended(self._commands[n].host, code, self._last.get(n, "")) for n, code in enumerate(codes)]
        facts = Facts(self._hosts, self._mine, self._ranks, swept, ends, self._lost, self._stops, trouble is not None)
        outcome = verdict.judge(facts)
        took = time.monotonic() - (trouble or began)
        left = {name: found.left for name, found in swept.items() if found.left}
        line = outcome.line + "".join(f"; {count} processes are left on {name}" for name, count in left.items())
        return replace(outcome, line=line, seconds=took)

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
            or bool(self._first and len(self._ranks) < self._size and now - self._first > LATE * self._patience)
            or bool(self._stopped_at and now - self._stopped_at > 2 * self._patience)
        )

    def _unexplained(self, running: Sequence[subprocess.Popen[str]]) -> bool:
        """Whether only consequences have been told so far, and a launcher may yet tell the cause."""
        told = [seen for seen in self._ranks.values() if seen.code not in (None, 0, 75) or seen.hung]
        return len(running) == len(self._processes) and all(CONSEQUENCE.search(seen.text) for seen in told)

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
        self._first = self._first or now
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
        """On every host at once; without ssh, by Slurm or on this host."""
        if self._reach != "ssh":
            found = sweep(("sh", "-s", self._token, action), SWEEP if self._reach == "here" else SWEEP_SLURM)
            return dict.fromkeys(self._mine, found)
        return sweep_all(self._hosts, self._token, action)


def sweep_all(hosts: Sequence[Host], token: str, action: str) -> dict[str, Swept]:
    """What is left of a launch on each host, asked and ended by ssh."""
    with ThreadPoolExecutor(len(hosts)) as pool:
        ways = [(*starters.SSH, host.name, f"sh -s {token} {action}") for host in hosts]
        return dict(zip((host.name for host in hosts), pool.map(sweep, ways), strict=True))


def sweep(way: Sequence[str], script: str = SWEEP) -> Swept:
    """Run the sweep through `way`; the ssh that a host does not answer is no error."""
    try:
        done = subprocess.run(way, input=script, capture_output=True, text=True, timeout=SWEEP_SECONDS)
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
