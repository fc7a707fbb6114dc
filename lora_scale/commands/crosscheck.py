"""What the answers of several hosts say together: each finding names the host and the cure. No verb itself.

`launch` stops at what would end the job or spoil its result; `doctor --hostfile` tells everything.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lora_scale.spec.hosts import Host

GIB = 1 << 30
LITTLE_SPACE = 2 * GIB
FEW_FILES = 1024
SMALL_SHARED = {True: GIB // 2, False: 64 << 20}  # with GPUs, NCCL's buffers
CLOCK_SECONDS = 5.0  # an answer takes some tenths of a second to come back
SSH_CURES = {  # what ssh says: what to do
    r"Could not resolve hostname|Name or service not known|not known": "correct the name in the hostfile",
    r"Host key verification failed|HOST IDENTIFICATION": "its key is not the known one: if that is right, "
    "ssh-keygen -R {host}, then ssh {host} once",
    r"Permission denied": "it wants a password or another key: ssh-copy-id {host}",
    r"Connection refused": "no sshd is running there, or on another port (Port in ~/.ssh/config)",
    r"No route|timed out|no answer|Connection (closed|reset)": "is it switched on, and on this network?",
    r"FileNotFoundError": "this folder is not there: share it, copy it, or write dir=... in the hostfile",
    r"not found|No such file or directory|cannot execute": "no such Python there: "
    "install the environment under the same path, or write {host} slots=N python=/path/to/python in the hostfile",
    r"No module named": "another environment there, or another folder: python=... and dir=... in the hostfile",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line. `blocks`: a job would fail, or train on something else than meant."""

    name: str
    host: str
    status: Literal["ok", "note", "finding"]
    detail: str
    cure: str = ""
    blocks: bool = False

    def __str__(self) -> str:
        return f"{self.host}: {self.detail}{'; ' if self.cure else ''}{self.cure}"


def of_facts(hosts: Sequence[Host], answers: Sequence[dict[str, Any]]) -> Iterator[Finding]:
    """Everything that `hostcheck.look` on every host has told."""
    reached = [(host, facts) for host, facts in zip(hosts, answers, strict=True) if "error" not in facts]
    for host, facts in zip(hosts, answers, strict=True):
        if "error" in facts:
            yield Finding("reachable", host.name, "finding", facts["error"], _cure_of(facts["error"], host.name), True)
    if not reached:
        return
    if len(reached) == len(hosts):
        yield Finding("reachable", "all hosts", "ok", f"{len(hosts)}, without a password")
    yield from _once(reached)
    yield from _alike(reached)
    for host, facts in reached:
        yield from _of_one(host, facts, is_first=host is hosts[0])
    yield from _names(reached, hosts[0])


def _cure_of(error: str, host: str) -> str:
    found = (cure for pattern, cure in SSH_CURES.items() if re.search(pattern, error))
    return next(found, f"see what `ssh {host} true` says").format(host=host)


def _once(reached: Sequence[tuple[Host, dict[str, Any]]]) -> Iterator[Finding]:
    machines: dict[str, str] = {}
    for host, facts in reached:
        other = machines.setdefault(facts["machine"], host.name)
        if other != host.name:
            detail = f"is the same machine as {other}"
            yield Finding("machines", host.name, "finding", detail, "give it one line with all its slots", True)


def _alike(reached: Sequence[tuple[Host, dict[str, Any]]]) -> Iterator[Finding]:
    """The same versions, commit, config, base and data as on the first host that answered."""
    first, wanted = reached[0]
    for host, facts in reached[1:]:
        theirs, ours = facts["versions"], wanted["versions"]
        changed = [
            f"{name} {theirs.get(name, 'absent')}, but {ours.get(name, 'absent')} on {first.name}"
            for name in {**ours, **theirs}
            if theirs.get(name) != ours.get(name)
        ]
        if changed:
            cure = "install requirements/constraints.txt on both"
            yield Finding("versions", host.name, "finding", "; ".join(changed[:4]), cure, True)
        if facts["commit"] != wanted["commit"]:
            detail = f"lora_scale is at commit {_short(facts)}, on {first.name} at {_short(wanted)}"
            yield Finding("commit", host.name, "finding", detail, "check out the same commit on both", True)
    for what, key in (("config", "sha256"), ("base", "fingerprint"), ("data", "sha256")):
        values = {host.name: facts[what].get(key) for host, facts in reached if what in facts}
        for name, value in values.items():
            reference = values.get(first.name)
            if value and reference and value != reference:
                detail = f"another {what} than on {first.name}"
                yield Finding(what, name, "finding", detail, "copy it again, or share its folder", what != "data")
        if values and len(values) == len(reached) and len(set(values.values())) == 1 and None not in values.values():
            yield Finding(what, "all hosts", "ok", f"the same {what}")


