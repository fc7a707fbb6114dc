"""The hosts of a job, as DeepSpeed's hostfiles name them: a line a host, `node-a slots=8`. Reads text, asks no
network."""

import re
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from lora_scale.spec.errors import ConfigError

# A name begins with a letter or digit: one that begins with a dash would be an option of ssh, which can run programs.
_NAME = re.compile(r"(?:[A-Za-z0-9_][\w.-]*@)?[A-Za-z0-9][\w.-]*")
_PATH = re.compile(r"/[\w@%+=:,./-]*")
FIELDS = ("slots", "python", "dir")
MAX_SLOTS = 1024


@dataclass(frozen=True, slots=True)
class Host:
    """One line. `python` and `folder` are for a host whose environment or tree lies elsewhere than on the first."""

    name: str
    slots: int  # ranks to start there
    python: str | None = None
    folder: str | None = None


def read(path: Path) -> tuple[Host, ...]:
    """The hosts in their order. Every line that cannot be meant is named in one ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; a hostfile has a line a host: node-a slots=8") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a hostfile: {error}") from None
    hosts: list[Host] = []
    errors = []
    for number, line in enumerate(text.splitlines(), start=1):
        if words := line.partition("#")[0].split():
            try:
                hosts.append(_host(words, hosts))
            except ConfigError as error:
                errors.append(f"{path}, line {number}: {error}")
    if not hosts and not errors:
        errors.append(f"{path} names no host; a hostfile has a line a host: node-a slots=8")
    if errors:
        raise ConfigError("\n".join(errors))
    return tuple(hosts)


def _host(words: Sequence[str], before: Sequence[Host]) -> Host:
    name, *fields = words
    if not _NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is no name of a host; expected like node-a slots=8")
    if any(host.name == name for host in before):
        raise ConfigError(f"{name} stands twice; give each host one line with all its slots")
    found: dict[str, str] = {}
    for word in fields:
        key, equals, value = word.partition("=")
        if key not in FIELDS or not equals:
            close = get_close_matches(key, FIELDS, n=1, cutoff=0.5)
            meant = f"did you mean {close[0]}=...?" if close else f"expected {'=, '.join(FIELDS)}="
            raise ConfigError(f"{word!r} is not understood; {meant}")
        if key in found:
            raise ConfigError(f"{key} is given twice for {name}")
        if key != "slots" and not _PATH.fullmatch(value):
            raise ConfigError(f"{key}={value} must be a whole path, of letters, digits and _ @ % + = : , . / -")
        found[key] = value
    slots = found.get("slots")
    if slots is None:
        raise ConfigError(f"{name} has no slots=N, the number of ranks (GPUs) there")
    if not slots.isdecimal() or not 1 <= int(slots) <= MAX_SLOTS:
        raise ConfigError(f"slots={slots} of {name}; expected a number from 1 to {MAX_SLOTS}")
    return Host(name, int(slots), found.get("python"), found.get("dir"))


def size(hosts: Sequence[Host]) -> int:
    """Ranks in all."""
    return sum(host.slots for host in hosts)


def without(hosts: Sequence[Host], away: Set[str], at_least: int, suits: Callable[[int], bool]) -> tuple[Host, ...]:
    """The most of the hosts that are not away, from the first on, whose number of ranks suits; none where those are
    fewer than `at_least`."""
    there = [host for host in hosts if host.name not in away]
    counts = range(len(there), at_least - 1, -1)
    return next((tuple(there[:count]) for count in counts if suits(size(there[:count]))), ())


def of_rank(hosts: Sequence[Host], rank: int) -> str | None:
    """Name of the host on which a rank runs: ranks fill the hosts in their order."""
    for host in hosts:
        if rank < host.slots:
            return host.name
        rank -= host.slots
    return None
