"""safetensors files: headers read and checked, byte ranges read into place, files written one tensor at a time.

Bytes only: no torch, no numpy, no arithmetic on elements, and never mmap, so that /proc/self/io counts every byte read.
Which bytes a rank needs is `spec.layout`'s; what a folder must hold is `storage.folder`'s; how a write survives a crash
is `storage.durable`'s. The format: https://huggingface.co/docs/safetensors#format
"""

import json
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Self

from lora_scale.spec.errors import ModelError
from lora_scale.spec.layout import ByteRange, TensorEntry
from lora_scale.storage import durable

ITEMSIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 8),
}
"""Bytes of an element, by the names that safetensors headers use. F4 and F6 are left out: several share a byte."""

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit

_MAGICS = {  # how a file begins that is something else under the name of a safetensors file
    b"version ": "is a git-LFS pointer, not the weights; run `git lfs pull` in its folder",
    b"GGUF": "is a GGUF file; download the model's safetensors files",
    b"PK\x03\x04": "is a zip archive or a torch pickle; convert it with transformers' save_pretrained",
    b"\x80\x02": "is a pickle; convert it with transformers' save_pretrained",
    b"<": "is a web page, not the weights; download it again",
}


def read_safetensors(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """The tensors of one file by name, in the order of their bytes, and the file's metadata.

    Reads the header and nothing else. Checked: every byte of the file belongs to exactly one tensor, and every tensor's
    bytes fit its dtype and shape.
    """
    header, start, size = _read_header(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelError(f"{path}: __metadata__ in the header is not a map of strings; the file is damaged")
    entries = sorted(
        (_entry(path, name, value, start) for name, value in header.items()),
        key=lambda entry: (entry.offset, entry.nbytes),  # an empty tensor comes before the one that begins there
    )
    end = start
    for entry in entries:
        if entry.offset != end:
            what = "a hole" if entry.offset > end else "an overlap"
            raise ModelError(
                f"{path}: tensor {entry.name!r} begins at byte {entry.offset}, where {end} was expected ({what}); "
                f"the file is damaged"
            )
        end += entry.nbytes
    if end != size:
        what = "is truncated" if size < end else "has bytes that belong to no tensor"
        raise ModelError(
            f"{path}: {what}: its header describes {end} bytes, the file has {size}; copy or download it again"
        )
    return {entry.name: entry for entry in entries}, metadata


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The parsed header, the byte at which the data begins, and the size of the file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = os.fstat(descriptor).st_size
            first = os.pread(descriptor, 8, 0)
            length = int.from_bytes(first, "little")
            for magic, what in _MAGICS.items():
                if first.startswith(magic) and length > MAX_HEADER_BYTES:
                    raise ModelError(f"{path} {what}")
            if len(first) < 8:
                raise ModelError(f"{path}: has {size} bytes, too few for a safetensors file; copy or download it again")
            if length > MAX_HEADER_BYTES:
                raise ModelError(f"{path}: is no safetensors file: its first 8 bytes give a header of {length} bytes")
            if 8 + length > size:
                raise ModelError(
                    f"{path}: is truncated: its header has {length} bytes, the file has {size}; "
                    f"copy or download it again"
                )
            raw = os.pread(descriptor, length, 8)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        if not raw.startswith(b"{"):
            raise ValueError("it does not begin with {")
        header = json.loads(raw.decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: the header is not valid JSON ({error}); the file is damaged") from error
    return header, 8 + length, size


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice")
    return result


def _entry(path: Path, name: str, value: Any, start: int) -> TensorEntry:
    """One row of the header, checked for itself."""
    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
        well_formed = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        well_formed = False
    if not well_formed:
        raise ModelError(f"{path}: the header's row of tensor {name!r} is malformed; the file is damaged")
    if not isinstance(dtype, str) or dtype not in ITEMSIZES:
        raise ModelError(f"{path}: tensor {name!r} has dtype {dtype}; use a checkpoint in bf16, fp16 or fp32")
    nbytes = prod(shape) * ITEMSIZES[dtype]
    if end - begin != nbytes:
        raise ModelError(
            f"{path}: tensor {name!r} has {end - begin} bytes, but {dtype} of shape {tuple(shape)} takes {nbytes}; "
            f"the file is damaged"
        )
    return TensorEntry(name, str(path), dtype, tuple(shape), ITEMSIZES[dtype], start + begin)


class Reader:
    """Reads byte ranges of files that it keeps open. Threads may share one; leave the `with` when all have finished."""

    nbytes_read: int  # by all threads

    def __init__(self) -> None:
        self.nbytes_read = 0
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def read_into(self, source: ByteRange, buffer: memoryview | bytearray) -> None:
        """Fills `buffer`, which must have `source.length` bytes, or raises ModelError."""
        view = _as_bytes(buffer)
        assert len(view) == source.length, f"a buffer of {len(view)} bytes for {source}"
        try:
            descriptor = self._descriptor(source.file)
            done = 0
            while done < source.length:  # one call reads at most 2 GiB
                count = os.preadv(descriptor, [view[done:]], source.offset + done)
                if not count:
                    raise ModelError(
                        f"{source.file}: ends at byte {source.offset + done}, where {source.length - done} more were "
                        f"expected; it was changed or cut after its header was read"
                    )
                done += count
        except OSError as error:
            raise ModelError(f"{source.file}: cannot be read at byte {source.offset}: {error.strerror}") from error
        with self._lock:
            self.nbytes_read += source.length

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            return self._descriptors[file]


def write_safetensors(
    path: Path,
    specs: Sequence[tuple[str, str, tuple[int, ...]]],
    tensors: Iterable[bytes | bytearray | memoryview],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes and syncs a new file of the tensors (name, dtype, shape) in `specs`, taking their bytes one at a time.

    `tensors` may be a generator, so that one tensor is in memory at once. Put wider dtypes first: readers that map the
    file need aligned tensors. transformers wants metadata {"format": "pt"}. Not atomic by itself: use it inside
    `durable.whole_directory`.
    """
    durable.write_file(path, _file_chunks(path, specs, tensors, metadata))


def header_bytes(
    path: Path, specs: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """What a file begins with; the tensors follow it in this order, without gaps."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, dtype, shape in specs:
        begin, end = end, end + prod(shape) * ITEMSIZES[dtype]
        assert name not in header, f"{path}: tensor {name!r} is given twice"
        assert begin % ITEMSIZES[dtype] == 0, f"{path}: tensor {name!r} would be unaligned; put wider dtypes first"
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # as the library pads: the data begins at a multiple of 8
    return len(raw).to_bytes(8, "little") + raw


def _file_chunks(
    path: Path,
    specs: Sequence[tuple[str, str, tuple[int, ...]]],
    tensors: Iterable[bytes | bytearray | memoryview],
    metadata: Mapping[str, str] | None,
) -> Iterator[bytes | memoryview]:
    yield header_bytes(path, specs, metadata)
    for (name, dtype, shape), tensor in zip(specs, tensors, strict=True):
        view = _as_bytes(tensor)
        assert len(view) == prod(shape) * ITEMSIZES[dtype], f"{path}: {name!r}, {dtype} {shape}, got {len(view)} bytes"
        yield view


def _as_bytes(buffer: bytes | bytearray | memoryview) -> memoryview:
    view = memoryview(buffer)
    return view.cast("B") if view.nbytes else memoryview(b"")  # Python does not cast views with a zero in their shape
