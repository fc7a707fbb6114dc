"""Try the machine in processes of their own: do the packages import, what devices are there, does an all-reduce add up.

Whatever hangs or crashes here ends after a time limit as a FindingError, and takes nothing else with it. Only those
processes import torch: the module must load where torch does not.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import Any

from lora_scale.spec.errors import ConfigError, FindingError

PACKAGE_ROOT = Path(__file__).parents[2]
LAUNCHER_PREFIXES = ("OMPI_", "PMI", "SLURM_", "TORCHELASTIC_", "MPI_LOCAL")
LAUNCHER_NAMES = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
ROUNDS = 5
PERIOD = 1021  # of the test pattern: its sums over ranks stay whole numbers below 2**24, exact in fp32


@dataclass(frozen=True, slots=True)
class Reduced:
    """One all-reduce: `seconds` is the median of a few, `bus_gb_per_second` as NCCL's tests count it."""

    backend: str
    ranks: int
    nbytes: int
    seconds: float

    @property
    def bus_gb_per_second(self) -> float:
        return 2 * (self.ranks - 1) / self.ranks * self.nbytes / self.seconds / 1e9


def look(packages: Sequence[str], timeout_seconds: float) -> dict[str, Any]:
    """What a fresh process finds: {"imports": {name: seconds}, "failed": {name: reason}, "cuda": version or None,
    "devices": [{"name", "total", "free"}], bytes, "launcher": {"launcher", "rank", ...} or None, "launcher_error"}.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer")
        _run([["look", str(answer), *packages]], os.environ, timeout_seconds)
        return json.loads(answer.read_text())


def all_reduce(backend: str, ranks: int, nbytes: int, timeout_seconds: float) -> Reduced:
    """Add up a known pattern over `ranks` processes of this machine; a wrong sum is a FindingError too."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in LAUNCHER_NAMES and not name.startswith(LAUNCHER_PREFIXES)
    }
    with tempfile.TemporaryDirectory() as folder:
        answer, store = Path(folder, "answer"), Path(folder, "store")
        words = [str(answer), str(store), backend, str(ranks), str(nbytes), str(timeout_seconds)]
        _run([["reduce", *words, str(rank)] for rank in range(ranks)], environment, timeout_seconds)
        return Reduced(backend, ranks, nbytes, float(answer.read_text()))


def _run(commands: Sequence[Sequence[str]], environment: Mapping[str, str], timeout_seconds: float) -> None:
    """Run this module once for each of `commands`, all at a time; FindingError when one fails or the time is up."""
    deadline = time.monotonic() + timeout_seconds
    with _started(commands, environment) as (processes, errors):
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes) or time.monotonic() > deadline:
                break
            time.sleep(0.02)
        for number, process in enumerate(processes):
            if process.poll():
                raise FindingError(f"process {number} of {len(processes)} {_ending(process.poll(), errors[number])}")
        if any(process.poll() is None for process in processes):
            raise FindingError(f"no answer after {timeout_seconds:g} s")


@contextmanager
def _started(
    commands: Sequence[Sequence[str]], environment: Mapping[str, str]
) -> Iterator[tuple[list[subprocess.Popen[bytes]], list[Path]]]:
    """The processes and the files of their stderr. Each is a session of its own and killed whole at the end."""
    paths = [str(PACKAGE_ROOT), *filter(None, [environment.get("PYTHONPATH")])]
    environment = {"OMP_NUM_THREADS": "1", **environment, "PYTHONPATH": os.pathsep.join(paths)}
    processes: list[subprocess.Popen[bytes]] = []
    with tempfile.TemporaryDirectory() as folder:
        errors = [Path(folder, f"stderr-{number}") for number in range(len(commands))]
        try:
            for command, error in zip(commands, errors, strict=True):
                with error.open("wb") as stderr:
                    processes.append(
                        subprocess.Popen(
                            [sys.executable, "-m", "lora_scale.parallel.probe", *command],
                            env=environment,
                            stdin=subprocess.DEVNULL,
                            stdout=subprocess.DEVNULL,
                            stderr=stderr,
                            start_new_session=True,
                        )
                    )
            yield processes, errors
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
            for process in processes:
                with suppress(subprocess.TimeoutExpired):  # stuck in a driver: to wait on would be the hang
                    process.wait(timeout=5)


def _ending(code: int | None, stderr: Path) -> str:
    lines = [line.strip() for line in stderr.read_text(errors="replace").splitlines() if line.strip()]
    how = f"was killed by signal {-code}" if code and code < 0 else "failed"
    return f"{how}: {lines[-1]}" if lines else how


def _look(answer: Path, packages: Sequence[str]) -> None:
    found: dict[str, Any] = {"imports": {}, "failed": {}, "cuda": None, "devices": []}
    found |= {"launcher": None, "launcher_error": None}
    for name in packages:
        started = time.perf_counter()
        try:
            importlib.import_module(name)
        except Exception as error:  # an import can raise anything; the reason is the finding
            found["failed"][name] = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        else:
            found["imports"][name] = time.perf_counter() - started
    if "torch" in found["imports"]:
        found |= _torch_facts()
    answer.write_text(json.dumps(found))


def _torch_facts() -> dict[str, Any]:
    import torch

    from lora_scale.parallel import world

    devices, place, wrong = [], None, None
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        devices.append({"name": torch.cuda.get_device_name(number), "total": total, "free": free})
    try:
        here = world.from_environment()
        place = here and {
            "launcher": here.launcher,
            "rank": here.rank,
            "size": here.size,
            "local_rank": here.local_rank,
        }
    except ConfigError as error:
        wrong = str(error)
    return {"cuda": torch.version.cuda, "devices": devices, "launcher": place, "launcher_error": wrong}


def _reduce(answer: Path, store: str, backend: str, ranks: int, nbytes: int, timeout_seconds: float, rank: int) -> None:
    import torch
    import torch.distributed as dist

    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    options: dict[str, Any] = {"device_id": device} if device.type == "cuda" else {}
    timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group(backend, f"file://{store}", timeout, ranks, rank, **options)
    pattern = torch.arange(nbytes // 4, dtype=torch.float32, device=device) % PERIOD
    mine = torch.empty_like(pattern)
    times = []
    for _ in range(1 + ROUNDS):  # the first one sets the connections up
        torch.mul(pattern, rank + 1, out=mine)
        _synchronize(device)
        started = time.perf_counter()
        dist.all_reduce(mine)
        _synchronize(device)
        times.append(time.perf_counter() - started)
    wrong = int((mine != pattern * (ranks * (ranks + 1) // 2)).sum())
    if wrong:
        raise SystemExit(f"{wrong:,} of {len(mine):,} sums are wrong")
    dist.barrier()
    dist.destroy_process_group()
    if rank == 0:
        answer.write_text(str(median(times[1:])))


def _synchronize(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    verb, answer, *words = sys.argv[1:]
    if verb == "look":
        _look(Path(answer), words)
    else:
        store, backend, ranks, nbytes, timeout_seconds, rank = words
        _reduce(Path(answer), store, backend, int(ranks), int(nbytes), float(timeout_seconds), int(rank))
