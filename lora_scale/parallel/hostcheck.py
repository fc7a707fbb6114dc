"""What one host of a job sees, told as JSON, and how all hosts are asked at once. Judges nothing.

`python -m lora_scale.parallel.hostcheck look REQUEST` prints facts of this host; `meet REQUEST`, started on every host
with a rank's variables, adds up and gathers a known pattern over the network. No torch for `look`.
"""

import contextlib
import hashlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from lora_scale.parallel import network, starters
from lora_scale.spec import configfile
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import LoraScaleError
from lora_scale.spec.hosts import Host
from lora_scale.storage import provenance
from lora_scale.storage.folder import fingerprint, open_folder
from lora_scale.storage.hub import is_name
from lora_scale.storage.prepared import sources_of

ANSWER = "@answer "
SAMPLE = 1 << 20  # bytes read at the head and the tail of a data file
ROUNDS = 3


def ask(
    hosts: Sequence[Host],
    requests: Sequence[tuple[str, Mapping[str, Any], Mapping[str, str]]],
    folder: Path,
    timeout_seconds: float,
) -> list[dict[str, Any]]:
    """Answers of all hosts, asked at the same time: (verb, request, environment) each. {"error": why} where none."""
    with ThreadPoolExecutor(len(hosts)) as pool:
        return list(pool.map(lambda host, asked: _ask_one(host, asked, folder, timeout_seconds), hosts, requests))


