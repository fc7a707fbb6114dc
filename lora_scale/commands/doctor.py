"""`lora-scale doctor`: what on this machine will hurt a run, each with its cure. Changes nothing; imports no torch."""

import json
import os
import platform
import re
import resource
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import click

from lora_scale.commands import everyhost
from lora_scale.commands.options import EXIT_CODES
from lora_scale.parallel import probe
from lora_scale.spec.errors import FindingError
from lora_scale.storage import diskspeed

SUPPORTED = {  # the oldest version that pyproject.toml allows, and the first that nobody has tried
    "torch": ("2.11", "2.14"),
    "deepspeed": ("0.19.8", "0.20"),
    "transformers": ("5.17", "5.24"),
    "peft": ("0.19", "0.22"),
    "safetensors": ("0.5", "0.9"),
}
OPTIONAL = {"mpi4py": "needed under mpirun only"}
PYTHONS = ("3.11", "3.13")
SETTINGS = ("NCCL_", "GLOO_", "CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR", "TORCH_EXTENSIONS_DIR", "OMP_NUM_THREADS")
LAUNCHERS = ("deepspeed", "torchrun", "mpirun", "srun", "pdsh")
GIB = 1 << 30
REDUCED_BYTES = {"gloo": 16 << 20, "nccl": 256 << 20}  # large enough that the links and not the latency is measured
DISK_BYTES = 128 << 20
LOOK_SECONDS, REDUCE_SECONDS = 300.0, 120.0  # a first import from a network file system takes minutes
SLOW_DISK = 20e6  # bytes a second; below it a checkpoint of 1 GiB takes most of a minute
LITTLE_SPACE = 2 * GIB
FEW_FILES = 1024  # a rank opens every file of the base at once, and sockets to the others


@dataclass(frozen=True, slots=True)
class Check:
    """One line. A `note` is worth knowing and changes no exit code; a `finding` has a cure and makes it 4."""

    name: str
    status: Literal["ok", "note", "finding"]
    detail: str
    cure: str = ""


