"""Why a launch ended, from what was heard of its ranks and found on its hosts: one line that names rank, host, step
and cause. Pure: starts, reads and ends nothing."""

import re
import signal
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from lora_scale.spec import hosts as host_list
from lora_scale.spec.hosts import Host

# A rank that lost its connection to another says so: that is what followed, not what came first.
CONSEQUENCE = re.compile(
    r"gloo|nccl|connection (reset|closed|refused)|broken pipe|DistBackend|DistNetwork|timed out", re.I
)
BY_USER = (2, 3, 4)  # exit codes of mistakes: the same command would fail again


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


@dataclass(frozen=True)
class Ended:
    """A process of ours: the host it stood for, its exit code, the last line it wrote."""

    host: str | None
    code: int
    last: str


@dataclass(frozen=True)
class Facts:
    """Everything known at the end of an attempt."""

    hosts: Sequence[Host]
    mine: Set[str]  # names of those whose ranks are heard
    ranks: Mapping[int, RankSeen]
    swept: Mapping[str, Swept]
    ended: Sequence[Ended]
    lost: Mapping[str, str]  # host: what its launcher said of it
    stops: int  # how often a person asked to stop
    trouble: bool  # seen before the launchers were over

    @property
    def size(self) -> int:
        return sum(host.slots for host in self.hosts if host.name in self.mine)


def judge(facts: Facts) -> Outcome:
    """Success is only what every rank has said itself."""
    ends = {rank: seen for rank, seen in facts.ranks.items() if seen.code is not None}
    codes = {seen.code for seen in ends.values()}
    if facts.stops > 1:
        return Outcome(130, "killed with Ctrl-C; the same command goes on from the last checkpoint", False)
    if len(ends) == facts.size and codes == {0}:
        return Outcome(0, "", False)
    if len(ends) == facts.size and codes <= {0, 75}:
        text = next(seen.text for seen in ends.values() if seen.code == 75)
        return Outcome(75, _plain(text), False)
    if by_user := [seen for seen in ends.values() if seen.code in BY_USER]:
        return Outcome(by_user[0].code or 2, _plain(by_user[0].text), False)
    return Outcome(1, cause(facts), True)


def cause(facts: Facts) -> str:
    """Rank, host, step and cause, as far as they are known."""
    ranks = facts.ranks
    if dark := [name for name, found in facts.swept.items() if not found.reachable]:
        there = sorted(rank for rank, seen in ranks.items() if seen.host in dark)
        named = f" (rank{'s' * (len(there) > 1)} {', '.join(map(str, there))})" if there else ""
        return f"{' and '.join(dark)}{named}{_at(facts)}: does not answer any more; switched off, or cut off"
    told = [(rank, seen) for rank, seen in ranks.items() if seen.code not in (None, 0, 75)]
    if first := next(((r, s) for r, s in told if not CONSEQUENCE.search(s.text)), None):
        return f"{_who(*first)}: {_plain(first[1].text)}"
    silent = {rank: seen for rank, seen in sorted(ranks.items()) if seen.code is None and not seen.hung}
    states = {rank: state for found in facts.swept.values() for rank, state in found.states.items()}
    if stopped := [rank for rank in silent if states.get(rank) in ("T", "t")]:
        return f"{_who(stopped[0], silent[stopped[0]])}: is stopped (SIGSTOP, or a debugger); the others wait for it"
    if hung := {rank: seen for rank, seen in ranks.items() if seen.hung}:
        return _hang(hung, silent)
    quiet = sorted(set(range(host_list.size(facts.hosts))) - ranks.keys())
    if quiet and len(facts.mine) == len(facts.hosts) and not facts.lost and not any(p.code > 0 for p in facts.ended):
        return f"rank {quiet[0]} on {host_list.of_rank(facts.hosts, quiet[0])}: never started, and nothing says why"
    if gone := [rank for rank in silent if rank not in states]:
        return f"{_who(gone[0], silent[gone[0]])}: {_death(facts, silent[gone[0]].host)}"
    if facts.lost or any(process.code > 0 for process in facts.ended):
        return _launcher(facts)
    if silent:
        rank = min(silent, key=lambda r: silent[r].at)
        return f"{_who(rank, silent[rank])}: gives no sign of life, though its process is there"
    return _launcher(facts)


def _hang(hung: Mapping[int, RankSeen], silent: Mapping[int, RankSeen]) -> str:
    """The rank that is elsewhere than the others is the one they wait for."""
    stacks = "stacks of all ranks are in the log folder"
    if silent:
        rank = min(silent)
        return f"{_who(rank, silent[rank])}: the step hangs, and it does not say where; {stacks}"
    places = Counter(_place(seen) for seen in hung.values())
    rank = min(hung, key=lambda r: ("distributed" in hung[r].hung, places[_place(hung[r])], r))
    return f"{_who(rank, hung[rank])}: the step hangs in {hung[rank].hung}; {stacks}"


def _place(seen: RankSeen) -> str:
    return seen.hung.partition(" for ")[0]


def _death(facts: Facts, host: str) -> str:
    """How a rank ended that has no last words, by the exit code of what started it."""
    for process in facts.ended:
        code = process.code
        if process.host in (host, None) and code > 128 and code != 255:
            number = 256 - code if code > 192 else code - 128
            if number in set(signal.Signals):
                memory = ", often the kernel's when memory is short (dmesg there)" if number == signal.SIGKILL else ""
                return f"was killed by {signal.Signals(number).name}{memory}"
    said = f" ({facts.lost[host]})" if host in facts.lost else ""
    return f"ended without a word{said}: killed, often by the kernel when memory is short (dmesg there)"


def _launcher(facts: Facts) -> str:
    """What the launcher itself had to say, where no rank has."""
    for process in facts.ended:
        if process.code > 0:
            why = _plain(process.last) or f"exit code {process.code}"
            if process.code == 255 and process.host:
                why = f"the ssh connection to it ended ({why})"
            return f"{process.host or 'the launcher'}{_at(facts)}: {why}"
    for host, why in facts.lost.items():
        return f"{host}{_at(facts)}: the launcher lost it ({why})"
    return "the launcher ended without an error before every rank had finished"


def _at(facts: Facts) -> str:
    step = max((seen.step for seen in facts.ranks.values()), default=0)
    return f", step {step}" if step else ""


def _who(rank: int, seen: RankSeen) -> str:
    where = f"step {seen.step}" if seen.step else seen.phase
    return f"rank {rank} on {seen.host}, {where}"


def _plain(text: str) -> str:
    """A rank's words without the program's name, which the last line gets again."""
    lines = [line.removeprefix("lora-scale: ").removeprefix("error: ") for line in text.splitlines()]
    return "\n".join(lines)
