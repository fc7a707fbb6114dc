"""spec.layout against torch's slicing, and that every byte of every tensor has exactly one owner."""

from collections import Counter
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lora_scale.spec.layout import ByteRange, Placement, TensorEntry, byte_ranges, shard_shape, zero_span

TORCH = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def entries(shapes: list[tuple[int, ...]], itemsize: int = 2) -> list[TensorEntry]:
    """Tensors in one file, with a gap of 3 bytes before each, so that a range that runs over shows."""
    result, offset = [], 0
    for i, shape in enumerate(shapes):
        result.append(TensorEntry(f"w{i}", "f", {1: "U8", 2: "I16", 4: "I32"}[itemsize], shape, itemsize, offset + 3))
        offset += 3 + result[-1].nbytes
    return result


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[TensorEntry], int | None, int, int]:
    """Up to three sources of one parameter, how TP splits them, and the sizes of both groups."""
    n_dims = draw(st.integers(0, 3))
    tp_size = draw(st.integers(1, 4))
    tp_dim = draw(st.sampled_from([None, *range(n_dims)]))
    split = st.integers(0, 2).map(lambda n: n * tp_size)
    sizes = [split if d == tp_dim else st.integers(0, 4) for d in range(n_dims)]
    shapes = draw(st.lists(st.tuples(*sizes), min_size=1, max_size=3))
    return entries(shapes, draw(st.sampled_from([1, 2, 4]))), tp_dim, tp_size, draw(st.integers(1, 7))


@given(cases())
def test_every_byte_has_one_owner(case: tuple[list[TensorEntry], int | None, int, int]) -> None:
    sources, tp_dim, tp_size, zero_size = case
    owners: Counter[int] = Counter()
    for t, z in product(range(tp_size if tp_dim is not None else 1), range(zero_size)):
        for run in byte_ranges(sources, Placement(tp_dim, t, tp_size, z, zero_size)):
            owners.update(range(run.offset, run.offset + run.length))
    assert owners == Counter(byte for s in sources for byte in range(s.offset, s.offset + s.nbytes))


@given(cases(), st.data())
def test_agrees_with_torch(case: tuple[list[TensorEntry], int | None, int, int], data: st.DataObject) -> None:
    """The bytes of the ranges, end to end, are chunk() over TP, cat() over the sources, and a slice over ZeRO."""
    sources, tp_dim, tp_size, zero_size = case
    file = torch.randint(0, 256, (sources[-1].offset + sources[-1].nbytes,), dtype=torch.uint8)
    t, z = data.draw(st.integers(0, tp_size - 1)), data.draw(st.integers(0, zero_size - 1))
    shards = []
    for s in sources:
        whole = file[s.offset : s.offset + s.nbytes].clone().view(TORCH[s.itemsize]).view(s.shape)
        if tp_dim is not None:
            size = s.shape[tp_dim] // tp_size
            whole = whole.narrow(tp_dim, t * size, size)
        shards.append(whole.reshape(-1))
    shard = torch.cat(shards)
    partition = -(-shard.numel() // zero_size)
    want = shard[z * partition : (z + 1) * partition]
    raw = file.numpy().tobytes()
    runs = byte_ranges(sources, Placement(tp_dim, t, tp_size, z, zero_size))
    assert b"".join(raw[r.offset : r.offset + r.length] for r in runs) == want.numpy().tobytes()


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


@pytest.mark.parametrize(
    "tp_dim, tp_size, n_ranges",
    [(None, 1, 1), (0, 1, 1), (1, 1, 1), (0, 2, 1), (1, 2, 8)],
    ids=["whole", "colwise 1", "rowwise 1", "colwise 2", "rowwise 2: one a row"],
)
def test_number_of_ranges(tp_dim: int | None, tp_size: int, n_ranges: int) -> None:
    """Reads cost by their number: only a rowwise shard is in pieces, one for each row."""
    assert len(list(byte_ranges(entries([(8, 6)]), Placement(tp_dim, tp_size - 1, tp_size)))) == n_ranges


def test_sources_in_other_files_and_dtypes() -> None:
    """The middle rank's partition of a packed parameter crosses from one file into another of another dtype."""
    gate = TensorEntry("gate", "a", "BF16", (2, 3), 2, offset=100)
    up = TensorEntry("up", "b", "F32", (2, 3), 4, offset=200)
    runs = list(byte_ranges([gate, up], Placement(zero_rank=1, zero_size=3)))
    assert runs == [ByteRange("a", 108, 4, "BF16"), ByteRange("b", 200, 8, "F32")]
    assert gate.whole() == ByteRange("a", 100, 12, "BF16")


def test_shard_shapes() -> None:
    source = entries([(8, 6)])[0]
    assert shard_shape(source, Placement()) == (8, 6)
    assert shard_shape(source, Placement(0, 1, 4)) == (2, 6)
    assert shard_shape(source, Placement(1, 1, 3)) == (8, 2)
    with pytest.raises(AssertionError, match=r"w0: dim 1 of \(8, 6\) is not divisible by 4"):
        shard_shape(source, Placement(1, 0, 4))
