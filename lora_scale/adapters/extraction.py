"""A LoRA out of two checkpoints: the nearest update of rank r to what tuning has changed in each linear layer.

B A is the truncated SVD of the difference in fp32 (Eckart and Young: no other of that rank is nearer), each factor
with the roots of the singular values, scaling 1. One layer at a time: a thread holds one difference in fp32, whatever
the size of the models. Every tensor of both is read once, also those that no adapter holds: what they differ by is
counted. Results depend on the values alone, not on threads or files. Writes nothing.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import TypeVar

import torch
from torch import Tensor

from lora_scale.adapters import analysis
from lora_scale.adapters.pairing import Pair, Plan
from lora_scale.adapters.peft import DTYPES
from lora_scale.spec.errors import ModelError
from lora_scale.spec.layout import ByteRange, TensorEntry
from lora_scale.storage.weights import Reader

PIECE = 1 << 22  # elements of both models read at once
_TORCH_DTYPES = dict(DTYPES.values())

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Layer:
    """The update of one layer, fp32."""

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    squared: float  # ||difference||_F^2
    kept: float  # ||B A||_F^2, of a projection: what is lost is the rest
    error: float  # of the singular values, relative to the largest: analysis.Leading

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True, slots=True)
class Saved:
    """A parameter that is taken whole."""

    values: Tensor  # fp32
    squared: float  # ||difference||_F^2


@dataclass(frozen=True, slots=True)
class Extracted:
    """Everything that was found, in the model's order."""

    layers: dict[str, Layer]
    unchanged: list[str]  # modules that were to be adapted, and are equal in both
    saved: dict[str, Saved]  # by parameter
    others: dict[str, float]  # ||difference||_F^2 of each tensor that differs and is in no adapter

    @property
    def squared(self) -> float:
        """||difference||_F^2 of the whole models."""
        layers = sum(layer.squared for layer in self.layers.values())
        return layers + sum(part.squared for part in self.saved.values()) + sum(self.others.values())

    @property
    def kept(self) -> float:
        """How much of it the adapter has."""
        return sum(layer.kept for layer in self.layers.values()) + sum(part.squared for part in self.saved.values())


def bytes_needed(plan: Plan, r: int) -> int:
    """Of memory for each thread, at most: one difference and what finding its update takes, or pieces of both."""
    layers = ((plan.features(module), pair.base.numel) for module, pair in plan.layers.items())
    pieces = 5 * 4 * min(PIECE, max(pair.base.numel for pair in plan.pairs))
    return max(4 * numel + max(pieces, analysis.workspace(shape, r)) for shape, numel in layers)


def extract(
    plan: Plan,
    r: int,
    energy: float | None,
    threads: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Extracted:
    """Each layer's update: of rank r, or the smallest that keeps `energy` of the squared norm of the difference.

    `progress(done, total)` counts elements. The first error ends all threads and is raised here.
    """
    done, lock, failed = 0, threading.Lock(), threading.Event()

    def counted(numel: int, work: Callable[[], Found]) -> Found:
        nonlocal done
        if failed.is_set():
            raise CancelledError
        found = work()
        with lock:
            done += numel
            progress(done, plan.numel)
        return found

    with Reader() as reader, ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def begin(numel: int, work: Callable[..., Found], *arguments: object) -> Future[Found]:
            return pool.submit(counted, numel, partial(work, reader, *arguments))

        layers = {
            name: begin(pair.base.numel, _layer, pair, name, name in plan.transposed, r, energy)
            for name, pair in plan.layers.items()
        }
        saved = {name: begin(pair.base.numel, _whole, pair) for name, pair in plan.saved.items()}
        others = {name: begin(pair.base.numel, _squared, pair) for name, pair in plan.others}
        try:
            return _gathered(layers, saved, others)
        except BaseException:  # also Ctrl-C, which only this thread gets
            failed.set()
            raise


def _gathered(
    layers: dict[str, Future[Layer]], saved: dict[str, Future[Saved]], others: dict[str, Future[float]]
) -> Extracted:
    found = {name: future.result() for name, future in layers.items()}
    measured = {name: future.result() for name, future in others.items()}
    return Extracted(
        {name: layer for name, layer in found.items() if layer.squared},
        [name for name, layer in found.items() if not layer.squared],
        {name: future.result() for name, future in saved.items()},
        {name: squared for name, squared in measured.items() if squared},
    )


def _layer(reader: Reader, pair: Pair, module: str, is_transposed: bool, r: int, energy: float | None) -> Layer:
    difference = torch.empty(pair.base.shape)
    flat = difference.view(-1)
    for start, piece in _differences(reader, pair):
        flat[start : start + len(piece)] = piece
    return nearest(difference.T if is_transposed else difference, module, r, energy)


def nearest(difference: Tensor, module: str, r: int, energy: float | None) -> Layer:
    """The update of one layer from its difference (out, in); where that is zero, of rank 0."""
    squared = analysis.frobenius(difference) ** 2
    n_out, n_in = difference.shape
    if not squared:
        return Layer(torch.empty(0, n_in), torch.empty(n_out, 0), 0.0, 0.0, 0.0)
    digest = blake2b(f"{module}/extract".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    found = analysis.leading(difference, r, generator)
    kept = found.values.double().square().cumsum(0)
    rank = r if energy is None else min(r, int((kept < energy * squared).sum()) + 1)
    roots = found.values[:rank].sqrt()
    a, b = roots[:, None] * found.right[:, :rank].T, found.left[:, :rank] * roots
    return Layer(a.float().contiguous(), b.float().contiguous(), squared, kept[rank - 1].item(), found.error)


def _whole(reader: Reader, pair: Pair) -> Saved:
    values = torch.empty(pair.tuned.shape)
    flat, squared = values.view(-1), 0.0
    for start, piece in _differences(reader, pair):
        flat[start : start + len(piece)] = _read(reader, pair.tuned, start, start + len(piece))
        squared += _square(piece)
    return Saved(values, squared)


def _squared(reader: Reader, pair: Pair) -> float:
    return sum(_square(piece) for _, piece in _differences(reader, pair))


def _square(piece: Tensor) -> float:
    return piece.norm().item() ** 2


def _differences(reader: Reader, pair: Pair) -> Iterator[tuple[int, Tensor]]:
    """tuned - base in fp32, flattened, a piece after the other: the place of its first element, and the piece."""
    for start in range(0, pair.base.numel, PIECE):
        stop = min(start + PIECE, pair.base.numel)
        tuned, base = (_read(reader, entry, start, stop) for entry in (pair.tuned, pair.base))
        difference = tuned - base
        if not torch.stack(difference.aminmax()).isfinite().all():
            at_fault = pair.tuned if base.isfinite().all() else pair.base
            raise ModelError(f"{at_fault.file}: {at_fault.name} holds a value that is not finite; download it again")
        yield start, difference


def _read(reader: Reader, entry: TensorEntry, start: int, stop: int) -> Tensor:
    """Elements [start, stop) in fp32."""
    stored = torch.empty(stop - start, dtype=_TORCH_DTYPES[entry.dtype])
    place = ByteRange(entry.file, entry.offset + start * entry.itemsize, stored.nbytes, entry.dtype)
    reader.read_into(place, stored.view(torch.uint8).numpy().data)
    return stored.float()
