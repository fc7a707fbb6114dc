"""Tokens of one block exchanged between tensor-parallel ranks, in an order that lets products hide it: each rank begins
with what it has, and with what others wait for.

    gather    a rank's own tokens are there at once; the others' arrive while products of those before are computed
    summing   products for others' tokens come first and are on their way while those for a rank's own are computed

One-sided: within a node each rank's memory is mapped on its peers. A copy engine fetches what a flag in this rank's
memory says is ready, so no processor of the GPU is taken from the products. Collective: everywhere else.
"""

import ctypes
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from lora_scale.adapters.marks import Arrival
from lora_scale.parallel import transport
from lora_scale.parallel.clock import exposed
from lora_scale.parallel.world import World


class Summing(Protocol):
    rooms: list[tuple[int, Tensor]]
    """(rank, where the product for its tokens goes), (tokens, features) each, this rank's own the last."""

    def send(self, index: int) -> None:
        """`rooms[index]` is done. In the order of the rooms, each once."""

    def result(self) -> Tensor:
        """(tokens, features): this rank's tokens, summed over the ranks. After all have been sent."""


class Exchange(Protocol):
    group: Any
    rank: int
    size: int

    def gather(self, own: Tensor) -> tuple[Tensor, list[Arrival]]:
        """(tokens, features) of each rank -> those of all, in the ranks' order, and what to wait for before rows are
        read. The result is lent: it holds until the next exchange but one."""

    def summing(self, tokens: int, features: int, like: Tensor) -> Summing: ...


def choose(world: World, group: Any) -> tuple[Exchange, str]:
    """The exchange of a group, and a note for the user where it is not the one that hides all. Collective."""
    if world.device.type != "cuda":
        return Collective(group), ""
    if problem := transport.problem(world, group) or _flags_problem(world, group):
        return Collective(group), f"tokens are exchanged by NCCL: {problem}"
    return OneSided(world.device, group), ""


def _others_first(rank: int, size: int) -> list[int]:
    """Each rank begins with another one, so that they do not queue at one."""
    return [(rank + step) % size for step in range(1, size)] + [rank]


def _at_once() -> None:
    pass


class Collective:
    """NCCL's or gloo's collectives: a gather hides behind the products of a rank's own tokens, a sum does not."""

    def __init__(self, group: Any):
        self.group, self.rank, self.size = group, dist.get_rank(group), dist.get_world_size(group)

    def gather(self, own: Tensor) -> tuple[Tensor, list[Arrival]]:
        tokens = len(own)
        y = own.new_empty(self.size * tokens, own.shape[1])
        mine = y.narrow(0, self.rank * tokens, tokens)
        mine.copy_(own)
        work = dist.all_gather_into_tensor(y, mine, group=self.group, async_op=True)  # in place: `mine` stays readable
        wait: Callable[[], None] = partial(_wait, work, own.device)
        arrivals: list[Arrival] = [(self.rank * tokens, tokens, _at_once)]
        for rank in _others_first(self.rank, self.size)[:-1]:
            arrivals.append((rank * tokens, tokens, wait))
            wait = _at_once
        return y, arrivals

    def summing(self, tokens: int, features: int, like: Tensor) -> "_Collected":
        return _Collected(self, self.group, like.new_empty(self.size, tokens, features))


def _wait(work: Any, device: torch.device) -> None:
    with exposed(device):
        work.wait()


class _Collected:
    def __init__(self, exchange: Collective, group: Any, whole: Tensor):
        self.group, self._whole = group, whole
        self.rooms = [(rank, whole[rank]) for rank in _others_first(exchange.rank, exchange.size)]

    def send(self, index: int) -> None:
        pass

    def result(self) -> Tensor:
        own = self._whole.new_empty(self._whole.shape[1:])
        with exposed(own.device):
            dist.reduce_scatter_tensor(own, self._whole.flatten(0, 1), group=self.group)
        return own