@click.command(epilog=EXIT_CODES)
@click.option(
    "--folder",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    help="Where runs and checkpoints will be written; its disk is measured with a file of 128 MiB.",
)
@click.option("--hostfile", type=click.Path(path_type=Path), help="Ask every host that it names, all at once.")
@click.option("--config", type=click.Path(path_type=Path), help="With --hostfile: the run whose base and data to seek.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def command(folder: Path, hostfile: Path | None, config: Path | None, as_json: bool) -> None:
    """Look for what would hurt a run on this machine: one line a check, each finding with its cure.

    Versions, devices, launcher, one all-reduce over the visible GPUs (or 2 CPU processes) with its result checked,
    disk, shared memory, limits, leftovers of killed builds, the host's name. Takes about a minute and changes nothing.
    Under a launcher the first rank of each host answers.

    \b
    lora-scale doctor
    lora-scale doctor --folder /scratch/runs --json
    lora-scale doctor --hostfile hosts --config run.yaml    all of them, and their network
    """
    if hostfile:
        return everyhost.report(hostfile, config, folder, as_json)
    started = time.monotonic()
    checks = []
    if sys.stderr.isatty():
        click.echo(f"importing {', '.join(SUPPORTED)} ...", err=True)
    for check in _checks(folder):
        if check is None:
            return
        checks.append(check)
        if not as_json:
            click.echo(f"{check.status:8} {check.name:13} {check.detail}{'; ' if check.cure else ''}{check.cure}")
    names = [check.name for check in checks if check.status == "finding"]
    if as_json:
        report = {"findings": len(names), "seconds": round(time.monotonic() - started, 1)}
        click.echo(json.dumps({**report, "checks": [asdict(check) for check in checks]}, indent=2))
    if names:
        raise FindingError(f"{len(names)} finding{'s' if len(names) > 1 else ''}: {', '.join(names)}")


def _checks(folder: Path) -> Iterator[Check | None]:
    """Every check as it is done; None and no more on a rank that is not its host's first."""
    versions = {name: _version(name) for name in SUPPORTED}
    try:
        seen = probe.look([name for name in SUPPORTED if versions[name]], LOOK_SECONDS)
    except FindingError as error:
        seen = {"imports": {}, "failed": {"python": str(error)}}
    place = seen.get("launcher")
    if place and place["local_rank"] > 0:
        yield None
        return
    yield judge_version("python", platform.python_version(), *PYTHONS)
    for name, limits in SUPPORTED.items():
        yield judge_version(name, versions[name], *limits)
    for name, use in OPTIONAL.items():  # not imported: importing mpi4py calls MPI_Init
        yield Check(name, "ok", _version(name) or f"not installed; {use}")
    yield from judge_imports(seen)
    works = "torch" in seen["imports"]
    devices = seen["devices"] if works else []
    yield from judge_devices(seen["cuda"] if works else None, devices, _driver())
    yield judge_launcher(place, seen.get("launcher_error"), os.environ)
    if works:
        yield reduced("nccl" if devices else "gloo", len(devices) or 2)
    yield from disk(folder)
    yield judge_shared_memory(shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None, bool(devices))
    yield from limits_of_this_process()
    yield judge_locks(extension_locks(os.environ))
    yield judge_hostname(socket.gethostname(), _addresses(socket.gethostname()), os.environ)


def judge_version(name: str, version: str | None, oldest: str, untried: str) -> Check:
    if version is None:
        return Check(name, "finding", "not installed", f"pip install '{name}>={oldest},<{untried}'")
    if _numbers(version) < _numbers(oldest):
        return Check(name, "finding", f"{version} is older than {oldest}, the oldest supported", "update it")
    if _numbers(version) >= _numbers(untried):
        return Check(name, "note", f"{version} is newer than what was tried, which is below {untried}")
    return Check(name, "ok", version)


def judge_imports(seen: Mapping[str, Any]) -> Iterator[Check]:
    for name, reason in seen["failed"].items():
        yield Check("imports", "finding", f"{name}: {reason}", f"try `python -c 'import {name}'`, reinstall it")
    if seen["imports"] and not seen["failed"]:
        yield Check("imports", "ok", f"{', '.join(seen['imports'])} in {sum(seen['imports'].values()):.1f} s")


def judge_devices(cuda: str | None, devices: list[Mapping[str, Any]], driver: str | None) -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0))
    yield Check("host", "ok", f"{cores} cores, {host_memory() / GIB:.1f} GiB memory")
    if not devices and driver is None:
        yield Check(
            "devices", "ok", f"no GPU; torch is built for {f'CUDA {cuda}' if cuda else 'CPUs'}; ranks run on CPUs"
        )
    elif not devices:
        cure = f"a driver for CUDA {cuda}, or CUDA_VISIBLE_DEVICES" if cuda else "install a torch with CUDA"
        build = f"CUDA {cuda}" if cuda else "CPUs"
        yield Check("devices", "finding", f"driver {driver} is there, but torch (built for {build}) sees no GPU", cure)
    for number, device in enumerate(devices):
        free, total = device["free"] / GIB, device["total"] / GIB
        memory = f"{free:.1f} of {total:.1f} GiB free"
        detail = f"{device['name']}, {memory}, driver {driver or 'unknown'}, torch for CUDA {cuda}"
        taken = free < 0.9 * total
        cure = "another process holds the rest (nvidia-smi): end it, or choose others with CUDA_VISIBLE_DEVICES"
        yield Check(f"GPU {number}", "finding" if taken else "ok", detail, cure if taken else "")


def judge_launcher(place: Mapping[str, Any] | None, wrong: str | None, env: Mapping[str, str]) -> Check:
    settings = "".join(f", {name}={env[name]}" for name in sorted(env) if name.startswith(SETTINGS))
    if wrong:
        return Check("launcher", "finding", wrong, "a leftover of another job in this shell")
    if place:
        return Check("launcher", "ok", f"{place['launcher']}: rank {place['rank']} of {place['size']}{settings}")
    path = os.pathsep.join([env.get("PATH", os.defpath), str(Path(sys.executable).parent)])
    there = ", ".join(name for name in LAUNCHERS if shutil.which(name, path=path)) or "none"
    return Check("launcher", "ok", f"not started by one; there are: {there}{settings}")


def reduced(backend: str, ranks: int) -> Check:
    try:
        result = probe.all_reduce(backend, ranks, REDUCED_BYTES[backend], REDUCE_SECONDS)
    except FindingError as error:
        cure = {
            "gloo": "see hostname below, or set GLOO_SOCKET_IFNAME=lo",
            "nccl": "set NCCL_DEBUG=INFO and try again; see shared memory below",
        }[backend]
        return Check("all-reduce", "finding", f"{backend}, {ranks} ranks: {error}", cure)
    rate = f", {result.bus_gb_per_second:.1f} GB/s" if ranks > 1 else ""
    speed = f"{result.nbytes >> 20} MiB in {result.seconds * 1e3:.1f} ms{rate}"
    return Check("all-reduce", "ok", f"{backend}, {ranks} ranks, every sum right, {speed}")


