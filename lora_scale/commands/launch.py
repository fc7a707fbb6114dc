"""`lora-scale launch`: one command for a run on several hosts, watched, cleaned up after and started again."""

import os
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click

from lora_scale.commands import crosscheck
from lora_scale.commands.options import EXIT_CODES
from lora_scale.parallel import hostcheck, launchers, pulse, starters
from lora_scale.parallel.starters import LAUNCHERS, Reach, Start
from lora_scale.parallel.supervise import Supervisor, sweep_all
from lora_scale.parallel.verdict import Outcome
from lora_scale.spec import configfile, cost
from lora_scale.spec import hosts as host_list
from lora_scale.spec.errors import FindingError, UsageError
from lora_scale.spec.hosts import Host

ASK_SECONDS = 120.0  # a first import from a network file system takes long
RETURN_EVERY = 5.0  # seconds between questions to a host that may come back
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True)
class Job:
    """What is launched, and how: the command line, and what the config says of it."""

    config: Path
    overrides: tuple[str, ...]
    hosts: tuple[Host, ...]
    min_nodes: int
    launcher: str
    patience: float
    exported: tuple[str, ...]
    node_rank: int
    master_addr: str | None
    master_port: int | None
    preflight: bool
    chatter: Path  # the log of launchers' own words
    suits: Callable[[int], bool]  # whether it can run on so many ranks

    @property
    def reach(self) -> Reach:
        return LAUNCHERS[self.launcher][1]


@click.command(epilog=EXIT_CODES)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--hostfile", type=click.Path(path_type=Path), help="A line a host: `node-a slots=8` (python=, dir=).")
@click.option(
    "--launcher", type=click.Choice(list(LAUNCHERS)), default="ssh", show_default=True, help="What starts the ranks."
)
@click.option(
    "--patience",
    type=click.FloatRange(min=10),
    default=60.0,
    show_default=True,
    help="Seconds in which a job that has failed anywhere is over everywhere.",
)
@click.option("--max-restarts", type=click.IntRange(min=0), default=0, show_default=True, help="After a fault.")
@click.option(
    "--min-nodes",
    type=click.IntRange(min=1),
    help="Restart with as few hosts as these when others do not come back, with the same global batch.",
)
@click.option("--export", "exported", multiple=True, metavar="NAME", help="Pass on this variable too, a secret also.")
@click.option("--node-rank", type=click.IntRange(min=0), default=0, help="no_ssh: which line of the hostfile this is.")
@click.option("--master-addr", help="Where the other hosts reach the first one; found out where this is left out.")
@click.option("--master-port", type=click.IntRange(1, 65535), help="A free port there; needed with no_ssh.")
@click.option("--preflight/--no-preflight", default=True, help="Ask every host first whether the job can run there.")
def command(
    config: Path,
    overrides: tuple[str, ...],
    hostfile: Path | None,
    launcher: str,
    patience: float,
    max_restarts: int,
    min_nodes: int | None,
    exported: tuple[str, ...],
    node_rank: int,
    master_addr: str | None,
    master_port: int | None,
    preflight: bool,
) -> None:
    """Train CONFIG on the hosts of a hostfile.

    \b
    lora-scale launch --hostfile hosts run.yaml
    lora-scale launch --hostfile hosts run.yaml lora.r=16 --max-restarts 3
    lora-scale launch --launcher slurm run.yaml                          inside sbatch
    lora-scale launch --launcher no_ssh --hostfile hosts --node-rank 1
        --master-addr node-a --master-port 29500 run.yaml            (on the second host)

    Every host is asked first whether it has the same packages, commit, config and base. A rank that dies or hangs, or
    a host that vanishes, ends the job on all hosts within --patience with one line: rank, host, step and cause. Steps
    longer than half of it are waited for up to ten times the slowest before. Ctrl-C: every rank saves and stops.
    """
    hosts = _hosts(launcher, hostfile)
    if launcher == "no_ssh" and (node_rank >= len(hosts) or master_port is None or master_addr is None):
        raise UsageError(
            f"--launcher no_ssh needs --master-addr and --master-port, the same on every host, and --node-rank below "
            f"{len(hosts)}"
        )
    cfg = configfile.load(config, overrides)
    chatter = cfg.run_dir / "log" / "launcher.txt"
    job = Job(
        config,
        overrides,
        hosts,
        len(hosts) if min_nodes is None else min_nodes,
        launcher,
        patience,
        exported,
        node_rank,
        master_addr,
        master_port,
        preflight,
        chatter,
        partial(cost.divides, cfg),
    )
    if min_nodes is not None:
        _check_min_nodes(job, max_restarts)
    chatter.parent.mkdir(parents=True, exist_ok=True)
    raise SystemExit(_attempts(job, max_restarts))


def _check_min_nodes(job: Job, max_restarts: int) -> None:
    if job.min_nodes > len(job.hosts):
        raise UsageError(f"--min-nodes is {job.min_nodes}; the hostfile names {len(job.hosts)} hosts")
    if not max_restarts:
        raise UsageError("--min-nodes is for restarts; say also --max-restarts N")
    if job.reach != "ssh" or not job.preflight:
        raise UsageError("--min-nodes needs to ask the hosts: a launcher that goes by ssh, with --preflight")


