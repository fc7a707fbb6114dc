"""`lora-scale launch`: one command for a run on several hosts, watched, cleaned up after and started again."""

import os
import secrets
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from lora_scale.commands import crosscheck
from lora_scale.commands.options import EXIT_CODES
from lora_scale.parallel import hostcheck, launchers, pulse, starters
from lora_scale.parallel.starters import LAUNCHERS, Start
from lora_scale.parallel.supervise import Supervisor, sweep_all
from lora_scale.parallel.verdict import Outcome
from lora_scale.spec import configfile
from lora_scale.spec import hosts as host_list
from lora_scale.spec.errors import FindingError, UsageError
from lora_scale.spec.hosts import Host

ASK_SECONDS = 120.0  # a first import from a network file system takes long
RETURN_EVERY = 5.0  # seconds between questions to a host that may come back
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@dataclass(frozen=True)
class Options:
    """The command line, but for config and overrides."""

    hosts: tuple[Host, ...]
    launcher: str
    patience: float
    exported: tuple[str, ...]
    node_rank: int
    master_addr: str | None
    master_port: int | None
    preflight: bool


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
    options = Options(hosts, launcher, patience, exported, node_rank, master_addr, master_port, preflight)
    if launcher == "no_ssh" and (node_rank >= len(hosts) or master_port is None or master_addr is None):
        raise UsageError(
            f"--launcher no_ssh needs --master-addr and --master-port, the same on every host, and --node-rank below "
            f"{len(hosts)}"
        )
    cfg = configfile.load(config, overrides)
    chatter = cfg.run_dir / "log" / "launcher.txt"
    chatter.parent.mkdir(parents=True, exist_ok=True)
    raise SystemExit(_attempts(options, config, overrides, chatter, max_restarts))


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


def _attempts(options: Options, config: Path, overrides: Sequence[str], chatter: Path, max_restarts: int) -> int:
    """Start, and start again after faults; the exit code."""
    say, before = click.echo, None
    for number in range(max_restarts + 1):
        until = time.monotonic() + (options.patience if number else 0.0)
        token = secrets.token_hex(8)
        outcome = _attempt(options, config, overrides, chatter, until, say, token, before)
        before = token
        if outcome.code == 0:
            return 0
        last = not outcome.again or number == max_restarts
        for line in outcome.line.splitlines():
            click.echo(f"lora-scale: {'' if outcome.code in (75, 130) else 'error: '}{line}", err=True)
        if outcome.code not in (75, 130):
            click.echo(f"  every host is clean after {outcome.seconds:.0f} s; log: {chatter.parent}", err=True)
        if last:
            return outcome.code
        say(f"restart  {number + 1} of {max_restarts}, from the last whole checkpoint")
    raise AssertionError


def _attempt(
    options: Options,
    config: Path,
    overrides: Sequence[str],
    chatter: Path,
    until: float,
    say: Callable[[str], None],
    token: str,
    before: str | None,
) -> Outcome:
    """One start of all ranks, watched to its end. `before`: the attempt before it, of which a host that was cut off
    may still hold ranks."""
    start_job, reach = LAUNCHERS[options.launcher]
    env = starters.passed(os.environ, options.exported)
    env |= {
        launchers.TOKEN: token,
        pulse.EVERY: f"{options.patience / 20:g}",
        pulse.HANG: f"{options.patience / 2:g}",
        launchers.EXPECTED: str(host_list.size(options.hosts)),
    }
    master, interfaces = options.master_addr, dict[str, str]()
    if reach == "ssh" and options.preflight:
        master_seen, interfaces = _preflight(options, config, overrides, env, until, say)
        master = master or master_seen
    if reach == "ssh" and before:
        sweep_all(options.hosts, before, "kill")
    master = master or starters.master_of(options.hosts)
    with tempfile.TemporaryDirectory(prefix="lora-scale-") as scratch:
        start = Start(
            options.hosts,
            ("train", str(config), *overrides),
            env,
            master,
            options.master_port or starters.port_for(token),
            Path.cwd(),
            Path(scratch),
            options.node_rank,
            interfaces,
        )
        mine = [options.hosts[options.node_rank]] if options.launcher == "no_ssh" else options.hosts
        names = [host.name for host in mine]
        supervisor = Supervisor(start_job(start), options.hosts, names, token, options.patience, reach, chatter, say)
        say(f"launch   {start.size} ranks on {len(options.hosts)} hosts by {options.launcher}, meeting at {master}")
        handlers = {number: signal.signal(number, supervisor.stop) for number in SIGNALS}
        try:
            return supervisor.run()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _preflight(
    options: Options,
    config: Path,
    overrides: Sequence[str],
    env: dict[str, str],
    until: float,
    say: Callable[[str], None],
) -> tuple[str, dict[str, str]]:
    """Where the first rank will be, and gloo's interfaces. FindingError with a line a finding that forbids the job.

    A host that does not answer is asked again until `until`: after a restart it may be on its way back.
    """
    request = {"config": str(config), "overrides": list(overrides), "first": options.hosts[0].name.rpartition("@")[2]}
    while True:
        questions = [("look", request, env)] * len(options.hosts)
        answers = hostcheck.ask(options.hosts, questions, Path.cwd(), ASK_SECONDS)
        findings = list(crosscheck.of_facts(options.hosts, answers))
        bad = [finding for finding in findings if finding.blocks]
        if not bad:
            break
        if time.monotonic() > until or not any(finding.name == "reachable" for finding in bad):
            raise FindingError("\n".join(str(finding) for finding in bad))
        time.sleep(RETURN_EVERY)
    for finding in findings:
        if finding.status == "finding":
            say(f"note     {finding}")
    return crosscheck.master(options.hosts, answers), crosscheck.interfaces(options.hosts, answers)
