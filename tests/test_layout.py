"""spec.layout against torch's slicing, and that every byte of every tensor has exactly one owner."""

import math
from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_scale.spec.layout import ByteRange, Placement, TensorEntry, byte_ranges, zero_span
from lora_scale.spec.splits import Part, Split

TORCH = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def entries(shapes: list[tuple[int, ...]], itemsize: int = 2) -> list[TensorEntry]:
    """Tensors in one file, with a gap of 3 bytes before each, so that a range that runs over shows."""
    result, offset = [], 0
    for i, shape in enumerate(shapes):
        result.append(TensorEntry(f"w{i}", "f", {1: "U8", 2: "I16", 4: "I32"}[itemsize], shape, itemsize, offset + 3))
        offset += 3 + result[-1].nbytes
    return result


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[TensorEntry], Split | None, int, int]:
    """Up to three sources of one parameter, how TP cuts them, and the sizes of both groups."""
    n_dims = draw(st.integers(0, 3))
    tp_size = draw(st.integers(1, 4))
    dim = draw(st.sampled_from([None, *range(-n_dims, 0)]))
    parts = draw(st.lists(st.builds(Part, st.integers(0, 6), st.sampled_from(["pieces", "whole"])), max_size=3))
    parts = parts or [Part(draw(st.integers(0, 6)), "first")]
    sizes = [st.just(sum(p.size for p in parts)) if d == dim else st.integers(0, 4) for d in range(-n_dims, 0)]
    shapes = draw(st.lists(st.tuples(*sizes), min_size=1, max_size=3))
    split = None if dim is None else Split(dim, tuple(parts))
    return entries(shapes, draw(st.sampled_from([1, 2, 4]))), split, tp_size, draw(st.integers(1, 7))


@given(cases())
def test_every_byte_has_one_owner(case: tuple[list[TensorEntry], Split | None, int, int]) -> None:
    """Bytes of a part that is kept whole have one owner a TP rank; all others exactly one."""
    sources, split, tp_size, zero_size = case
    owners: Counter[int] = Counter()
    for t, z in product(range(tp_size if split else 1), range(zero_size)):
        for run in byte_ranges(sources, Placement(split, t, tp_size, z, zero_size)):
            owners.update(range(run.offset, run.offset + run.length))
    wanted: Counter[int] = Counter()
    for s in sources:
        count = torch.ones(s.shape, dtype=torch.int64)
        if split:
            along = [tp_size if part.kept == "whole" else 1 for part in split.parts for _ in range(part.size)]
            count = count.movedim(split.dim, -1).mul(torch.tensor(along, dtype=torch.int64)).movedim(-1, split.dim)
        for element, n in enumerate(count.flatten().tolist()):
            wanted.update({s.offset + element * s.itemsize + byte: n for byte in range(s.itemsize)})
    assert owners == wanted