def _hosts(launcher: str, hostfile: Path | None) -> tuple[Host, ...]:
    if hostfile is not None:
        return host_list.read(hostfile)
    if launcher != "slurm":
        raise UsageError("--hostfile is needed: a line a host, like `node-a slots=8`")
    return starters.slurm_hosts(os.environ, _expand)


def _expand(nodes: str) -> list[str]:
    """Slurm's `node-[a-c]` as names, by Slurm itself."""
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return done.stdout.split()


def _attempts(job: Job, max_restarts: int) -> int:
    """Start, and start again after faults; the exit code."""
    before = None
    for number in range(max_restarts + 1):
        until = time.monotonic() + (job.patience if number else 0.0)
        token = secrets.token_hex(8)
        outcome = _attempt(job, until, token, before)
        before = token
        if outcome.code == 0:
            return 0
        last = not outcome.again or number == max_restarts
        for line in outcome.line.splitlines():
            click.echo(f"lora-scale: {'' if outcome.code in (75, 130) else 'error: '}{line}", err=True)
        if outcome.code not in (75, 130):
            click.echo(f"  every host is clean after {outcome.seconds:.0f} s; log: {job.chatter.parent}", err=True)
        if last:
            return outcome.code
        click.echo(f"restart  {number + 1} of {max_restarts}, from the last whole checkpoint")
    raise AssertionError


def _attempt(job: Job, until: float, token: str, before: str | None) -> Outcome:
    """One start of all ranks, watched to its end. `before`: the attempt before it, of which a host that was cut off
    may still hold ranks."""
    env = starters.passed(os.environ, job.exported)
    env |= {launchers.TOKEN: token, pulse.EVERY: f"{job.patience / 20:g}", pulse.HANG: f"{job.patience / 2:g}"}
    hosts, master, interfaces = job.hosts, job.master_addr, dict[str, str]()
    if job.reach == "ssh" and job.preflight:
        hosts, master_seen, interfaces = _preflight(job, env, until, again=before is not None)
        master = master or master_seen
    if job.reach == "ssh" and before:
        sweep_all(hosts, before, "kill")
    env[launchers.EXPECTED] = str(host_list.size(hosts))
    master = master or starters.master_of(hosts)
    with tempfile.TemporaryDirectory(prefix="lora-scale-") as scratch:
        start = Start(
            hosts,
            ("train", str(job.config), *job.overrides),
            env,
            master,
            job.master_port or starters.port_for(token),
            Path.cwd(),
            Path(scratch),
            job.node_rank,
            interfaces,
        )
        mine = [host.name for host in ([hosts[job.node_rank]] if job.launcher == "no_ssh" else hosts)]
        commands = LAUNCHERS[job.launcher][0](start)
        supervisor = Supervisor(commands, hosts, mine, token, job.patience, job.reach, job.chatter, click.echo)
        click.echo(f"launch   {start.size} ranks on {len(hosts)} hosts by {job.launcher}, meeting at {master}")
        handlers = {number: signal.signal(number, supervisor.stop) for number in SIGNALS}
        try:
            return supervisor.run()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _preflight(
    job: Job, env: dict[str, str], until: float, again: bool
) -> tuple[tuple[Host, ...], str, dict[str, str]]:
    """The hosts to run on, where the first rank will be, and gloo's interfaces. FindingError with a line a finding that
    forbids the job.

    A host that does not answer is asked again until `until`: after a restart it may be on its way back. Then a job that
    starts `again` goes on without it where that is allowed.
    """
    request = {"config": str(job.config), "overrides": list(job.overrides), "first": _name(job.hosts[0])}
    hosts = job.hosts
    while True:
        answers = hostcheck.ask(hosts, [("look", request, env)] * len(hosts), Path.cwd(), ASK_SECONDS)
        findings = list(crosscheck.of_facts(hosts, answers))
        bad = [finding for finding in findings if finding.blocks]
        if not bad:
            break
        away = {finding.host for finding in bad if finding.name == "reachable"}
        if away and time.monotonic() < until:
            time.sleep(RETURN_EVERY)
            continue
        left = host_list.without(hosts, away, job.min_nodes, job.suits) if away and again else ()
        if not left:
            raise FindingError("\n".join(str(finding) for finding in bad))
        gone = ", ".join(host.name for host in hosts if host not in left)
        ranks = host_list.size(left)
        click.echo(f"note     going on without {gone}: {ranks} rank{'s' * (ranks > 1)}, the same global batch")
        hosts, request = left, {**request, "first": _name(left[0])}
    for finding in findings:
        if finding.status == "finding":
            click.echo(f"note     {finding}")
    return hosts, crosscheck.master(hosts, answers), crosscheck.interfaces(hosts, answers)


def _name(host: Host) -> str:
    return host.name.rpartition("@")[2]
