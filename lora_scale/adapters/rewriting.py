"""The files of a merge: each piece of the base read, added to and written; and the way back, as a check.

An adapted piece is added to in fp32 and rounded once, to the base's dtype. Memory: the adapters in fp32, and for each
thread one piece in the base's dtype and one in fp32, whatever the size of tensors and files. Pieces are cut by shapes
alone, so the bytes do not depend on threads or on kills.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lora_scale.adapters.merging import Piece, Plan, Update
from lora_scale.spec.errors import CheckpointError
from lora_scale.spec.layout import ByteRange
from lora_scale.storage.staging import WholeFile
from lora_scale.storage.weights import Reader

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def write(plan: Plan, out: Path, threads: int, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
    """Write the files that `out` does not have yet, each whole or not there; the bytes written by this call.

    `progress(done, total)` counts bytes, those of files that are there already as done.
    """
    targets = [_Target(file, out / file.relative_to(plan.folder.path)) for file in plan.folder.files]
    done = sum(target.size for target in targets if target.is_whole)
    return _run(plan, [target for target in targets if not target.is_whole], threads, done, progress)


@dataclass(slots=True)
class _Target:
    """One file under way. It is opened by the thread that takes its first piece, finished by the one with its last."""

    source: Path
    path: Path
    size: int = 0
    file: WholeFile | None = None
    left: int = 0  # bytes not written yet
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.size = self.left = self.source.stat().st_size

    @property
    def is_whole(self) -> bool:
        return self.path.is_file() and self.path.stat().st_size == self.size

    def write(self, offset: int, data: memoryview) -> None:
        with self.lock:
            if self.file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = WholeFile(self.path, self.size)
        self.file.write(offset, data)
        with self.lock:
            self.left -= len(data)
            last = not self.left
        if last:
            self.file.finish()


def _run(plan: Plan, targets: list[_Target], threads: int, done: int, progress: Callable[[int, int], None]) -> int:
    """A few threads take one piece after the other. The first error ends the others and is raised here."""
    queue = ((target, piece) for target in targets for piece in plan.pieces(target.source))
    total, before = done + sum(target.size for target in targets), done
    lock, failed = threading.Lock(), threading.Event()

    def work() -> None:
        nonlocal done
        torch.set_num_threads(1)  # of this Python thread: the threads are the parallelism
        workspace = _Workspace()
        try:
            while not failed.is_set():
                with lock:
                    target, piece = next(queue, (None, None))
                if target is None or piece is None:
                    break
                target.write(piece.range.offset, workspace.make(reader, plan, piece))
                with lock:
                    done += piece.range.length
                    progress(done, total)
        except BaseException:
            failed.set()
            raise

    try:
        with Reader() as reader, ThreadPoolExecutor(threads) as pool:
            try:
                for future in [pool.submit(work) for _ in range(threads)]:
                    future.result()
            except BaseException:  # also Ctrl-C, which only this thread gets
                failed.set()
                raise
    finally:
        for target in targets:
            if target.file is not None:
                target.file.discard()
    return total - before


class _Workspace:
    """The buffers of one thread."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)
        self._sums = torch.empty(0, dtype=torch.float32)

    def make(self, reader: Reader, plan: Plan, piece: Piece) -> memoryview:
        """The merged bytes of one piece, good until the next call."""
        if self._bytes.numel() < piece.range.length:
            self._bytes = torch.empty(piece.range.length, dtype=torch.uint8)
        stored = self._bytes[: piece.range.length]
        reader.read_into(piece.range, memoryview(stored.numpy()))
        if piece.entry is not None:
            weight = stored.view(_DTYPES[piece.entry.dtype]).view(-1, piece.entry.shape[1])
            if not self._add(weight, piece.row, plan.updates[piece.entry.name]):
                raise CheckpointError(
                    f"{piece.entry.name} with its update is not finite in {piece.entry.dtype}: the base is not, or the "
                    "sum is too large"
                )
        return memoryview(stored.numpy())

    def _add(self, weight: Tensor, row: int, updates: Sequence[Update]) -> bool:
        """In place; whether every sum is finite in the weight's dtype. The extremes tell: rounding keeps the order,
        NaN is both, and `isfinite` of all elements takes longer than the sums."""
        rows, columns = weight.shape
        if self._sums.numel() < weight.numel():
            self._sums = torch.empty(weight.numel(), dtype=torch.float32)
        total = self._sums[: weight.numel()].view(rows, columns)
        total.copy_(weight)
        for update in updates:
            total.addmm_(update.left[row : row + rows], update.right, alpha=update.scale)
        weight.copy_(total)
        return bool(torch.stack(total.aminmax()).to(weight.dtype).isfinite().all())


