"""Bytes of files to where they stay, by a few threads. Knows byte ranges and devices; no model, no ZeRO.

What is stored in fp8 blocks is multiplied by its scales on the way, piece by piece: a piece reads the rows of scales
that it touches and no more.

A tensor-parallel shard of columns is one short run a row. On a shared file system a read of some kilobytes costs as
much as one of megabytes, so the ranks of a group each read whole rows, a part of them, and exchange blocks of columns.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from lora_scale.adapters import fp8
from lora_scale.parallel.grid import Grid
from lora_scale.spec.layout import ByteRange, Placement, TensorEntry, ranges_in, runs, zero_spans
from lora_scale.storage.weights import Reader

CHUNK = 8 << 20  # bytes a read; 12 threads x 2 pinned buffers x 8 MiB stay under 256 MiB of host memory
FP8_CHUNK = CHUNK // 4  # so that its fp32 products are no larger than a CHUNK
THREADS_GPU, THREADS_CPU = 12, 2  # one thread fills a GPU at 3.7 GB/s, twelve at 22 (docs/log.md)
SHORT = 1 << 20  # bytes: runs below it are exchanged, not read, where the tensor is that large
BATCH = 512 << 20  # bytes of whole rows that wait for an exchange
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a rank keeps of one parameter: flat memory on the device, and where its bytes are."""

    entries: list[TensorEntry]
    place: Placement
    target: Tensor  # flat; its end is padding where it is longer than what the files have


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of one tensor of the files and the run of elements (flat, on the device where it stays) that they fill."""

    range: ByteRange
    target: Tensor
    entry: TensorEntry

    @property
    def start(self) -> int:
        """Of the run, in the flattened tensor."""
        return (self.range.offset - self.entry.offset) // self.entry.itemsize


@dataclass(frozen=True, slots=True)
class _Columns:
    """A tensor whose shard is short runs: this rank reads some whole rows of it and exchanges columns."""

    entry: TensorEntry
    place: Placement
    start: int  # of this rank's run in the flattened shard
    target: Tensor

    @property
    def rows(self) -> tuple[int, int]:
        """Rows that hold the run; the same on every rank of the group, because their shards have equal widths."""
        width = self._width
        return self.start // width, -(-(self.start + self.target.numel()) // width)

    def own_rows(self, rank: int) -> tuple[int, int]:
        """The rows that one rank of the group reads."""
        first, last = self.rows
        count = last - first
        return first + count * rank // self.place.tp_size, first + count * (rank + 1) // self.place.tp_size

    def own_bytes(self, rank: int) -> ByteRange:
        """The bytes of those rows."""
        first, last = self.own_rows(rank)
        row = runs(self.entry.shape, self.place)[0] * self.entry.itemsize
        return ByteRange(self.entry.file, self.entry.offset + first * row, (last - first) * row, self.entry.dtype)

    @property
    def _width(self) -> int:
        _, spans = runs(self.entry.shape, self.place)
        return sum(stop - start for start, stop in spans)

    def exchange(self, whole_rows: Tensor, group: Any) -> None:
        """Collective over the group: from this rank's rows (flat) to this rank's columns of all of them."""
        size, width = self.place.tp_size, self._width
        row, _ = runs(self.entry.shape, self.place)
        matrix = whole_rows.view(-1, row)
        blocks = []
        for rank in range(size):
            _, spans = runs(self.entry.shape, replace(self.place, tp_rank=rank))
            blocks += [torch.cat([matrix[:, start:stop] for start, stop in spans], 1).view(-1)]
        counts = [(last - first) * width for first, last in map(self.own_rows, range(size))]
        received = torch.empty(sum(counts), dtype=whole_rows.dtype, device=whole_rows.device)
        sent = torch.cat(blocks)
        dist.all_to_all_single(received, sent, counts, [len(matrix) * width] * size, group=group)
        first = self.rows[0] * width
        self.target.copy_(received[self.start - first : self.start - first + self.target.numel()])


def read(wanted: list[Wanted], device: torch.device, grid: Grid, progress: Callable[[int, int], None]) -> int:
    """Fill every target; the bytes this rank has read. The first error of a thread ends the others and is raised here.

    Collective over the tensor-parallel group where shards are exchanged. If another rank of the group fails there, this
    one returns early, with targets unfilled: let all ranks agree on the outcome before anything is used.
    """
    planned = [piece for one in wanted for piece in _plan(one)]
    direct = [piece for piece in planned if isinstance(piece, Piece)]
    columns = deque(piece for piece in planned if isinstance(piece, _Columns))
    total = sum(_nbytes(piece.entry, piece.range) for piece in direct)
    total += sum(_nbytes(c.entry, chunk) for c in columns for chunk in _chunks(c.entry, [c.own_bytes(grid.tp_rank)]))
    with _Threads(device, lambda done: progress(done, total)) as threads:
        threads.fill(direct)
        while columns:
            batch = [columns.popleft()]
            size = batch[0].entry.nbytes
            while columns and size + columns[0].entry.nbytes <= BATCH * grid.tp_size:
                batch.append(columns.popleft())
                size += batch[-1].entry.nbytes
            if not _exchanged(batch, threads, device, grid):
                break
    return total


def _exchanged(batch: list[_Columns], threads: "_Threads", device: torch.device, grid: Grid) -> bool:
    """Read and exchange some tensors; False if a rank of the group could not read."""
    waiting, pieces = [], []
    for column in batch:
        row, _ = runs(column.entry.shape, column.place)
        first, last = column.own_rows(grid.tp_rank)
        waiting.append(torch.empty((last - first) * row, dtype=column.target.dtype, device=device))
        pieces += list(_cut(column.entry, [column.own_bytes(grid.tp_rank)], waiting[-1]))
    error: Exception | None = None
    try:
        threads.fill(pieces)
    except Exception as caught:
        error = caught
    failed = torch.tensor(float(error is not None), device=device)
    dist.all_reduce(failed, group=grid.tp_group)
    if error is not None:
        raise error
    if failed:
        return False
    for column, rows in zip(batch, waiting, strict=True):
        column.exchange(rows, grid.tp_group)
    return True


def _plan(wanted: Wanted) -> Iterator[Piece | _Columns]:
    """How each of a parameter's tensors is fetched; every rank of a tensor-parallel group finds the same."""
    done = 0
    for entry, start, stop in zero_spans(wanted.entries, wanted.place):
        target = wanted.target.narrow(0, done, stop - start)
        done += stop - start
        row, spans = runs(entry.shape, wanted.place)
        shortest = min((last - first for first, last in spans), default=0) * entry.itemsize
        if entry.nbytes >= SHORT > shortest and 0 < sum(last - first for first, last in spans) < row:
            yield _Columns(entry, wanted.place, start, target)
        else:
            yield from _cut(entry, ranges_in(entry, wanted.place, start, stop), target)
    wanted.target.narrow(0, done, wanted.target.numel() - done).zero_()


