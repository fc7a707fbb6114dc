"""storage.weights against the safetensors library, in both directions, and against damaged files."""

import errno
import json
import os
import threading
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lora_scale.spec.errors import ModelError
from lora_scale.spec.layout import ByteRange
from lora_scale.storage.weights import ITEMSIZES, Reader, read_safetensors, write_safetensors

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64, "BOOL": torch.bool}


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def random_tensors() -> dict[str, torch.Tensor]:
    """Every dtype; a scalar, an empty tensor, an odd number of bytes, a name outside ASCII."""
    torch.manual_seed(0)
    return {
        "a": torch.randn(3, 5),
        "b.weight": torch.randn(7, 3).bfloat16(),
        "half": torch.randn(5).half(),
        "scalar": torch.tensor(3.0),
        "empty": torch.empty(0, 4),
        "ids": torch.arange(4),
        "mask": torch.ones(3, dtype=torch.bool),
        "größe": torch.randn(2),
    }


def file_of(header: str | bytes | dict[str, Any], data: bytes = b"") -> bytes:
    """A file whose data begins at byte 200, unless its header is longer."""
    header = json.dumps(header) if isinstance(header, dict) else header
    raw = (header.encode() if isinstance(header, str) else header).ljust(192)
    return len(raw).to_bytes(8, "little") + raw + data