class OneSided:
    """Copy engines fetch from the peers' memory, on a stream of their own.

    Exchanges are numbered, alike on every rank, and take turns in two slots of memory. `flags[p]` in a rank's memory is
    the number of the last exchange for which peer p has put there what this rank wants. A rank writes to a slot again
    when it has seen its peers in the exchange after: by then they have fetched all there was.
    """

    def __init__(self, device: torch.device, group: Any):
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._device, self.group = device, group
        self._side = torch.cuda.Stream(device)
        self._flags, handle = transport.symmetric(4 * self.size, device, group)
        self._flags.zero_()
        self._peers_flags = [handle.get_buffer(r, (self.size,), torch.int32, 0) for r in range(self.size)]
        torch.cuda.synchronize(device)
        dist.barrier(group)  # nobody writes a flag before it is zero
        self._slots: list[list[Tensor]] = []  # slot, rank
        self._number = 0
        self._seen: torch.cuda.Event | None = None  # the peers have come to the last exchange

    def gather(self, own: Tensor) -> tuple[Tensor, list[Arrival]]:
        tokens, features = own.shape
        slot = self._begin(self.size * tokens, features, own)
        y = slot[self.rank]
        y.narrow(0, self.rank * tokens, tokens).copy_(own)
        for rank in range(self.size):
            if rank != self.rank:
                self._tell(rank)
        arrivals: list[Arrival] = [(self.rank * tokens, tokens, _at_once)]
        for rank in _others_first(self.rank, self.size)[:-1]:
            rows = slice(rank * tokens, (rank + 1) * tokens)
            arrived = self._fetch(rank, slot[rank][rows], y[rows])
            arrivals.append((rank * tokens, tokens, partial(self._await, arrived)))
        return torch.ops.aten._unsafe_view(y, y.shape), arrivals  # for autograd no view of what others write to

    def summing(self, tokens: int, features: int, like: Tensor) -> "_Fetched":
        return _Fetched(self, self._begin(self.size * tokens, features, like), tokens)

    def _begin(self, rows: int, features: int, like: Tensor) -> list[Tensor]:
        """The slot of a new exchange on every rank, as (rows, features)."""
        self._number += 1
        nbytes = rows * features * like.element_size()
        if not self._slots or self._slots[0][0].numel() < nbytes:
            self._make_slots(nbytes)
        if self._seen is not None:
            torch.cuda.current_stream(self._device).wait_event(self._seen)
        whole = self._slots[self._number % 2]
        return [one[:nbytes].view(like.dtype).view(rows, features) for one in whole]

    def _make_slots(self, nbytes: int) -> None:
        torch.cuda.synchronize(self._device)
        dist.barrier(self.group)  # nobody fetches any more
        self._slots = []
        for _ in range(2):
            own, handle = transport.symmetric(nbytes, self._device, self.group)
            slot = [handle.get_buffer(rank, (nbytes,), torch.uint8, 0) for rank in range(self.size)]
            slot[self.rank] = own
            self._slots.append(slot)

    def _tell(self, rank: int) -> None:
        """What this stream has put into the slot until now is there for `rank`."""
        self._side.wait_event(torch.cuda.current_stream(self._device).record_event())
        _write(self._side, self._peers_flags[rank], self.rank, self._number)

    def _fetch(self, rank: int, there: Tensor, here: Tensor) -> torch.cuda.Event:
        """Copy when `rank` has told; the event after it."""
        _wait_for(self._side, self._flags.view(torch.int32), rank, self._number)
        with torch.cuda.stream(self._side):
            here.copy_(there, non_blocking=True)
        self._seen = self._side.record_event()
        return self._seen

    def _await(self, arrived: torch.cuda.Event) -> None:
        with exposed(self._device):
            torch.cuda.current_stream(self._device).wait_event(arrived)


class _Fetched:
    """Products for others' tokens lie in this rank's slot until they fetch them; theirs for this rank's are fetched
    into `_parts` meanwhile."""

    def __init__(self, exchange: OneSided, slot: list[Tensor], tokens: int):
        self._exchange, self._slot, self._tokens = exchange, slot, tokens
        mine = slot[exchange.rank]
        self._own = mine.new_empty(tokens, mine.shape[1])
        self._parts = mine.new_empty(exchange.size - 1, tokens, mine.shape[1])
        self._arrived: list[torch.cuda.Event] = []
        order = _others_first(exchange.rank, exchange.size)
        self.rooms = [(r, self._own if r == exchange.rank else mine[self._rows(r)]) for r in order]

    def _rows(self, rank: int) -> slice:
        return slice(rank * self._tokens, (rank + 1) * self._tokens)

    def send(self, index: int) -> None:
        exchange, (rank, _) = self._exchange, self.rooms[index]
        if rank == exchange.rank:
            return
        exchange._tell(rank)
        if index == exchange.size - 2:  # all are told: from now on this rank may wait for others
            for part, (peer, _) in zip(self._parts, self.rooms, strict=False):
                self._arrived.append(exchange._fetch(peer, self._slot[peer][self._rows(exchange.rank)], part))

    def result(self) -> Tensor:
        for part, arrived in zip(self._parts, self._arrived, strict=True):
            self._exchange._await(arrived)
            self._own.add_(part)
        return self._own


# --- flags: the driver's operations on a stream, which take no processor of the GPU -----------------------------------


@cache
def _driver() -> Any:
    return ctypes.CDLL("libcuda.so.1")


def _flag_operation(name: str, stream: torch.cuda.Stream, flags: Tensor, index: int, value: int) -> None:
    address = ctypes.c_uint64(flags.data_ptr() + 4 * index)
    handle = ctypes.c_void_p(stream.cuda_stream)
    code = getattr(_driver(), name)(handle, address, ctypes.c_uint32(value), ctypes.c_uint(0))
    if code:
        raise RuntimeError(f"{name} gave CUDA error {code}")


_write = partial(_flag_operation, "cuStreamWriteValue32_v2")
_wait_for = partial(_flag_operation, "cuStreamWaitValue32_v2")  # until the flag is at least the value


def _flags_problem(world: World, group: Any) -> str:
    """Why flags cannot be set in the peers' memory; the same answer on every rank, "" if they can."""
    found = ""
    try:
        own, handle = transport.symmetric(4 * dist.get_world_size(group), world.device, group)
        own.zero_()
        torch.cuda.synchronize(world.device)
        dist.barrier(group)
        stream, rank, size = torch.cuda.current_stream(world.device), dist.get_rank(group), dist.get_world_size(group)
        for peer in range(size):
            _write(stream, handle.get_buffer(peer, (size,), torch.int32, 0), rank, rank + 1)
        torch.cuda.synchronize(world.device)
        dist.barrier(group)
        if own.view(torch.int32).tolist() != list(range(1, size + 1)):
            found = "flags written to other ranks' memory did not arrive"
        else:
            _wait_for(stream, own.view(torch.int32), rank, rank + 1)
            torch.cuda.synchronize(world.device)
    except Exception as error:  # drivers and containers refuse in many ways
        found = f"no flags in other ranks' memory ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
    return transport.first(group, found)