def _ask_one(
    host: Host, request: tuple[str, Mapping[str, Any], Mapping[str, str]], folder: Path, timeout_seconds: float
) -> dict[str, Any]:
    verb, facts, env = request
    argv = ["python", "-m", "lora_scale.parallel.hostcheck", verb, json.dumps(facts)]
    command = starters.on_host(host, argv, env, folder)
    before = time.time()
    try:
        done = subprocess.run(
            command.argv, input=command.stdin, capture_output=True, text=True, timeout=timeout_seconds, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer after {timeout_seconds:.0f} s", "code": None}
    answers = [line for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if done.returncode or not answers:
        lines = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        return {"error": lines[-1] if lines else f"exit code {done.returncode}", "code": done.returncode}
    found: dict[str, Any] = json.loads(answers[-1].removeprefix(ANSWER))
    return found | {"asked": (before, time.time())}


def look(request: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of this host. `request`: config (or None) and overrides, the first host's name, the folder of runs."""
    found: dict[str, Any] = {
        "hostname": socket.gethostname(),
        "machine": _machine(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "resolves": network.address_of(request["first"]),
        "own_name": network.address_of(socket.gethostname()),
        "address": network.own_address(),
        "interfaces": network.interfaces(),
        "gpus": _gpus(),
        "shared_memory": shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "cores": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES"),
        "locks": _locks(),
    }
    outside = found["resolves"] if found["resolves"] and not found["resolves"].startswith("127.") else found["address"]
    found["towards"] = network.towards(outside)
    runs = Path(request["run_dir"]) if request.get("run_dir") else Path("runs")
    if request.get("config"):
        try:
            cfg = configfile.load(Path(request["config"]), request["overrides"])
        except LoraScaleError as error:
            found["config"] = {"error": str(error).splitlines()[0]}
        else:
            runs = cfg.run_dir
            found |= {"config": {"sha256": configfile.config_sha256(cfg)}, "base": _base(cfg), "data": _data(cfg)}
    found["disk"] = _disk(runs)
    return found | {"time": time.time()}  # last: nearest to the moment of the answer


def _base(cfg: RunConfig) -> dict[str, str]:
    if not Path(cfg.model.path).is_dir():
        return {"error": f"{cfg.model.path} is no folder here"}
    try:
        return {"fingerprint": fingerprint(open_folder(cfg.model.path, cfg.model.trust_remote_code))}
    except (LoraScaleError, OSError) as error:
        return {"error": str(error).splitlines()[0]}


def _data(cfg: RunConfig) -> dict[str, str]:
    """A hash of the data files' sizes, heads and tails; enough to tell one version from another."""
    paths = [Path(source.path) for source in sources_of(cfg) if not is_name(source.path)]
    paths += [cfg.data.validation] if isinstance(cfg.data.validation, Path) else []
    seen = hashlib.sha256()
    try:
        for path in [path for path in paths if not path.is_dir()]:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                seen.update(str(size).encode() + file.read(SAMPLE))
                file.seek(max(0, size - SAMPLE))
                seen.update(file.read(SAMPLE))
    except OSError as error:
        return {"error": f"{error.filename}: {error.strerror}"}
    return {"sha256": seen.hexdigest()}


def _disk(folder: Path) -> dict[str, Any]:
    """Free bytes where runs are written, and why nothing can be written there, if so. Leaves nothing behind."""
    there = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.is_dir())
    mark = there / f".lora-scale-{socket.gethostname()}-{os.getpid()}"
    try:
        mark.write_bytes(b"?" * 4096)
        mark.unlink()
    except OSError as error:
        with contextlib.suppress(OSError):
            mark.unlink()
        return {"folder": str(there), "free": 0, "error": error.strerror}
    return {"folder": str(there), "free": shutil.disk_usage(there).free}


def _machine() -> str:
    """The same for two names of one host, different for two hosts."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/net')}"


def _gpus() -> list[dict[str, Any]]:
    tool = shutil.which("nvidia-smi")
    if not tool:
        return []
    fields = "--query-gpu=name,memory.total,memory.free"
    done = subprocess.run([tool, fields, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=60)
    rows = [line.split(", ") for line in done.stdout.splitlines() if line.count(", ") == 2]
    return [{"name": name, "total": int(total) << 20, "free": int(free) << 20} for name, total, free in rows]


def _locks() -> list[str]:
    """Locks that killed builds of torch's extensions left; a later build waits for them without end."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cache / "torch_extensions")
    return [str(path) for depth in ("*/lock", "*/*/lock") for path in root.glob(depth)]


def meet(request: Mapping[str, Any]) -> dict[str, Any]:
    """One rank a host: a sum and a gathering of a known pattern over the network, each checked and timed; and which
    hosts' marks are seen in the folder of runs."""
    import torch
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=request["seconds"]))
    pattern = torch.arange(request["bytes"] // 4, dtype=torch.float32, device=device) % 1021
    parts = [torch.empty_like(pattern) for _ in range(size)]
    reduce, gather, wrong = [], [], 0
    for _ in range(1 + ROUNDS):  # the first one sets the connections up
        mine = pattern * (rank + 1)
        wrong_before = wrong
        reduce.append(_timed(lambda mine=mine: dist.all_reduce(mine), on_gpu))
        wrong += int((mine != pattern * (size * (size + 1) // 2)).sum())
        own = pattern * (rank + 1)
        gather.append(_timed(lambda own=own: dist.all_gather(parts, own), on_gpu))
        wrong = wrong_before + wrong + sum(int((part != pattern * (r + 1)).sum()) for r, part in enumerate(parts))
    folder = Path(request["folder"])
    mark = folder / f".lora-scale-{request['token']}-{rank}"
    with contextlib.suppress(OSError):  # a folder that cannot be written is another finding
        mark.touch()
    dist.barrier()
    seen = sorted(int(path.name.rpartition("-")[2]) for path in folder.glob(f".lora-scale-{request['token']}-*"))
    dist.barrier()
    with contextlib.suppress(OSError):
        mark.unlink()
    dist.destroy_process_group()
    return {"wrong": wrong, "reduce": median(reduce[1:]), "gather": median(gather[1:]), "seen": seen}


def _timed(call: Any, on_gpu: bool) -> float:
    import torch

    began = time.perf_counter()
    call()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    verb, told = sys.argv[1:]
    answer = {"look": look, "meet": meet}[verb](json.loads(told))
    sys.stdout.write(f"\n{ANSWER}{json.dumps(answer)}\n")
    sys.stdout.flush()