def row(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    tensors = random_tensors()
    path = tmp_path / "w.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    entries, metadata = read_safetensors(path)
    assert metadata == {"format": "pt"}
    assert {n: (e.shape, DTYPES[e.dtype]) for n, e in entries.items()} == {
        n: (t.shape, t.dtype) for n, t in tensors.items()
    }
    with Reader() as reader:
        for name, tensor in tensors.items():
            buffer = bytearray(entries[name].nbytes)
            reader.read_into(entries[name].whole(), buffer)
            assert buffer == bytes_of(tensor), name
        assert reader.nbytes_read == sum(len(bytes_of(t)) for t in tensors.values())


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    tensors = dict(sorted(random_tensors().items(), key=lambda item: -item[1].element_size()))
    names = {dtype: name for name, dtype in DTYPES.items()}
    path = tmp_path / "w.safetensors"
    specs = [(name, names[t.dtype], tuple(t.shape)) for name, t in tensors.items()]
    arrays = (t.view(torch.int16).numpy() if t.dtype == torch.bfloat16 else t.numpy() for t in tensors.values())
    write_safetensors(path, specs, map(memoryview, arrays), {"format": "pt"})
    read = load_file(path)
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert min(e.offset for e in read_safetensors(path)[0].values()) % 8 == 0
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_item_sizes_are_the_librarys() -> None:
    """Every dtype in our table, one element of it, through the library's own parser."""
    for dtype, size in ITEMSIZES.items():
        (name, tensor), *_ = safetensors.deserialize(file_of({"x": row(dtype, [3], [0, 3 * size])}, bytes(3 * size)))
        assert (name, tensor["dtype"], tensor["shape"]) == ("x", dtype, [3])


GOOD = {"x": row(), "y": row(offsets=(8, 16))}
DAMAGED = {
    "empty file": (b"", "{}: has 0 bytes, too few for a safetensors file; copy or download it again"),
    "five bytes": (b"\x08\0\0\0\0", "{}: has 5 bytes, too few for a safetensors file; copy or download it again"),
    "header longer than the file": (
        (500).to_bytes(8, "little") + b"{}",
        "{}: is truncated: its header has 500 bytes, the file has 10; copy or download it again",
    ),
    "header over the limit": (
        (1 << 40).to_bytes(8, "little") + b"{}",
        "{}: is no safetensors file: its first 8 bytes give a header of 1099511627776 bytes",
    ),
    "git-LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "{} is a git-LFS pointer, not the weights; run `git lfs pull` in its folder",
    ),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(50), "{} is a GGUF file; download the model's safetensors files"),
    "torch's zip": (
        b"PK\3\4\0\0\x08\x08" + bytes(50),
        "{} is a zip archive or a torch pickle; convert it with transformers' save_pretrained",
    ),
    "pickle": (b"\x80\x02}q\0(X\x05\0", "{} is a pickle; convert it with transformers' save_pretrained"),
    "web page": (b"<!DOCTYPE html><html>", "{} is a web page, not the weights; download it again"),
    "no JSON": (
        file_of('{"x": '),
        "{}: the header is not valid JSON (Expecting value: line 1 column 193 (char 192)); the file is damaged",
    ),
    "no object": (
        file_of("[1, 2]"),
        "{}: the header is not valid JSON (it does not begin with {{); the file is damaged",
    ),
    "UTF-16": (
        file_of("{}".encode("utf-16")),
        "{}: the header is not valid JSON (it does not begin with {{); the file is damaged",
    ),
    "a name twice": (
        file_of('{"x": 1, "x": 2}'),
        "{}: the header is not valid JSON ('x' appears twice); the file is damaged",
    ),
    "metadata of numbers": (
        file_of('{"__metadata__": {"format": 1}}'),
        "{}: __metadata__ in the header is not a map of strings; the file is damaged",
    ),
    "row without offsets": (
        file_of('{"x": {"dtype": "F32", "shape": [2]}}', bytes(8)),
        "{}: the header's row of tensor 'x' is malformed; the file is damaged",
    ),
    "row that is a list": (
        file_of('{"x": []}'),
        "{}: the header's row of tensor 'x' is malformed; the file is damaged",
    ),
    "a negative dim": (
        file_of({"x": row(shape=[-2, -1])}, bytes(8)),
        "{}: the header's row of tensor 'x' is malformed; the file is damaged",
    ),
    "a dim that is true": (
        file_of({"x": row(shape=[True, 2])}, bytes(8)),
        "{}: the header's row of tensor 'x' is malformed; the file is damaged",
    ),
    "unknown dtype": (
        file_of({"x": row("F99", [16])}, bytes(8)),
        "{}: tensor 'x' has dtype F99; use a checkpoint in bf16, fp16 or fp32",
    ),
    "shape and bytes differ": (
        file_of({"x": row(shape=[3])}, bytes(8)),
        "{}: tensor 'x' has 8 bytes, but F32 of shape (3,) takes 12; the file is damaged",
    ),
    "offsets backwards": (
        file_of({"x": row(offsets=[8, 0])}, bytes(8)),
        "{}: tensor 'x' has -8 bytes, but F32 of shape (2,) takes 8; the file is damaged",
    ),
    "hole": (
        file_of({"x": row(), "y": row(offsets=[12, 20])}, bytes(20)),
        "{}: tensor 'y' begins at byte 212, where 208 was expected (a hole); the file is damaged",
    ),
    "hole at the start": (
        file_of({"x": row(offsets=[4, 12])}, bytes(12)),
        "{}: tensor 'x' begins at byte 204, where 200 was expected (a hole); the file is damaged",
    ),
    "overlap": (
        file_of({"x": row(), "y": row(offsets=[4, 12])}, bytes(12)),
        "{}: tensor 'y' begins at byte 204, where 208 was expected (an overlap); the file is damaged",
    ),
    "cut by one byte": (
        file_of(GOOD, bytes(15)),
        "{}: is truncated: its header describes 216 bytes, the file has 215; copy or download it again",
    ),
    "one byte too many": (
        file_of(GOOD, bytes(17)),
        "{}: has bytes that belong to no tensor: its header describes 216 bytes, the file has 217; "
        "copy or download it again",
    ),
}


