"""Which rank this process is, on which device, and how ranks agree. Knows no model and no ZeRO; the variables of
launchers are `parallel.launchers`'."""

import contextlib
import importlib
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lora_scale.parallel import launchers, mpi, network
from lora_scale.spec.errors import ConfigError, LoraScaleError, TrainingError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class World:
    """This process among all. `local_rank` counts on this node and picks the GPU."""

    launcher: str
    rank: int
    size: int
    local_rank: int

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.local_rank) if torch.cuda.is_available() else torch.device("cpu")

    @property
    def is_first(self) -> bool:
        return self.rank == 0


def from_environment(env: Mapping[str, str] = os.environ) -> World | None:
    """The place a launcher gave this process, or None when no launcher started it. ConfigError when the variables make
    no sense."""
    place = launchers.find(env)
    return World(place.launcher, place.rank, place.size, place.local_rank) if place else None


def start(world: World | None, timeout_minutes: float) -> World:
    """Join the process group (NCCL on GPUs, gloo on CPUs), also as the only process, and tell DeepSpeed of it.

    The timeout is always given: the libraries' own default changed from 30 to 10 minutes between versions.
    """
    world = world or World("none", 0, 1, 0)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        if world.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {world.local_rank} has no GPU: {torch.cuda.device_count()} visible on "
                f"{socket.gethostname()}; "
                "start as many ranks as there are GPUs"
            )
        torch.cuda.set_device(world.device)
    _check_accelerator("cuda" if on_gpu else "cpu")
    if world.launcher == "none":  # no launcher: a group of one, on a port nobody else has
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(network.free_port()))
    elif world.launcher in launchers.BY_MPI and not {"MASTER_ADDR", "MASTER_PORT"} & set(os.environ):
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = mpi.meet(world.rank, world.size)
    elif missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ConfigError(
            f"{' and '.join(missing)} not set in the environment of {world.launcher}; "
            "set both, to the first rank's host and a free port there"
        )
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size), LOCAL_RANK=str(world.local_rank))
    timeout = timedelta(minutes=timeout_minutes)
    options: dict[str, Any] = {"device_id": world.device} if on_gpu else {}
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout, **options)
    except dist.DistNetworkError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        why = str(error).splitlines()[0]
        raise ConfigError(f"the ranks cannot meet at {where} (MASTER_ADDR, MASTER_PORT): {why}") from error
    deepspeed = _deepspeed()
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", auto_mpi_discovery=False, timeout=timeout)
    return world


def _check_accelerator(found: str) -> None:
    """DeepSpeed takes its device from DS_ACCELERATOR; torch finds its own. They must agree."""
    named = os.environ.setdefault("DS_ACCELERATOR", found)
    if named != found:
        hide = ", or hide the GPUs with CUDA_VISIBLE_DEVICES=" if named == "cpu" else ""
        raise ConfigError(
            f"DS_ACCELERATOR is {named!r} in the environment, but torch uses {found} here; unset it{hide}"
        )


def _deepspeed() -> Any:
    """Import DeepSpeed without its shared-memory helper for CPUs, which compiles for 90 s and, killed midway, locks
    later jobs; and its Muon optimizer, which every engine imports and no run here uses, without compiling it: what
    torch.compile imports for that takes 4 s of a processor in each rank."""
    deepspeed = importlib.import_module("deepspeed")
    importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    with contextlib.suppress(ImportError):  # versions that have none
        original = torch.compile
        torch.compile = _as_it_is  # type: ignore[assignment]
        try:
            importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
        finally:
            torch.compile = original
    return deepspeed


def _as_it_is(function: Any = None, **options: Any) -> Any:
    return function if function is not None else lambda function: function


def launch_token(world: World | None) -> str:
    """Names this launch on this node: what our own launcher gave it, or the ranks' common parent and its start time.

    A process of its own has a name of its own: its parent may be a shell that starts many.
    """
    if token := os.environ.get(launchers.TOKEN):
        return token
    pid = os.getppid() if world else os.getpid()
    if not os.path.exists(f"/proc/{pid}"):  # the launcher is outside this container
        pid = os.getpid()
    with open(f"/proc/{pid}/stat") as stat:
        started = stat.read().rpartition(")")[2].split()[19]
    return f"{pid}-{started}"


def stop() -> None:
    """Leave the process group. Call it on every rank that comes to a regular end: an abort at exit was seen without
    it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def on_rank_zero(fn: Callable[[], T]) -> T:
    """Call fn on rank 0 and give every rank its result, or its exception.

    A bare `if rank == 0: fn()` leaves the others waiting in the next collective until it times out, when fn raises.
    The result travels pickled, inside the job's own process group only: keep it small.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = fn()
        except Exception as error:
            outcome[1] = error if _travels(error) else TrainingError(f"{type(error).__name__}: {error}")
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def on_every_rank(fn: Callable[[], T]) -> T:
    """Call fn on every rank; when any raises, every rank raises the first rank's error, so that none is left
    waiting."""
    result: Any = None
    error: Exception | None = None
    try:
        result = fn()
    except Exception as caught:
        error = caught
    mine = None if error is None else (error if _travels(error) else TrainingError(f"{type(error).__name__}: {error}"))
    outcomes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(outcomes, mine)
    if error is not None and not isinstance(error, LoraScaleError):
        raise error  # keep the traceback where it happened
    for rank, outcome in enumerate(outcomes):
        if outcome is not None:
            raise outcome if rank == dist.get_rank() else type(outcome)(f"rank {rank}: {outcome}")
    return result


def _travels(error: Exception) -> bool:
    return isinstance(error, LoraScaleError)


def hardware(here: World) -> dict[str, Any]:
    """What the run runs on, for the manifest."""
    found: dict[str, Any] = {
        "device": "cpu",
        "ranks": here.size,
        "launcher": here.launcher,
        "threads": torch.get_num_threads(),
    }
    if here.device.type == "cuda":
        properties = torch.cuda.get_device_properties(here.device)
        found |= {
            "device": properties.name,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return found