@dataclass(frozen=True, slots=True)
class Check:
    """What taking the adapter off again has shown."""

    tensors: int
    """Adapted ones that gave the base back within rounding."""
    changed: float
    """The largest change of one weight."""
    nbytes: int
    """Of the two folders, read."""


def check(plan: Plan, out: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Check:
    """Read both folders and take the updates off again; CheckpointError at the first value that is not the base's.

    Adapted weights must come back within what rounding the sum to its dtype can have lost; every other byte must be
    equal. Another arithmetic than `write`'s: fp32, difference instead of sum, with a bound for each element.
    """
    total = 2 * sum(file.stat().st_size for file in plan.folder.files)
    changed, done = 0.0, 0
    with Reader() as reader:
        for file in plan.folder.files:
            copy = out / file.relative_to(plan.folder.path)
            if copy.stat().st_size != file.stat().st_size:
                raise CheckpointError(f"{copy} has {copy.stat().st_size} bytes, the base's file {file.stat().st_size}")
            for piece in plan.pieces(file):
                there = ByteRange(str(copy), piece.range.offset, piece.range.length, piece.range.dtype)
                base, merged = _read(reader, piece.range), _read(reader, there)
                if piece.entry is not None:
                    changed = max(changed, _taken_off(plan, piece, base, merged, copy))
                elif not torch.equal(base, merged):
                    raise CheckpointError(f"{copy}: bytes after {piece.range.offset} are not the base's; merge again")
                done += 2 * piece.range.length
                progress(done, total)
    return Check(len(plan.updates), changed, total)


def _read(reader: Reader, place: ByteRange) -> Tensor:
    stored = torch.empty(place.length, dtype=torch.uint8)
    reader.read_into(place, memoryview(stored.numpy()))
    return stored


def _taken_off(plan: Plan, piece: Piece, base: Tensor, merged: Tensor, copy: Path) -> float:
    """The largest change in this piece, once it is known to be the adapters'."""
    assert piece.entry is not None
    dtype = _DTYPES[piece.entry.dtype]
    before, after = (t.view(dtype).view(-1, piece.entry.shape[1]).float() for t in (base, merged))
    rows = slice(piece.row, piece.row + len(before))
    back, magnitude = after.clone(), before.abs()
    for update in plan.updates[piece.entry.name]:
        left = update.left[rows]
        back -= update.scale * (left @ update.right)
        magnitude += abs(update.scale) * torch.outer(left.norm(dim=1), update.right.norm(dim=0))
    info = torch.finfo(dtype)
    # half a step of the stored dtype, its smallest step, and some steps of fp32 for two sums of r products
    bound = after.abs() * (info.eps / 2) + info.smallest_normal * info.eps + magnitude * 2.0**-20
    wrong = ~((back - before).abs() <= bound)  # NaN is wrong
    if wrong.any():
        row, column = (int(i) for i in wrong.nonzero()[0])
        raise CheckpointError(
            f"{copy}: {piece.entry.name}[{piece.row + row}, {column}] is {after[row, column]:.6g}, which is not the "
            f"base's {before[row, column]:.6g} with this adapter; merge again"
        )
    return float((after - before).abs().max())