def _cut(entry: TensorEntry, spans: Iterable[ByteRange], target: Tensor) -> Iterator[Piece]:
    """Reads of at most CHUNK bytes that fill a flat target; zeros where the ranges end before it does."""
    done = 0
    for chunk in _chunks(entry, spans):
        numel = chunk.length // entry.itemsize
        yield Piece(chunk, target.narrow(0, done, numel), entry)
        done += numel
    target.narrow(0, done, target.numel() - done).zero_()


def _chunks(entry: TensorEntry, spans: Iterable[ByteRange]) -> Iterator[ByteRange]:
    step = FP8_CHUNK if entry.blocks else CHUNK
    for run in spans:
        for offset in range(0, run.length, step):
            yield ByteRange(run.file, run.offset + offset, min(step, run.length - offset), run.dtype)


def _nbytes(entry: TensorEntry, chunk: ByteRange) -> int:
    """What is read for a chunk: its bytes, and the scales of its blocks."""
    if entry.blocks is None:
        return chunk.length
    start = (chunk.offset - entry.offset) // entry.itemsize
    return chunk.length + entry.blocks.scale_bytes(entry.shape[1], start, start + chunk.length).length


class _Threads:
    """A few threads that read pieces, and keep their buffers from one call to the next."""

    def __init__(self, device: torch.device, progress: Callable[[int], None]):
        count = THREADS_GPU if device.type == "cuda" else THREADS_CPU
        self._landings = [_Landing(device) for _ in range(count)]
        self._progress = progress
        self._done = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._reader = Reader().__enter__()
        # a thread begins with the first GPU: pinning from there would make a context on it, 0.5 GiB for each other rank
        device = self._landings[0].device
        first = partial(torch.cuda.set_device, device) if device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(len(self._landings), initializer=first)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()
        self._reader.__exit__()

    def fill(self, pieces: list[Piece]) -> None:
        """Read all of them. The first error ends the others and is raised here."""
        queue, failed = iter(pieces), threading.Event()
        for future in [self._pool.submit(self._work, landing, queue, failed) for landing in self._landings]:
            future.result()

    def _work(self, landing: "_Landing", queue: Iterator[Piece], failed: threading.Event) -> None:
        try:
            while not failed.is_set():
                with self._lock:
                    piece = next(queue, None)
                if piece is None:
                    break
                landing.take(self._reader, piece)
                with self._lock:
                    self._done += _nbytes(piece.entry, piece.range)
                    self._progress(self._done)
        except BaseException:
            failed.set()
            raise
        finally:
            landing.finish()


class _Landing:
    """Where one thread's reads arrive: the tensor itself on a CPU of equal dtype, else two buffers used in turn."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers: list[Tensor] = []
        self.events: list[Any] = []
        self.turn = 0

    def take(self, reader: Reader, piece: Piece) -> None:
        dtype, target = DTYPES[piece.range.dtype], piece.target
        if self.stream is None and dtype == target.dtype:
            reader.read_into(piece.range, memoryview(target.view(torch.uint8).numpy()))
            return
        buffer = self._next_buffer()[: piece.range.length]
        reader.read_into(piece.range, memoryview(buffer.numpy()))
        if self.stream is None:
            target.copy_(_values(reader, piece, buffer.view(dtype)))
            return
        with torch.cuda.stream(self.stream):
            target.copy_(_values(reader, piece, buffer.view(dtype).to(self.device, non_blocking=True)))
            self.events[self.turn].record(self.stream)

    def _next_buffer(self) -> Tensor:
        """The buffer used the time before last, once its copy is over."""
        if len(self.buffers) < 2:
            self.buffers.append(torch.empty(CHUNK, dtype=torch.uint8, pin_memory=self.stream is not None))
            if self.stream is not None:
                self.events.append(torch.cuda.Event())
            self.turn = len(self.buffers) - 1
            return self.buffers[-1]
        self.turn = 1 - self.turn
        if self.stream is not None:
            self.events[self.turn].synchronize()
        return self.buffers[self.turn]

    def finish(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()


def _values(reader: Reader, piece: Piece, stored: Tensor) -> Tensor:
    """The elements that the stored ones stand for."""
    if piece.entry.blocks is None:
        return stored
    scales = fp8.read_scales(reader, piece.entry, piece.start, piece.start + len(stored))
    return fp8.dequantised(stored, piece.entry, piece.start, scales.to(stored.device))