def disk(folder: Path) -> Iterator[Check]:
    there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < LITTLE_SPACE:
        detail = f"{free / GIB:.1f} GiB free at {there}"
        yield Check("disk space", "finding", detail, "choose another folder with --folder")
    else:
        yield Check("disk space", "ok", f"{free / GIB:,.1f} GiB free at {there}")
    try:
        speed = diskspeed.measure(there, DISK_BYTES)
    except OSError as error:
        reason = error.strerror or str(error)
        yield Check("disk", "finding", f"{there} cannot be written: {reason}", "choose another folder with --folder")
        return
    cached = "" if speed.direct else " (from memory, perhaps)"
    detail = f"write {speed.write / 1e6:,.0f} MB/s, read {speed.read / 1e6:,.0f} MB/s{cached} at {there}"
    slow = speed.write < SLOW_DISK
    yield Check("disk", "finding" if slow else "ok", detail, "choose a faster folder with --folder" if slow else "")


def judge_shared_memory(nbytes: int | None, has_gpus: bool) -> Check:
    detail = "no /dev/shm" if nbytes is None else f"{nbytes / GIB:.2f} GiB at /dev/shm"
    if (nbytes or 0) < GIB / 2 and has_gpus:
        return Check("shared memory", "finding", f"{detail}; NCCL needs more", "start the container with --shm-size=8g")
    return Check("shared memory", "ok", detail)


def limits_of_this_process() -> Iterator[Check]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    cure = "ulimit -n 65536" if soft < FEW_FILES else ""
    yield Check("open files", "finding" if cure else "ok", f"limit {_limit(soft)}, at most {_limit(hard)}", cure)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    infiniband = Path("/sys/class/infiniband")
    fabric = sorted(path.name for path in infiniband.iterdir()) if infiniband.is_dir() else []
    few = bool(fabric) and 0 <= locked < GIB
    used = f"; InfiniBand ({', '.join(fabric)}) locks its buffers" if fabric else "; matters with InfiniBand only"
    shown = "unlimited" if locked < 0 else f"{locked / GIB:.3f} GiB"
    yield Check(
        "locked memory", "finding" if few else "ok", f"limit {shown}{used}", "ulimit -l unlimited" if few else ""
    )


def extension_locks(env: Mapping[str, str]) -> dict[Path, float]:
    """Lock files of torch's extension builds and their age in seconds. A lock that stays is waited for without end."""
    cache = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(env.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    return {path: time.time() - path.stat().st_mtime for depth in ("*/lock", "*/*/lock") for path in root.glob(depth)}


def judge_locks(locks: Mapping[Path, float]) -> Check:
    if not locks:
        return Check("build locks", "ok", "none in torch's extensions folder")
    listed = ", ".join(f"{path} ({age / 60:.0f} minutes old)" for path, age in locks.items())
    cure = f"if no build is running, rm {' '.join(map(str, locks))}: every later job waits for it without a word"
    return Check("build locks", "finding", listed, cure)


def judge_hostname(name: str, addresses: list[str], env: Mapping[str, str]) -> Check:
    chosen = env.get("GLOO_SOCKET_IFNAME")
    there = [interface for _, interface in socket.if_nameindex()]
    if chosen and not set(chosen.split(",")) & set(there):
        detail = f"GLOO_SOCKET_IFNAME={chosen}, but the interfaces are {', '.join(there)}"
        return Check("hostname", "finding", detail, "name one of them, or unset it")
    if chosen:
        return Check("hostname", "ok", f"{name}; gloo uses {chosen}")
    if addresses and not all(address.startswith("127.") or address == "::1" for address in addresses):
        return Check("hostname", "ok", f"{name} is {', '.join(addresses)}")
    what = f"is {', '.join(addresses)}" if addresses else "has no address"
    outside = "/".join(interface for interface in there if interface != "lo") or "the interface"
    cure = f"for several set GLOO_SOCKET_IFNAME={outside}, or give the name its address in /etc/hosts"
    return Check("hostname", "note", f"{name} {what}: enough for one host", cure)


def host_memory() -> int:
    """Bytes this process may use: the machine's, or the container's where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, release.group().split("."))) if release else ()


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", path.read_text()) if path.is_file() else None
    return found.group() if found else None


def _limit(number: int) -> str:
    return "unlimited" if number == resource.RLIM_INFINITY else f"{number:,}"


def _addresses(name: str) -> list[str]:
    try:
        return sorted({str(found[4][0]) for found in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)})
    except OSError:
        return []
