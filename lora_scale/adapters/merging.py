"""Base + adapters: which update is added to which tensor of which file. Checked whole before anything is written.

A merged file has the header, the dtypes and the places of the base's file, so its bytes are the base's but for the
adapted weights, and any piece of it can be made by itself: `adapters.rewriting` does. Knows headers and names; reads
and writes no weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from lora_scale.adapters.peft import OTHERS, Adapter
from lora_scale.adapters.targets import features, is_linear, refuse_tied_output
from lora_scale.spec.errors import CheckpointError, ConfigError
from lora_scale.spec.layout import ByteRange, TensorEntry
from lora_scale.storage.folder import ModelFolder, sources

PIECE = 1 << 22  # elements read, added to and written at once


@dataclass(frozen=True, slots=True)
class Update:
    """scale * left @ right, in the layout of the stored weight; both factors fp32 and contiguous."""

    left: Tensor  # (rows, r)
    right: Tensor  # (r, columns)
    scale: float


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of one file; with updates it is rows [row, row + length / row size) of `entry`."""

    range: ByteRange
    entry: TensorEntry | None = None
    row: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be written: every file of the base, and the updates by name of the tensor in it."""

    folder: ModelFolder
    updates: Mapping[str, Sequence[Update]]

    @property
    def changed_bytes(self) -> int:
        return sum(self.folder.tensors[name].nbytes for name in self.updates)

    def pieces(self, file: Path) -> Iterator[Piece]:
        """The whole file in order, header included; neighbours that stay as they are make one run."""
        start = 0
        for entry in (e for e in self.folder.tensors.values() if e.file == str(file)):
            if entry.name in self.updates:
                yield from _cut(str(file), start, entry.offset)
                columns = entry.shape[1]
                rows = max(1, PIECE // columns)
                for row in range(0, entry.shape[0], rows):
                    numel = min(rows, entry.shape[0] - row) * columns
                    offset = entry.offset + row * columns * entry.itemsize
                    yield Piece(ByteRange(str(file), offset, numel * entry.itemsize, entry.dtype), entry, row)
                start = entry.offset + entry.nbytes
        yield from _cut(str(file), start, file.stat().st_size)


def _cut(file: str, start: int, end: int) -> Iterator[Piece]:
    step = PIECE * 2
    for offset in range(start, end, step):
        yield Piece(ByteRange(file, offset, min(step, end - offset), "U8"))


def plan(folder: ModelFolder, model: nn.Module, adapters: Sequence[tuple[Path, Adapter, float]]) -> Plan:
    """Where each factor of each (path, adapter, weight) goes; `model` may be on meta, its weights are not touched.

    CheckpointError when an adapter does not fit the model: a module that is not there or no linear layer, a shape, or
    an output layer that shares its weight with the input embedding.
    """
    modules = dict(model.named_modules())
    updates: dict[str, list[Update]] = {}
    owners: dict[str, str] = {}
    for path, adapter, weight in adapters:
        check_fits(path, adapter, model, folder)
        for name in adapter.modules:
            module = modules[name]
            entry = _entry(folder, model, f"{name}.weight", module)
            if owners.setdefault(entry.name, name) != name:
                raise CheckpointError(
                    f"{path} adapts both {owners[entry.name]} and {name}, which share one weight in {folder.path}; "
                    "merged, each would get the other's update"
                )
            a, b = (adapter.factors[f"{name}.{factor}"].float() for factor in ("lora_A", "lora_B"))
            left, right = (b, a) if isinstance(module, nn.Linear) else (a.T.contiguous(), b.T.contiguous())
            scale = weight * adapter.scaling(name)
            updates.setdefault(entry.name, []).append(Update(left, right, scale))
    return Plan(folder, updates)


def check_fits(path: Path, adapter: Adapter, model: nn.Module, folder: ModelFolder) -> None:
    """CheckpointError when an adapter is for a module that the model does not have, or for no linear layer of that
    shape, or for an output layer that shares its weight with the input embedding. The model may be on meta."""
    if adapter.others:
        raise CheckpointError(f"{path} {OTHERS}; only plain LoRA is taken here: PEFT loads it")
    modules = dict(model.named_modules())
    lost = [name for name in adapter.modules if name not in modules]
    if lost:
        raise CheckpointError(
            f"{path} has factors for {lost[0]}, which {folder.path} does not have ({len(lost)} of "
            f"{len(adapter.modules)} adapted layers are not in it); it belongs to another model"
        )
    try:
        refuse_tied_output(model, modules, set(adapter.modules))
    except ConfigError as error:
        raise CheckpointError(f"{path} does not fit {folder.path}: {error}") from error
    for name in adapter.modules:
        _check_module(path, adapter, name, modules[name], folder)


def _check_module(path: Path, adapter: Adapter, name: str, module: nn.Module, folder: ModelFolder) -> None:
    if not is_linear(module):
        raise CheckpointError(f"{path} adapts {name}, which is no linear layer but {type(module).__name__}")
    here = features(module)
    found = adapter.factors[f"{name}.lora_A"].shape[1], adapter.factors[f"{name}.lora_B"].shape[0]
    if found != here:
        raise CheckpointError(
            f"{path} was made for another model: its factors of {name} are for {found[0]} -> {found[1]} features, "
            f"the layer in {folder.path} has {here[0]} -> {here[1]}"
        )


def _entry(folder: ModelFolder, model: nn.Module, parameter: str, module: nn.Module) -> TensorEntry:
    assert isinstance(module.weight, nn.Parameter)
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    found = sources(folder, parameter, tuple(module.weight.shape), getattr(model, "base_model_prefix", ""), tied)
    assert len(found) == 1, f"{parameter} is {len(found)} tensors in {folder.path}"  # only fused experts are more
    return found[0]