@pytest.mark.parametrize("content, message", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read_safetensors(path)
    assert str(caught.value) == message.format(path)
    with pytest.raises(Exception):  # noqa: B017 - the library has no error of its own for every case
        safetensors.deserialize(content)


def test_deep_nesting_is_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(file_of('{"x":' + "[" * 100_000))
    with pytest.raises(ModelError, match=r"the header is not valid JSON \(.*recursion.*\); the file is damaged"):
        read_safetensors(path)


def test_half_byte_elements_are_refused(tmp_path: Path) -> None:
    """Valid for the library, but two elements share a byte and no byte range is a run of them."""
    path = tmp_path / "w.safetensors"
    path.write_bytes(file_of({"x": row("F4", [16])}, bytes(8)))
    with pytest.raises(ModelError, match="tensor 'x' has dtype F4; use a checkpoint in bf16, fp16 or fp32"):
        read_safetensors(path)


_SMALL = st.integers(-1, 20)
_ROWS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F99"]),
        "shape": st.lists(_SMALL, max_size=2),
        "data_offsets": st.tuples(_SMALL, _SMALL),
    }
)


@given(header=st.dictionaries(st.sampled_from("abc"), _ROWS, max_size=3), extra=st.integers(-2, 2), data=st.data())
@example(header={"a": row("U8", [4], (0, 4)), "b": row("U8", [0], (0, 0))}, extra=0, data=None)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_accepts_exactly_what_the_library_accepts(
    tmp_path: Path, header: dict[str, Any], extra: int, data: Any
) -> None:
    """Random headers, most of them lies, half of them repaired to be nearly right."""
    if data is not None and data.draw(st.booleans()):
        end = 0
        for entry in header.values():
            entry["shape"] = [abs(n) for n in entry["shape"]]
            length = int(np.prod(entry["shape"])) * ITEMSIZES.get(entry["dtype"], 1)
            entry["data_offsets"] = (end, end + length)
            end += length
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    content = file_of(header, bytes(max(end + extra, 0)))
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    try:
        theirs = {name: (t["dtype"], tuple(t["shape"])) for name, t in safetensors.deserialize(content)}
    except safetensors.SafetensorError:
        theirs = None
    try:
        ours = {name: (e.dtype, e.shape) for name, e in read_safetensors(path)[0].items()}
    except ModelError:
        ours = None
    assert ours == theirs


def test_missing_and_forbidden_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"^.*/none: cannot be read: No such file or directory$"):
        read_safetensors(tmp_path / "none")
    with pytest.raises(ModelError, match="cannot be read: Is a directory"):
        read_safetensors(tmp_path)
    with Reader() as reader, pytest.raises(ModelError, match=r"/none: cannot be read at byte 7: No such file"):
        reader.read_into(ByteRange(str(tmp_path / "none"), 7, 1, "U8"), bytearray(1))


def test_reads_the_header_and_nothing_else(tmp_path: Path) -> None:
    """Counted by the kernel: two small reads for 4 MB of weights, and the reading of the count itself."""
    path = tmp_path / "w.safetensors"
    save_file({"x": torch.zeros(1_000_000)}, path)
    before = _rchar()
    read_safetensors(path)
    assert 8 < _rchar() - before < 1000
    before = _rchar()
    with Reader() as reader:
        reader.read_into(ByteRange(str(path), 100, 3_000_000, "U8"), bytearray(3_000_000))
    assert 3_000_000 <= _rchar() - before < 3_001_000


def _rchar() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


