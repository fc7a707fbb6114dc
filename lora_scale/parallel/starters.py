"""How each launcher is told to start a job's ranks, and how a process on a host is reached. No torch.

No shell sees a value of a config: over ssh the remote shell gets a Python path and a constant program, which reads
folder, environment and command as JSON from stdin and becomes that command.
"""

import base64
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lora_scale.parallel import launchers, network
from lora_scale.spec import hosts as host_list
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.hosts import Host

# A dead host is noticed after 15 s; a question (password, unknown key) is a failure, not a wait.
SSH_OPTIONS = "-o BatchMode=yes -o ConnectTimeout=5 -o ServerAliveInterval=5 -o ServerAliveCountMax=3 -o LogLevel=ERROR"
SSH = ("ssh", "-T", *SSH_OPTIONS.split())
BOOT = (
    "import json,os,sys;j=json.loads(sys.stdin.readline());os.environ.update(j['env']);os.chdir(j['cwd']);"
    "os.execvp(j['argv'][0],j['argv'])"
)
STEP_NAME = "lora-scale-"  # and the launch's token: how its step is found again
Reach = Literal["ssh", "slurm", "here"]
PASSED = {"PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "OMP_NUM_THREADS", "DS_ACCELERATOR", "TOKENIZERS_PARALLELISM"}
PASSED |= {"HF_HOME", "TRITON_CACHE_DIR", "LORA_SCALE_COMMIT"}
PASSED_PREFIXES = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "UCX_", "HF_HUB_", "TRANSFORMERS_")
_SECRET = re.compile(r"TOKEN(?!IZERS)|SECRET|PASSW|CREDENTIAL|_KEY\b|API_?KEY")
_PLAIN = re.compile(r"[\w@%+=:,./-]+")  # what pdsh's remote shell leaves alone


@dataclass(frozen=True)
class Start:
    """What is to be started, whatever the launcher."""

    hosts: tuple[Host, ...]
    words: tuple[str, ...]  # after `python -m lora_scale`
    env: Mapping[str, str]  # that every rank gets
    master: str
    port: int
    folder: Path
    scratch: Path  # of this launch, on this host
    node_rank: int = 0  # with no_ssh
    interfaces: Mapping[str, str] = field(default_factory=dict)  # for gloo, by host

    @property
    def size(self) -> int:
        return host_list.size(self.hosts)


@dataclass(frozen=True)
class Command:
    """One process of ours: a whole launcher, or what runs on one host."""

    argv: tuple[str, ...]
    env: Mapping[str, str]
    host: str | None = None  # the one host it stands for
    stdin: str = ""


def passed(env: Mapping[str, str], more: Sequence[str]) -> dict[str, str]:
    """The part of this environment that other hosts need, and no secret but those asked for by name."""
    if missing := [name for name in more if name not in env]:
        raise ConfigError(f"--export {missing[0]}: there is no such variable in this environment")
    known = {name for name in env if name in PASSED or name.startswith(PASSED_PREFIXES)}
    return {name: env[name] for name in sorted(known | set(more)) if name in more or not _SECRET.search(name.upper())}


def on_host(host: Host, argv: Sequence[str], env: Mapping[str, str], folder: Path) -> Command:
    """A process on `host`, through ssh. argv[0] stands for that host's Python, whatever it is."""
    python = host.python or sys.executable
    if host.python and "PATH" in env:
        env = {**env, "PATH": f"{Path(host.python).parent}:{os.defpath}"}
    job = {"cwd": host.folder or str(folder), "env": dict(env), "argv": [python, *argv[1:]]}
    remote = shlex.join([python, "-c", BOOT])
    return Command((*SSH, host.name, remote), os.environ, host.name, json.dumps(job) + "\n")


def _world_info(start: Start) -> str:
    slots = {host.name: list(range(host.slots)) for host in start.hosts}
    return base64.urlsafe_b64encode(json.dumps(slots).encode()).decode()


def _deepspeed(start: Start, node_rank: int) -> list[str]:
    """What the deepspeed command runs on each host."""
    launch = ["python", "-u", "-m", "deepspeed.launcher.launch", "--log_level", "error", "--no_local_rank"]
    launch += [f"--world_info={_world_info(start)}", f"--node_rank={node_rank}"]
    return [
        *launch,
        f"--master_addr={start.master}",
        f"--master_port={start.port}",
        "--module",
        "lora_scale",
        *start.words,
    ]


def _env_of(start: Start, host: Host) -> dict[str, str]:
    name = start.interfaces.get(host.name)
    return {**start.env, **({"GLOO_SOCKET_IFNAME": name} if name and "GLOO_SOCKET_IFNAME" not in start.env else {})}


def ssh(start: Start) -> list[Command]:
    """DeepSpeed's launcher of one host, on each host."""
    return [
        on_host(host, _deepspeed(start, number), _env_of(start, host), start.folder)
        for number, host in enumerate(start.hosts)
    ]


def torchrun(start: Start) -> list[Command]:
    """torchrun on each host; it wants as many ranks on each."""
    slots = _equal_slots(start, "torchrun")
    commands = []
    for number, host in enumerate(start.hosts):
        argv = ["python", "-m", "torch.distributed.run", f"--nnodes={len(start.hosts)}", f"--node_rank={number}"]
        argv += [f"--nproc_per_node={slots}", f"--master_addr={start.master}", f"--master_port={start.port}"]
        commands.append(on_host(host, [*argv, "-m", "lora_scale", *start.words], _env_of(start, host), start.folder))
    return commands


