"""Base + adapters: which update is added to which tensor of which file. Checked whole before anything is written.

A merged file has the header, the dtypes and the places of the base's file, so its bytes are the base's but for the
adapted weights, and any piece of it can be made by itself: `adapters.rewriting` does. Knows headers and names; reads
and writes no weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from lora_scale.adapters import tokens
from lora_scale.adapters.lora import file_name
from lora_scale.adapters.peft import MAGNITUDE, OTHERS, Adapter
from lora_scale.adapters.peft_config import TOKENS
from lora_scale.adapters.targets import features, is_linear, refuse_tied_output
from lora_scale.spec.errors import CheckpointError, ConfigError
from lora_scale.spec.layout import ByteRange, TensorEntry
from lora_scale.storage.folder import ModelFolder, sources

PIECE = 1 << 19  # elements read, added to and written at once: in fp32 they stay in a core's cache


@dataclass(frozen=True, slots=True)
class Update:
    """scale * left @ right, in the layout of the stored weight; both factors fp32 and contiguous."""

    left: Tensor  # (rows, r)
    right: Tensor  # (r, columns)
    scale: float


@dataclass(frozen=True, slots=True)
class Lengths:
    """DoRA's magnitudes, fp32: what each output's weights are brought to. They are the columns of a Conv1D."""

    magnitudes: Tensor
    dim: int  # of the outputs in the stored weight


@dataclass(frozen=True, slots=True)
class Replacement:
    """What stands in the base's place, fp32: all of a tensor, or the rows of some tokens."""

    values: Tensor
    rows: Tensor | None


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of one file; of a tensor that changes it is rows [row, row + length / row size) of `entry`."""

    range: ByteRange
    entry: TensorEntry | None = None
    row: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be written: every file of the base, and what changes by name of the tensor in it."""

    folder: ModelFolder
    updates: Mapping[str, Sequence[Update]]
    lengths: Mapping[str, Lengths] = field(default_factory=dict)  # after the updates
    replacements: Mapping[str, Replacement] = field(default_factory=dict)
    ratios: Mapping[str, Tensor] = field(default_factory=dict)  # of `lengths` to what they are: `rewriting.measured`

    @property
    def changed(self) -> frozenset[str]:
        return frozenset(self.updates) | frozenset(self.replacements)

    @property
    def changed_bytes(self) -> int:
        return sum(self.folder.tensors[name].nbytes for name in self.changed)

    def pieces_of(self, entry: TensorEntry) -> Iterator[Piece]:
        """Runs of whole rows."""
        columns = prod(entry.shape[1:])
        rows = max(1, PIECE // columns)
        for row in range(0, entry.shape[0], rows):
            numel = min(rows, entry.shape[0] - row) * columns
            offset = entry.offset + row * columns * entry.itemsize
            yield Piece(ByteRange(entry.file, offset, numel * entry.itemsize, entry.dtype), entry, row)

    def pieces(self, file: Path) -> Iterator[Piece]:
        """The whole file in order, header included; neighbours that stay as they are make one run."""
        start = 0
        for entry in (e for e in self.folder.tensors.values() if e.file == str(file)):
            if entry.name in self.changed:
                yield from _cut(str(file), start, entry.offset)
                yield from self.pieces_of(entry)
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
    lengths: dict[str, Lengths] = {}
    replaced: dict[str, Replacement] = {}
    owners: dict[str, str] = {}
    for path, adapter, weight in adapters:
        check_fits(path, adapter, model, folder)
        if adapter.others and (len(adapters) > 1 or weight != 1.0):
            raise CheckpointError(f"{path} {OTHERS}; a weighted sum takes plain LoRA only: merge it alone")
        for name in adapter.modules:
            module = modules[name]
            entry = entry_of(folder, model, f"{name}.weight", module.weight)
            if owners.setdefault(entry.name, name) != name:
                raise CheckpointError(
                    f"{path} adapts both {owners[entry.name]} and {name}, which share one weight in {folder.path}; "
                    "merged, each would get the other's update"
                )
            is_linear = isinstance(module, nn.Linear)
            a, b = (adapter.factors[f"{name}.{factor}"].float() for factor in ("lora_A", "lora_B"))
            left, right = (b, a) if is_linear else (a.T.contiguous(), b.T.contiguous())
            scale = weight * adapter.scaling(name)
            updates.setdefault(entry.name, []).append(Update(left, right, scale))
            if (magnitudes := adapter.others.get(f"{name}.{MAGNITUDE}")) is not None:
                lengths[entry.name] = Lengths(magnitudes.float(), 0 if is_linear else 1)
        for parameter, replacement in replacements(adapter).items():
            entry = entry_of(folder, model, parameter, model.get_parameter(parameter))
            replaced[entry.name] = replacement
    return Plan(folder, updates, lengths, replaced)


def replacements(adapter: Adapter) -> dict[str, Replacement]:
    """The rows of new tokens, and what trained of the base, by the parameter in whose place they stand."""
    found = {}
    for name, values in adapter.others.items():
        if name.endswith(MAGNITUDE):
            continue
        is_rows = name.endswith(tokens.DELTA)
        rows = torch.tensor(adapter.config[TOKENS]) if is_rows else None
        found[_table(name) if is_rows else file_name(name)] = Replacement(values.float().contiguous(), rows)
    return found


def _table(name: str) -> str:
    """The embedding of which a parameter of that name has rows."""
    return f"{name.removesuffix(f'.{tokens.NAME}.{tokens.DELTA}')}.weight"


def check_fits(path: Path, adapter: Adapter, model: nn.Module, folder: ModelFolder) -> None:
    """CheckpointError when an adapter is for a module that the model does not have, or for no linear layer of that
    shape, or for an output layer that shares its weight with the input embedding. The model may be on meta."""
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
    for name, values in adapter.others.items():
        _check_other(path, adapter, name, values, model, folder)


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


def _check_other(
    path: Path, adapter: Adapter, name: str, values: Tensor, model: nn.Module, folder: ModelFolder
) -> None:
    """The same of a magnitude, of rows of new tokens, or of a part of the base."""
    shape: tuple[int, ...] | None
    if name.endswith(MAGNITUDE):
        module = name.rpartition(".")[0]
        shape = (features(model.get_submodule(module))[1],) if module in adapter.modules else None
    else:
        is_rows = name.endswith(tokens.DELTA)
        named = dict(model.named_parameters(remove_duplicate=False))
        there = named.get(_table(name) if is_rows else file_name(name))
        shape = None if there is None else tuple(there.shape)
        if there is not None and not is_rows and sum(other is there for other in named.values()) > 1:
            raise CheckpointError(
                f"{path} brings {name}, which is another layer's weight too in {folder.path}; use a base whose output "
                "layer has a weight of its own"
            )
        if shape and is_rows:
            if (last := max(adapter.config[TOKENS])) >= shape[0]:
                raise CheckpointError(
                    f"{path} has a row for token {last}, and the embedding of {folder.path} has {shape[0]} rows; use "
                    "the base that it was trained on"
                )
            shape = (len(values), *shape[1:])
    if shape != tuple(values.shape):
        what = f"{folder.path} {'does not have' if shape is None else f'has as {shape}'}"
        raise CheckpointError(
            f"{path} brings {name} {tuple(values.shape)}, which {what}; use the base that it was trained on"
        )


def entry_of(folder: ModelFolder, model: nn.Module, parameter: str, weight: Tensor | nn.Module) -> TensorEntry:
    """Where the files have a parameter, which may be on meta."""
    assert isinstance(weight, nn.Parameter)
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    found = sources(folder, parameter, tuple(weight.shape), getattr(model, "base_model_prefix", ""), tied)
    assert len(found) == 1, f"{parameter} is {len(found)} tensors in {folder.path}"  # only fused experts are more
    return found[0]
