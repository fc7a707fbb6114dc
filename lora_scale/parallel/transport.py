"""How pieces of equal size become a whole on every rank of a group. Knows bytes; no layer, no stream.

One-sided: within a node each rank's memory is mapped on its peers, and a rank copies their pieces itself. The base
never changes once it is loaded, so nobody waits for anybody, and the copy engines leave the GPU's processors to the
products (docs/log.md). Collective: an all-gather, everywhere else.
"""

import importlib
import os
import socket
from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lora_scale.parallel import memory
from lora_scale.parallel.world import World

ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # until torch 2.12


class Transport(Protocol):
    rank: int
    size: int

    def allocate(self, nbytes: int, device: torch.device) -> Tensor:
        """This rank's pieces, zeroed; equally many bytes on every rank of the group."""

    def gather(self, out: Tensor, offset: int, piece: int, own: Sequence[tuple[int, int]]) -> None:
        """Into `out` (size x piece bytes) every rank's `piece` bytes from `offset` on, on the current stream; of this
        rank's own piece at least the runs `own`."""


class Collective:
    """An all-gather over a group of its own, so that its order stands in no relation to other collectives'."""

    def __init__(self, group: Any):
        ranks = dist.get_process_group_ranks(group)
        self._group = dist.new_group(ranks, use_local_synchronization=True)
        self.rank, self.size = dist.get_rank(group), len(ranks)

    def allocate(self, nbytes: int, device: torch.device) -> Tensor:
        self._own = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        return self._own

    def gather(self, out: Tensor, offset: int, piece: int, own: Sequence[tuple[int, int]]) -> None:
        getattr(dist, ALL_GATHER)(out, self._own.narrow(0, offset, piece), group=self._group)


class OneSided:
    """Reads of the peers' memory. Whoever uses it must let all ranks finish writing theirs first."""

    def __init__(self, group: Any):
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def allocate(self, nbytes: int, device: torch.device) -> Tensor:
        own, self._handle = symmetric(nbytes, device, self._group)
        self._ranks = [self._handle.get_buffer(rank, (nbytes,), torch.uint8, 0) for rank in range(self.size)]
        self._ranks[self.rank] = own
        return own.zero_()

    def gather(self, out: Tensor, offset: int, piece: int, own: Sequence[tuple[int, int]]) -> None:
        for step in range(1, self.size):  # each rank begins with another one, so that they do not queue at one
            rank = (self.rank + step) % self.size
            self._copy(out, rank, offset, piece, 0, piece)
        for start, stop in own:  # a copy on one GPU is done by its processors, which have better things to do
            self._copy(out, self.rank, offset, piece, start, stop)

    def _copy(self, out: Tensor, rank: int, offset: int, piece: int, start: int, stop: int) -> None:
        source = self._ranks[rank].narrow(0, offset + start, stop - start)
        out.narrow(0, rank * piece + start, stop - start).copy_(source, non_blocking=True)


def choose(world: World, group: Any, wanted: str) -> tuple[Transport, str]:
    """The transport over a group, and a note for the user where it is not the one that is faster. Collective."""
    if wanted == "collective" or world.device.type != "cuda":
        return Collective(group), ""
    if why := problem(world, group):
        return Collective(group), f"the base is gathered by all-gathers: {why}"
    return OneSided(group), ""


def problem(world: World, group: Any) -> str:
    """Why the ranks of a group cannot read each other's memory; the same answer on every rank, "" if they can."""
    places: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(places, (socket.gethostname(), world.local_rank), group=group)
    if len({host for host, _ in places}) > 1:
        return "its ranks are on several hosts"
    seen = [device for _, device in places if device != world.local_rank and device < torch.cuda.device_count()]
    apart = not all(torch.cuda.can_device_access_peer(world.device, device) for device in seen)
    if why := first(group, "some GPUs have no access to each other" if apart else ""):
        return why
    try:
        own, handle = symmetric(512, world.device, group)
        own.fill_(dist.get_rank(group) + 1)
        torch.cuda.synchronize(world.device)
        dist.barrier(group)
        read = [int(handle.get_buffer(rank, (512,), torch.uint8, 0)[-1]) for rank in range(len(places))]
        found = "" if read == list(range(1, len(places) + 1)) else "a rank read wrong values of another's memory"
        dist.barrier(group)  # nobody gives its memory back while another reads it
    except Exception as error:  # drivers, containers and builds of torch refuse in many ways
        found = f"symmetric memory is not to be had here ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
    return first(group, found)


def first(group: Any, problem: str) -> str:
    """The first rank's problem that has one."""
    problems: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(problems, problem, group=group)
    return next(filter(None, problems), "")


def symmetric(nbytes: int, device: torch.device, group: Any) -> tuple[Tensor, Any]:
    """Memory that every rank of the group has mapped, and the handle to it. Collective."""
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # not needed, and not to be had on every machine
    symmetric = importlib.import_module("torch.distributed._symmetric_memory")
    before = torch.cuda.memory_allocated(device)
    own = symmetric.empty(nbytes, dtype=torch.uint8, device=device)
    if torch.cuda.memory_allocated(device) == before:  # it depends on the version of torch
        memory.add_aside(nbytes)
    return own, symmetric.rendezvous(own, group.group_name)