def test_reader_goes_on_after_short_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may give fewer bytes than asked for, and gives at most 2 GiB."""
    path = tmp_path / "f"
    path.write_bytes(bytes(range(100)))
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:7]], offset))
    buffer = bytearray(50)
    with Reader() as reader:
        reader.read_into(ByteRange(str(path), 20, 50, "U8"), buffer)
    assert buffer == bytes(range(20, 70))


def test_reader_names_a_file_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(100))
    with Reader() as reader, pytest.raises(ModelError) as caught:
        reader.read_into(ByteRange(str(path), 90, 30, "U8"), bytearray(30))
    assert str(caught.value) == (
        f"{path}: ends at byte 100, where 20 more were expected; it was changed or cut after its header was read"
    )


def test_reader_names_a_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    (tmp_path / "f").write_bytes(b"x")
    monkeypatch.setattr(os, "preadv", fail)
    with Reader() as reader, pytest.raises(ModelError, match=r"/f: cannot be read at byte 0: Input/output error$"):
        reader.read_into(ByteRange(str(tmp_path / "f"), 0, 1, "U8"), bytearray(1))


def test_reader_wants_the_buffer_to_fit(tmp_path: Path) -> None:
    with Reader() as reader, pytest.raises(AssertionError, match="a buffer of 3 bytes"):
        reader.read_into(ByteRange(str(tmp_path), 0, 4, "U8"), bytearray(3))


def test_threads_share_a_reader_and_its_files_are_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening is slow here, so that the threads meet there."""
    open_file = os.open
    monkeypatch.setattr(os, "open", lambda *args: time.sleep(0.01) or open_file(*args))
    content = np.random.default_rng(0).bytes(64_000)
    for name in "ab":
        (tmp_path / name).write_bytes(content)
    buffer = bytearray(64_000)
    before = len(os.listdir("/proc/self/fd"))
    with Reader() as reader:
        start = threading.Barrier(16)

        def work(k: int) -> None:
            start.wait()
            for i in range(k, 64, 16):
                part = ByteRange(str(tmp_path / "ab"[i % 2]), i * 1000, 1000, "U8")
                reader.read_into(part, memoryview(buffer)[i * 1000 : (i + 1) * 1000])

        threads = [threading.Thread(target=work, args=(k,)) for k in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(os.listdir("/proc/self/fd")) == before + 2  # each file is opened once
    assert len(os.listdir("/proc/self/fd")) == before
    assert buffer == content
    assert reader.nbytes_read == 64_000


def test_writing_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    def tensors() -> Iterator[memoryview]:
        for _ in range(20):
            yield memoryview(np.zeros(250_000, np.float32))

    specs = [(f"w{i}", "F32", (250, 1000)) for i in range(20)]
    tracemalloc.start()
    write_safetensors(tmp_path / "w", specs, tensors())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2.2e6  # the one being written and the next, of 1 MB each; all are 20 MB
    assert (tmp_path / "w").stat().st_size > 20e6


@pytest.mark.parametrize(
    "specs, tensors, match",
    [
        ([("x", "F32", (2,))], [bytes(7)], r"'x', F32 \(2,\), got 7 bytes"),
        ([("x", "F32", (2,))], [bytes(8), bytes(8)], "longer"),
        ([("x", "F32", (2,)), ("y", "F32", (2,))], [bytes(8)], "shorter"),
        ([("x", "F32", (2,)), ("x", "F32", (2,))], [bytes(8), bytes(8)], "'x' is given twice"),
        (
            [("x", "U8", (3,)), ("y", "F32", (2,))],
            [bytes(3), bytes(8)],
            "'y' would be unaligned; put wider dtypes first",
        ),
    ],
    ids=["short tensor", "tensor too many", "tensor too few", "name twice", "unaligned"],
)
def test_writing_checks_its_tensors(tmp_path: Path, specs: list[Any], tensors: list[bytes], match: str) -> None:
    with pytest.raises((AssertionError, ValueError), match=match):
        write_safetensors(tmp_path / "w", specs, tensors)


def test_writing_goes_on_after_short_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, view: write(fd, view[:11]))
    write_safetensors(tmp_path / "w", [("x", "U8", (100,))], [bytes(range(100))])
    monkeypatch.undo()
    assert bytes_of(load_file(tmp_path / "w")["x"]) == bytes(range(100))


def test_writing_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "w").write_text("mine")
    with pytest.raises(FileExistsError):
        write_safetensors(tmp_path / "w", [("x", "U8", (1,))], [b"x"])


def test_no_space_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, view: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"^\[Errno 28\] No space left on device: '.*/w'$"):
        write_safetensors(tmp_path / "w", [("x", "U8", (1,))], [b"x"])
