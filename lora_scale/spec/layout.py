"""Where each element of a parameter lives: in the checkpoint files, and on which rank.

Pure integer arithmetic: no torch, no files, no process groups. Two facts make it short. safetensors stores a tensor
flattened, row by row, and a ZeRO-3 partition is a contiguous run of the flattened parameter; so one rank's partition of
a tensor that is not split by tensor parallelism is *one* byte range.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as a safetensors header describes it."""

    name: str
    file: str
    dtype: str  # as in the header: "BF16", "F16", "F32", ...
    shape: tuple[int, ...]
    itemsize: int
    offset: int  # bytes from the start of the file

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    def whole(self) -> "ByteRange":
        return ByteRange(self.file, self.offset, self.nbytes, self.dtype)


@dataclass(frozen=True, slots=True)
class Placement:
    """The part of a parameter that one rank owns: a TP shard, then a ZeRO-3 partition of that shard."""

    tp_dim: int | None = None  # 0 colwise, 1 rowwise, None whole on every TP rank
    tp_rank: int = 0
    tp_size: int = 1
    zero_rank: int = 0
    zero_size: int = 1


@dataclass(frozen=True, slots=True)
class ByteRange:
    """A run of one file whose elements all have the same dtype."""

    file: str
    offset: int  # bytes from the start of the file
    length: int  # bytes
    dtype: str


def byte_ranges(sources: Sequence[TensorEntry], place: Placement) -> Iterator[ByteRange]:
    """The bytes of this rank's part, in order; end to end they are its ZeRO-3 partition without the padding.

    A packed parameter has several sources, end to end, each split by TP for itself. Nothing is yielded for a rank whose
    partition is padding only.
    """
    start, stop = zero_span(sum(prod(shard_shape(source, place)) for source in sources), place)
    for source in sources:
        numel = prod(shard_shape(source, place))
        yield from _ranges_in(source, place, max(start, 0), min(stop, numel))
        start, stop = start - numel, stop - numel


def shard_shape(source: TensorEntry, place: Placement) -> tuple[int, ...]:
    """Shape of this rank's TP shard of `source`."""
    if place.tp_dim is None:
        return source.shape
    size, remainder = divmod(source.shape[place.tp_dim], place.tp_size)
    assert not remainder, f"{source.name}: dim {place.tp_dim} of {source.shape} is not divisible by {place.tp_size}"
    return (*source.shape[: place.tp_dim], size, *source.shape[place.tp_dim + 1 :])


def zero_span(numel: int, place: Placement) -> tuple[int, int]:
    """[start, stop) of this rank's ZeRO-3 partition in the flattened shard of `numel` elements.

    DeepSpeed gives every rank ceil(numel / zero_size) elements and pads the end; padding is left out here.
    """
    partition = -(-numel // place.zero_size)
    start = min(place.zero_rank * partition, numel)
    return start, min(start + partition, numel)


def _ranges_in(source: TensorEntry, place: Placement, start: int, stop: int) -> Iterator[ByteRange]:
    """Elements [start, stop) of this rank's shard of `source`, as runs that are contiguous in the file."""
    if place.tp_dim is None or place.tp_size == 1:
        run, stride, first = source.numel, source.numel, 0
    else:
        run = prod(shard_shape(source, place)[place.tp_dim :])  # elements of the shard that lie together in the file
        stride, first = run * place.tp_size, run * place.tp_rank
    while start < stop:
        row, column = divmod(start, run)
        length = min(run - column, stop - start)
        offset = source.offset + (row * stride + first + column) * source.itemsize
        yield ByteRange(source.file, offset, length * source.itemsize, source.dtype)
        start += length
