"""Where each element of a parameter lives: in the checkpoint files, and on which rank.

Pure integer arithmetic: no torch, no files, no process groups. Two facts make it short. safetensors stores a tensor
flattened, row by row, and a ZeRO-3 partition is a contiguous run of the flattened parameter; so one rank's partition of
a tensor that is not split by tensor parallelism is *one* byte range.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from lora_scale.spec.splits import Split

FLAT_ALIGNMENT = 512  # bytes; what a parameter begins at inside a flat unit, and a piece of it too
FLAT_BUFFERS = 2  # gathered units at a time: the one at work and the next


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as a safetensors header describes it."""

    name: str
    file: str
    dtype: str  # as in the header: "BF16", "F16", "F32", ...
    shape: tuple[int, ...]
    itemsize: int
    offset: int  # bytes from the start of the file
    blocks: "Blocks | None" = None  # set: the elements are to be multiplied by their blocks' scales

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.itemsize

    def whole(self) -> "ByteRange":
        return ByteRange(self.file, self.offset, self.nbytes, self.dtype)


@dataclass(frozen=True, slots=True)
class Blocks:
    """The scales of a matrix stored in fp8, one for each block; the last block of a row or column may be cut."""

    scales: TensorEntry  # (block rows, block columns)
    rows: int  # of elements in a block
    columns: int

    def touched(self, columns: int, start: int, stop: int) -> tuple[int, int]:
        """The rows of `scales` that elements [start, stop) of a flattened matrix of so many columns need."""
        return start // columns // self.rows, (stop - 1) // columns // self.rows + 1

    def scale_bytes(self, columns: int, start: int, stop: int) -> "ByteRange":
        """Where those rows lie: one run of the file."""
        first, last = self.touched(columns, start, stop)
        row = self.scales.shape[1] * self.scales.itemsize
        return ByteRange(self.scales.file, self.scales.offset + first * row, (last - first) * row, self.scales.dtype)


@dataclass(frozen=True, slots=True)
class Placement:
    """The part of a parameter that one rank owns: a TP shard, then a run of it: a ZeRO-3 partition, or what lies in the
    rank's piece of a flat unit."""

    split: Split | None = None  # None: whole on every TP rank
    tp_rank: int = 0
    tp_size: int = 1
    zero_rank: int = 0
    zero_size: int = 1
    span: tuple[int, int] | None = None  # elements of the flattened shard, in place of an equal partition of it

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of this rank's TP shard of a tensor of that shape."""
        return whole if self.split is None else self.split.shape(whole, self.tp_rank, self.tp_size)


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
    for source, start, stop in zero_spans(sources, place):
        yield from ranges_in(source, place, start, stop)


def zero_spans(sources: Sequence[TensorEntry], place: Placement) -> Iterator[tuple[TensorEntry, int, int]]:
    """The elements [start, stop) that this rank owns of each source's flattened shard, where there are any."""
    start, stop = zero_span(sum(prod(place.shape(source.shape)) for source in sources), place)
    for source in sources:
        numel = prod(place.shape(source.shape))
        if max(start, 0) < min(stop, numel):
            yield source, max(start, 0), min(stop, numel)
        start, stop = start - numel, stop - numel


def zero_span(numel: int, place: Placement) -> tuple[int, int]:
    """[start, stop) of this rank's part of the flattened shard of `numel` elements: `span`, or its ZeRO-3 partition.

    DeepSpeed gives every rank ceil(numel / zero_size) elements and pads the end; padding is left out here.
    """
    if place.span is not None:
        return place.span
    partition = -(-numel // place.zero_size)
    start = min(place.zero_rank * partition, numel)
    return start, min(start + partition, numel)


def runs(whole: tuple[int, ...], place: Placement) -> tuple[int, list[tuple[int, int]]]:
    """How this rank's TP shard lies in the flattened tensor: (elements of a row, [start, stop) of each run in a row).

    Every row is alike: the dims before the cut one count the rows, the cut dim and those after it make one row.
    """
    if place.split is None:
        return prod(whole), [(0, prod(whole))]
    dim = place.split.dim % len(whole)
    inner = prod(whole[dim + 1 :])
    spans = place.split.spans(whole[dim], place.tp_rank, place.tp_size)
    return whole[dim] * inner, [(start * inner, stop * inner) for start, stop in spans]


def ranges_in(source: TensorEntry, place: Placement, start: int, stop: int) -> Iterator[ByteRange]:
    """Elements [start, stop) of this rank's shard of `source`, as runs that are contiguous in the file."""
    row, spans = runs(source.shape, place)
    if spans == [(0, row)]:  # all of each row: one run
        row, spans = source.numel, [(0, source.numel)]
    kept = sum(last - first for first, last in spans)
    position = start // kept * kept if kept else stop
    while position < stop:
        for first, last in spans:
            begin, end = max(start, position), min(stop, position + last - first)
            if begin < end:
                at = position // kept * row + first + begin - position
                yield ByteRange(
                    source.file, source.offset + at * source.itemsize, (end - begin) * source.itemsize, source.dtype
                )
            position += last - first


def flat_piece(nbytes: int, ranks: int) -> int:
    """Bytes of each rank's piece of a flat unit of so many bytes; the end of the last is padding."""
    return -(-nbytes // (ranks * FLAT_ALIGNMENT)) * FLAT_ALIGNMENT


def flat_bytes(members: Sequence[int]) -> int:
    """Bytes of a flat unit, from those of its parameters."""
    return sum(-(-nbytes // FLAT_ALIGNMENT) * FLAT_ALIGNMENT for nbytes in members)