def no_ssh(start: Start) -> list[Command]:
    """This host's ranks only; somebody else gives the same command on the others."""
    argv = _deepspeed(start, start.node_rank)
    env = {**os.environ, **_env_of(start, start.hosts[start.node_rank])}
    return [Command((sys.executable, *argv[1:]), env, start.hosts[start.node_rank].name)]


def pdsh(start: Start) -> list[Command]:
    """`deepspeed --hostfile`, which hands its words and variables to a shell on each host."""
    _need("pdsh")
    for word in (*start.words, str(start.folder)):
        if not _PLAIN.fullmatch(word):
            raise ConfigError(
                f"pdsh hands {word!r} to a shell, which would change it; write it into the config, or use "
                "--launcher ssh"
            )
    for name, value in start.env.items():
        if re.search(r'["$`\\\n]', value) or _SECRET.search(name.upper()):
            raise ConfigError(
                f"{name} cannot go through pdsh, which writes it into a file and into the command lines of every host; "
                "use --launcher ssh"
            )
    hostfile, variables = start.scratch / "hosts", start.scratch / "environment"
    hostfile.write_text("".join(f"{host.name} slots={host.slots}\n" for host in start.hosts))
    variables.write_text("".join(f"{name}={value}\n" for name, value in start.env.items()))
    argv = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--launcher", "pdsh"]
    argv += ["--force_multi", "--no_ssh_check", "--no_local_rank", "--log_level", "error"]
    argv += ["--master_addr", start.master, "--master_port", str(start.port), "--module", "lora_scale", *start.words]
    append = f"{os.environ.get('PDSH_SSH_ARGS_APPEND', '')} {SSH_OPTIONS}".strip()
    env = {**os.environ, **start.env, "DS_ENV_FILE": str(variables), "PDSH_SSH_ARGS_APPEND": append}
    return [Command(tuple(argv), env)]


def openmpi(start: Start) -> list[Command]:
    """mpirun, with variables by name. One rank a core is its default: no binding."""
    _need("mpirun")
    hostfile = start.scratch / "hosts"
    hostfile.write_text("".join(f"{host.name} slots={host.slots}\n" for host in start.hosts))
    env = {**start.env, "MASTER_ADDR": start.master, "MASTER_PORT": str(start.port)}
    env["TERM"] = "dumb"  # it gives its processes a pseudo-terminal, on which a live line would be drawn
    names = [word for name in env for word in ("-x", name)]
    alive = {"OMPI_MCA_oob_tcp_keepalive_time": "5", "OMPI_MCA_oob_tcp_keepalive_intvl": "2"}
    alive |= {"OMPI_MCA_oob_tcp_keepalive_probes": "3", "OMPI_MCA_plm_rsh_args": SSH_OPTIONS}
    argv = ["mpirun", "-np", str(start.size), "--hostfile", str(hostfile), "--bind-to", "none", *names]
    argv += ["-wdir", str(start.folder), sys.executable, "-u", "-m", "lora_scale", *start.words]
    return [Command(tuple(argv), {**alive, **os.environ, **env})]


def slurm(start: Start) -> list[Command]:
    """srun inside an allocation."""
    _need("srun")
    argv = ["srun", "--kill-on-bad-exit=1", f"--job-name={STEP_NAME}{start.env[launchers.TOKEN]}"]
    argv += [f"--ntasks={start.size}", f"--nodes={len(start.hosts)}"]
    argv += [f"--ntasks-per-node={_equal_slots(start, 'srun')}", sys.executable, "-u", "-m", "lora_scale", *start.words]
    env = {**os.environ, **start.env, "MASTER_ADDR": start.master, "MASTER_PORT": str(start.port)}
    return [Command(tuple(argv), env)]


# launcher: how it starts the job, and how the supervisor reaches its processes
LAUNCHERS: dict[str, tuple[Callable[[Start], list[Command]], Reach]] = {
    "ssh": (ssh, "ssh"),
    "pdsh": (pdsh, "ssh"),
    "torchrun": (torchrun, "ssh"),
    "openmpi": (openmpi, "ssh"),
    "slurm": (slurm, "slurm"),
    "no_ssh": (no_ssh, "here"),
}


def slurm_hosts(env: Mapping[str, str], listed: Callable[[str], list[str]]) -> tuple[Host, ...]:
    """The hosts of this allocation. ConfigError outside one."""
    if "SLURM_JOB_NODELIST" not in env:
        raise ConfigError("--launcher slurm works inside an allocation only: sbatch or salloc first")
    names = listed(env["SLURM_JOB_NODELIST"])
    each = env.get("SLURM_NTASKS_PER_NODE") or env.get("SLURM_GPUS_ON_NODE")
    if each is None or not each.isdecimal():
        raise ConfigError("the number of ranks a node is not known; give sbatch --ntasks-per-node, one task a GPU")
    return tuple(Host(name, int(each)) for name in names)


def port_for(token: str) -> int:
    """A port for rank 0: nobody can ask its host for a free one beforehand, so each launch takes another."""
    return 20000 + int(token, 16) % 12000  # below 32768, where Linux takes ports for outgoing connections


def master_of(hosts: Sequence[Host]) -> str:
    """The first host's address as this host sees it; loopback names mean another machine elsewhere."""
    name = hosts[0].name.rpartition("@")[2]
    found = network.address_of(name)
    return network.own_address() if found is None or found.startswith("127.") else found


def _equal_slots(start: Start, who: str) -> int:
    slots = {host.slots for host in start.hosts}
    if len(slots) > 1:
        raise ConfigError(f"{who} starts as many ranks on each host, but the hostfile gives {sorted(slots)} slots")
    return slots.pop()


def _need(tool: str) -> None:
    if not shutil.which(tool):
        raise ConfigError(f"{tool} is not installed here; install it, or use --launcher ssh")
