"""`lora-scale doctor --hostfile`: every host of a job asked at once, before a GPU hour is spent. No verb itself."""

import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from lora_scale.commands import crosscheck
from lora_scale.commands.crosscheck import Finding
from lora_scale.parallel import hostcheck, starters
from lora_scale.spec import hosts as host_list
from lora_scale.spec.errors import FindingError
from lora_scale.spec.hosts import Host

LOOK_SECONDS, MEET_SECONDS = 120.0, 90.0
NBYTES = 16 << 20


def report(hostfile: Path, config: Path | None, folder: Path, as_json: bool) -> None:
    """Print one line a finding, with host and cure; FindingError when there is one."""
    hosts = host_list.read(hostfile)
    checks = []
    for check in _checks(hosts, config, folder):
        checks.append(check)
        if not as_json:
            click.echo(f"{check.status:8} {check.name:13} {check}")
    found = [check for check in checks if check.status == "finding"]
    if as_json:
        click.echo(json.dumps({"findings": len(found), "checks": [asdict(check) for check in checks]}, indent=2))
    if found:
        where = dict.fromkeys(f"{check.name} on {check.host}" for check in found)
        raise FindingError(f"{len(found)} finding{'s' if len(found) > 1 else ''}: {', '.join(where)}")


def _checks(hosts: tuple[Host, ...], config: Path | None, folder: Path) -> Iterator[Finding]:
    env = starters.passed(os.environ, ())
    request: dict[str, Any] = {
        "config": str(config) if config else None,
        "overrides": [],
        "first": hosts[0].name.rpartition("@")[2],
        "run_dir": str(folder),
    }
    answers = hostcheck.ask(hosts, [("look", request, env)] * len(hosts), Path.cwd(), LOOK_SECONDS)
    found = list(crosscheck.of_facts(hosts, answers))
    yield from found
    if any(check.blocks and check.name in ("reachable", "machines") for check in found):
        yield Finding("network", "all hosts", "note", "not tried: first each line must be a host that answers")
        return
    master = crosscheck.master(hosts, answers)
    interfaces = crosscheck.interfaces(hosts, answers)
    token = secrets.token_hex(8)
    meeting = {"bytes": NBYTES, "seconds": MEET_SECONDS / 3, "token": token, "folder": answers[0]["disk"]["folder"]}
    questions = []
    for rank, host in enumerate(hosts):
        place = {"RANK": str(rank), "WORLD_SIZE": str(len(hosts)), "LOCAL_RANK": "0", "MASTER_ADDR": master}
        place["MASTER_PORT"] = str(starters.port_for(token))
        if host.name in interfaces and "GLOO_SOCKET_IFNAME" not in env:
            place["GLOO_SOCKET_IFNAME"] = interfaces[host.name]
        questions.append(("meet", meeting, {**env, **place}))
    yield from crosscheck.of_meeting(hosts, hostcheck.ask(hosts, questions, Path.cwd(), MEET_SECONDS), NBYTES)
