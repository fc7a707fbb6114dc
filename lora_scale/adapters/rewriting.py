"""The files of a merge: each piece of the base read, added to and written; and the way back, as a check.

An adapted piece is added to in fp32 and rounded once, to the base's dtype. Memory: the adapters in fp32, and for each
thread one piece in the base's dtype and one in fp32, whatever the size of tensors and files. Pieces are cut by shapes
alone, so the bytes do not depend on threads or on kills.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from lora_scale.adapters.merging import Lengths, Piece, Plan, Replacement, Update
from lora_scale.spec.errors import CheckpointError
from lora_scale.spec.layout import ByteRange, TensorEntry
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
            weight = stored.view(_DTYPES[piece.entry.dtype]).view(-1, prod(piece.entry.shape[1:]))
            if not self._change(weight, piece, plan):
                raise CheckpointError(
                    f"{piece.entry.name} with its update is not finite in {piece.entry.dtype}: the base is not, or the "
                    "sum is too large"
                )
        return memoryview(stored.numpy())

    def _change(self, weight: Tensor, piece: Piece, plan: Plan) -> bool:
        """In place; whether every value is finite in the weight's dtype. The extremes tell: rounding keeps the order,
        NaN is both, and `isfinite` of all elements takes longer than the sums."""
        assert piece.entry is not None
        name = piece.entry.name
        total = self._added(weight, piece.row, plan.updates.get(name, ()))
        if (lengths := plan.lengths.get(name)) is not None:
            total *= _along(plan.ratios[name], lengths, piece.row, len(total))
        if (replacement := plan.replacements.get(name)) is not None:
            here, values = _here(replacement, piece.row, total)
            total[here] = values
        weight.copy_(total)
        return bool(torch.stack(total.aminmax()).to(weight.dtype).isfinite().all())

    def _added(self, weight: Tensor, row: int, updates: Sequence[Update]) -> Tensor:
        """The weight with the updates of its rows, fp32; good until the next call."""
        if self._sums.numel() < weight.numel():
            self._sums = torch.empty(weight.numel(), dtype=torch.float32)
        total = self._sums[: weight.numel()].view(weight.shape)
        total.copy_(weight)
        for update in updates:
            total.addmm_(update.left[row : row + len(weight)], update.right, alpha=update.scale)
        return total

    def squares(self, reader: Reader, plan: Plan, entry: TensorEntry) -> Tensor:
        """Squared length of the updated weights of each output of a DoRA layer, fp32."""
        dim = plan.lengths[entry.name].dim
        found = torch.zeros(entry.shape[dim])
        for piece in plan.pieces_of(entry):
            weight = _read(reader, piece.range).view(_DTYPES[entry.dtype]).view(-1, entry.shape[1])
            here = self._added(weight, piece.row, plan.updates[entry.name]).square_().sum(1 - dim)
            (found[piece.row : piece.row + len(here)] if dim == 0 else found).add_(here)
        return found


def _along(ratio: Tensor, lengths: Lengths, row: int, rows: int) -> Tensor:
    """What each element of some rows is multiplied by, to be broadcast."""
    return ratio[row : row + rows, None] if lengths.dim == 0 else ratio


def _here(replacement: Replacement, row: int, total: Tensor) -> tuple[Tensor, Tensor]:
    """Of the rows [row, row + len(total)), which are replaced, and by what."""
    values = replacement.values.view(len(replacement.values), -1)
    if replacement.rows is None:
        return torch.arange(len(total)), values[row : row + len(total)]
    own = (replacement.rows >= row) & (replacement.rows < row + len(total))
    return replacement.rows[own] - row, values[own]


def measured(plan: Plan, threads: int) -> Plan:
    """The plan, knowing by what DoRA's outputs are multiplied: each such weight is read once more."""
    if not plan.lengths:
        return plan

    def ratio(name: str) -> Tensor:
        torch.set_num_threads(1)  # of this Python thread
        return plan.lengths[name].magnitudes / _Workspace().squares(reader, plan, plan.folder.tensors[name]).sqrt()

    with Reader() as reader, ThreadPoolExecutor(threads) as pool:
        return replace(plan, ratios=dict(zip(plan.lengths, pool.map(ratio, plan.lengths), strict=True)))


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

    Adapted weights must come back within what rounding the sum to its dtype can have lost; what was replaced must be
    the adapter's value, rounded once; every other byte must be equal. Another arithmetic than `write`'s: fp32,
    difference instead of sum, with a bound for each element.
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
    return Check(len(plan.changed), changed, total)


def _read(reader: Reader, place: ByteRange) -> Tensor:
    stored = torch.empty(place.length, dtype=torch.uint8)
    reader.read_into(place, memoryview(stored.numpy()))
    return stored


def _taken_off(plan: Plan, piece: Piece, base: Tensor, merged: Tensor, copy: Path) -> float:
    """The largest change in this piece, once it is known to be the adapters'."""
    assert piece.entry is not None
    dtype = _DTYPES[piece.entry.dtype]
    name, columns = piece.entry.name, prod(piece.entry.shape[1:])
    before, after = (t.view(dtype).view(-1, columns).float() for t in (base, merged))
    change = float((after - before).abs().max())
    ratio = torch.ones(())
    if (lengths := plan.lengths.get(name)) is not None:
        ratio = _along(plan.ratios[name], lengths, piece.row, len(after))
    back = after / ratio
    magnitude = before.abs() + (0 if lengths is None else back.abs())
    rows = slice(piece.row, piece.row + len(before))
    for update in plan.updates.get(name, ()):
        left = update.left[rows]
        back -= update.scale * (left @ update.right)
        magnitude += abs(update.scale) * torch.outer(left.norm(dim=1), update.right.norm(dim=0))
    info = torch.finfo(dtype)
    # half a step of the stored dtype, its smallest step, and some steps of fp32 for two sums of r products
    bound = (after.abs() * (info.eps / 2) + info.smallest_normal * info.eps) / ratio.abs() + magnitude * 2.0**-20
    wrong = ~((back - before).abs() <= bound)  # NaN is wrong
    if (replacement := plan.replacements.get(name)) is not None:
        here, values = _here(replacement, piece.row, after)
        wrong[here] = after[here] != values.to(dtype).float()
    if wrong.any():
        row, column = (int(i) for i in wrong.nonzero()[0])
        raise CheckpointError(
            f"{copy}: {piece.entry.name}[{piece.row + row}, {column}] is {after[row, column]:.6g}, which is not the "
            f"base's {before[row, column]:.6g} with this adapter; merge again"
        )
    return change