@given(cases(), st.data())
def test_agrees_with_torch(case: tuple[list[TensorEntry], Split | None, int, int], data: st.DataObject) -> None:
    """The bytes of the ranges, end to end, are chunk() over TP, cat() over the sources, and a slice over ZeRO."""
    sources, split, tp_size, zero_size = case
    file = torch.randint(0, 256, (sources[-1].offset + sources[-1].nbytes,), dtype=torch.uint8)
    t, z = data.draw(st.integers(0, tp_size - 1)), data.draw(st.integers(0, zero_size - 1))
    place = Placement(split, t, tp_size, z, zero_size)
    shards = []
    for s in sources:
        whole = file[s.offset : s.offset + s.nbytes].clone().view(TORCH[s.itemsize]).view(s.shape)
        if split:
            pieces = []
            for part, tensor in zip(split.parts, whole.split([p.size for p in split.parts], split.dim), strict=True):
                if part.kept == "pieces":
                    pieces.append(tensor.tensor_split(borders(part.size, tp_size), split.dim)[t])
                elif part.kept == "whole" or t == 0:
                    pieces.append(tensor)
            whole = torch.cat(pieces, split.dim) if pieces else whole.narrow(split.dim, 0, 0)
        first_only = split is not None and split.parts[0].kept == "first"
        assert place.shape(s.shape) == (s.shape if first_only else tuple(whole.shape))
        shards.append(whole.reshape(-1))
    shard = torch.cat(shards)
    partition = -(-sum(math.prod(place.shape(s.shape)) for s in sources) // zero_size)
    want = shard[z * partition : (z + 1) * partition]
    raw = file.numpy().tobytes()
    runs = byte_ranges(sources, place)
    assert b"".join(raw[r.offset : r.offset + r.length] for r in runs) == want.numpy().tobytes()


def borders(size: int, ranks: int) -> list[int]:
    return [size * rank // ranks for rank in range(1, ranks)]


@given(st.integers(0, 10_000), st.integers(1, 300))
def test_zero_spans_are_deepspeeds_partitions(numel: int, zero_size: int) -> None:
    """Pad to a multiple of the group, cut into equal parts, take the padding away: what `ds_tensor` holds."""
    padded = numel + -numel % zero_size
    part = padded // zero_size
    for rank in range(zero_size):
        start, stop = zero_span(numel, Placement(zero_rank=rank, zero_size=zero_size))
        assert (start, stop) == (min(rank * part, numel), min((rank + 1) * part, numel))


def test_a_rank_of_padding_only_reads_nothing() -> None:
    """5 elements over 4 ranks: partitions of 2, and the last rank has none."""
    source = entries([(5,)])
    runs = [[r.length for r in byte_ranges(source, Placement(zero_rank=z, zero_size=4))] for z in range(4)]
    assert runs == [[4], [4], [2], []]


COLWISE, ROWWISE = Split(-2, (Part(8),)), Split(-1, (Part(6),))


@pytest.mark.parametrize(
    "split, tp_size, n_ranges",
    [
        (None, 1, 1),
        (COLWISE, 1, 1),
        (ROWWISE, 1, 1),
        (COLWISE, 2, 1),
        (ROWWISE, 2, 8),
        (Split(-2, (Part(4), Part(2), Part(2))), 2, 3),
        (Split(-1, (Part(2), Part(2), Part(2))), 2, 24),
    ],
    ids=["whole", "colwise 1", "rowwise 1", "colwise 2", "rowwise 2: one a row", "q, k, v", "q, k, v as columns"],
)
def test_number_of_ranges(split: Split | None, tp_size: int, n_ranges: int) -> None:
    """Reads cost by their number: only a shard of columns is in pieces, one for each row."""
    assert len(list(byte_ranges(entries([(8, 6)]), Placement(split, tp_size - 1, tp_size)))) == n_ranges


def test_sources_in_other_files_and_dtypes() -> None:
    """The middle rank's partition of a packed parameter crosses from one file into another of another dtype."""
    gate = TensorEntry("gate", "a", "BF16", (2, 3), 2, offset=100)
    up = TensorEntry("up", "b", "F32", (2, 3), 4, offset=200)
    runs = list(byte_ranges([gate, up], Placement(zero_rank=1, zero_size=3)))
    assert runs == [ByteRange("a", 108, 4, "BF16"), ByteRange("b", 200, 8, "F32")]
    assert gate.whole() == ByteRange("a", 100, 12, "BF16")


def test_the_tensors_of_a_packed_parameter_are_cut_like_its_parts() -> None:
    """Files hold gate and up apart, the model one after the other: the shard is the same."""
    both = Split(-2, (Part(4), Part(4)))
    fused, apart = entries([(2, 8, 3)]), entries([(4, 3)] * 4)
    lengths = [sum(r.length for r in byte_ranges(sources, Placement(both, 1, 2))) for sources in (fused, apart)]
    assert lengths == [2 * 2 * 2 * 3 * 2] * 2
    assert Placement(both, 1, 2).shape((2, 8, 3)) == (2, 4, 3)
    starts = [r.offset - 3 for r in byte_ranges(fused, Placement(both, 1, 2))]
    assert starts == [2 * 3 * rows for rows in (2, 6, 10, 14)]