def _of_one(host: Host, facts: dict[str, Any], is_first: bool) -> Iterator[Finding]:
    for what in ("config", "base", "data"):
        if error := facts.get(what, {}).get("error"):
            needed = what != "data" or is_first  # rows are read by the first rank only
            status: Literal["note", "finding"] = "finding" if needed else "note"
            cure = "put it there under the same path, or share its folder" if needed else "only the first host reads it"
            yield Finding(what, host.name, status, error, cure, needed)
    off = facts["time"] - facts["asked"][1]
    if abs(off) > CLOCK_SECONDS:
        detail = f"its clock is {abs(off):.0f} s {'ahead' if off > 0 else 'behind'}"
        yield Finding(
            "clock", host.name, "finding", detail, "set it (chrony, ntpd): logs cannot be compared, TLS fails"
        )
    yield from _devices(host, facts)
    disk = facts["disk"]
    if "error" in disk:
        detail = f"{disk['folder']} cannot be written: {disk['error']}"
        yield Finding("disk", host.name, "finding", detail, "mend that, or set another run_dir", True)
    elif disk["free"] < LITTLE_SPACE:
        detail = f"{disk['free'] / GIB:.2f} GiB free at {disk['folder']}"
        yield Finding("disk", host.name, "finding", detail, "make room, or set another run_dir")
    shared = facts["shared_memory"]
    if shared < SMALL_SHARED[bool(facts["gpus"])]:
        detail = f"/dev/shm has {shared / GIB:.3f} GiB"
        yield Finding("shared memory", host.name, "finding", detail, "start the container with --shm-size=8g")
    if 0 <= facts["open_files"] < FEW_FILES:
        detail = f"at most {facts['open_files']} open files"
        yield Finding("open files", host.name, "finding", detail, "ulimit -n 65536 (limits.conf, for ssh sessions)")
    for lock in facts["locks"]:
        detail = f"a build left its lock {lock}"
        yield Finding("build locks", host.name, "finding", detail, "if no build is running there, delete it")


def _devices(host: Host, facts: dict[str, Any]) -> Iterator[Finding]:
    gpus = facts["gpus"]
    if gpus and len(gpus) < host.slots:
        detail = f"slots={host.slots}, but there are {len(gpus)} GPUs"
        yield Finding("GPUs", host.name, "finding", detail, f"write slots={len(gpus)}", True)
    taken = [str(number) for number, gpu in enumerate(gpus[: host.slots]) if gpu["free"] < 0.9 * gpu["total"]]
    if taken:
        detail = f"another process holds memory of GPU {', '.join(taken)}"
        yield Finding("GPUs", host.name, "finding", detail, "nvidia-smi there tells which; end it")
    kind = f"{len(gpus)} x {gpus[0]['name']}" if gpus else "no GPU"
    free = f"{facts['memory'] / GIB:.1f} GiB memory and {facts['disk']['free'] / GIB:.1f} GiB disk free"
    yield Finding("host", host.name, "ok", f"{kind}, {facts['cores']} cores, {free}")


def _names(reached: Sequence[tuple[Host, dict[str, Any]]], first: Host) -> Iterator[Finding]:
    """The first host's name means the same everywhere, and each host's own name does not mean "this machine"."""
    for host, facts in reached:
        if host is not first and (facts["resolves"] is None or facts["resolves"].startswith("127.")):
            detail = f"{first.name} is {facts['resolves'] or 'unknown'} there"
            cure = f"give {first.name} its address in /etc/hosts of {host.name}"
            yield Finding("names", host.name, "finding", detail, cure, True)
        if (facts["own_name"] or "127.").startswith("127."):
            interface = facts["towards"] or "the interface"
            cure = f"lora-scale launch sets GLOO_SOCKET_IFNAME={interface} there; else set it, or mend /etc/hosts"
            named = facts["own_name"] or "unknown"
            detail = f"its own name {facts['hostname']} is {named}, at which others do not reach it"
            yield Finding("names", host.name, "finding", detail, cure)


def of_meeting(hosts: Sequence[Host], answers: Sequence[dict[str, Any]], nbytes: int) -> Iterator[Finding]:
    """What one sum and one gathering over the network showed."""
    failed = [(host, facts["error"]) for host, facts in zip(hosts, answers, strict=True) if "error" in facts]
    for host, error in failed:
        cure = (
            "do firewalls let the hosts talk on all ports? GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose the network"
        )
        said = error.partition(". This is typically")[0]  # gloo goes on about remote workers
        yield Finding("network", host.name, "finding", f"no all-reduce with the others: {said}", cure, True)
    if failed:
        return
    wrong = [host.name for host, facts in zip(hosts, answers, strict=True) if facts["wrong"]]
    if wrong:
        yield Finding(
            "network", wrong[0], "finding", "wrong sums", "memory or network faults: take this host out", True
        )
    seconds = {what: max(facts[what] for facts in answers) for what in ("reduce", "gather")}
    count = len(hosts)
    speed = {
        "reduce": 2 * (count - 1) / count * nbytes / seconds["reduce"] / 1e9,
        "gather": (count - 1) * nbytes / seconds["gather"] / 1e9,
    }
    detail = f"all-reduce {speed['reduce']:.2f} GB/s, all-gather {speed['gather']:.2f} GB/s, every value right"
    yield Finding("network", "all hosts", "ok", detail)
    shared = all(facts["seen"] == list(range(count)) for facts in answers)
    if shared:
        yield Finding("run folder", "all hosts", "ok", "shared")
    else:
        detail = f"not shared: checkpoints and metrics are on {hosts[0].name} only, each host keeps its own logs"
        yield Finding("run folder", "all hosts", "note", detail)


def master(hosts: Sequence[Host], answers: Sequence[dict[str, Any]]) -> str:
    """Where the first rank is reached, as the last host sees it."""
    seen = answers[-1].get("resolves")
    found = seen if seen and not seen.startswith("127.") and len(hosts) > 1 else answers[0]["address"]
    return str(found)


def interfaces(hosts: Sequence[Host], answers: Sequence[dict[str, Any]]) -> dict[str, str]:
    """For gloo, on hosts whose own name does not lead to the others."""
    return {
        host.name: facts["towards"]
        for host, facts in zip(hosts, answers, strict=True)
        if (facts["own_name"] or "127.").startswith("127.") and facts["towards"]
    }


def _short(facts: dict[str, Any]) -> str:
    commit = facts["commit"]
    return "unknown" if commit is None else commit[:10] + ("+changes" if commit.endswith("+changes") else "")
