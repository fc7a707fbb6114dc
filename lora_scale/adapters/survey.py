"""Several adapters side by side, module after module: what `adapters.analysis` says of each, and of each pair.

Holds the adapters' factors and one tensor of the base at a time, whatever the base's size. Knows no run directory.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal

import torch
from torch import Tensor

from lora_scale.adapters import analysis, fp8
from lora_scale.adapters.analysis import Correlation, Update
from lora_scale.adapters.lora import draw_a
from lora_scale.adapters.peft import DTYPES, Adapter
from lora_scale.adapters.targets import by_pattern
from lora_scale.spec.errors import CheckpointError, ModelError
from lora_scale.spec.layout import TensorEntry
from lora_scale.storage.folder import ModelFolder, sources
from lora_scale.storage.weights import Reader

A, INPUT, OUTPUT, START, RANDOM = "A", "dW, input side", "dW, output side", "A at the start", "random"
SIDES = (A, INPUT, OUTPUT, START, RANDOM)
"""What is compared of two adapters: right-singular vectors of A (the paper's Figures 3 and 4); both sides of dW, which
do not depend on how B A is cut; A before training, where its seed is known; two random subspaces of the input."""
_TORCH_DTYPES = dict(DTYPES.values())


@dataclass(frozen=True, slots=True)
class Subject:
    """One adapter under its label."""

    name: str
    adapter: Adapter
    seed: int | None = None  # of the run that drew its A; None for a folder that does not say
    init_a: Literal["kaiming", "gaussian"] = "kaiming"

    def factors(self, module: str) -> tuple[Tensor, Tensor, float]:
        """A (r, in), B (out, r) and the scaling of B A."""
        config, factors = self.adapter.config, self.adapter.factors
        a, b = factors[f"{module}.lora_A"], factors[f"{module}.lora_B"]
        alpha = by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        return a, b, alpha / (math.sqrt(len(a)) if config.get("use_rslora") else len(a))


@dataclass(frozen=True, slots=True)
class Spectrum:
    """One adapter's update of one module."""

    r: int
    values: tuple[float, ...]
    norm: float
    effective_rank: float
    directions_90: int


@dataclass(slots=True)
class ModuleRow:
    """One module: its spectra, and its row of Table 7, by the adapters' names."""

    module: str
    group: str
    layer: int | None
    shape: tuple[int, int]  # (out, in)
    spectra: dict[str, Spectrum] = field(default_factory=dict)
    correlations: dict[str, Correlation] = field(default_factory=dict)
    pairs: dict[tuple[str, str], dict[str, tuple[float, float]]] = field(default_factory=dict)  # side: phi(1,1), all


@dataclass(slots=True)
class PairMean:
    """phi of two adapters over a group's modules of equal ranks: sums of matrices, by what is compared."""

    names: tuple[str, str]
    group: str
    dims: tuple[int, int]  # (out, in) of the modules
    count: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)

    def mean(self, side: str) -> Tensor:
        return self.sums[side] / self.count

    def expected(self, side: str) -> Tensor:
        """What chance gives, in the same place."""
        rows, columns = self.sums[side].shape
        return analysis.chance(rows, columns, self.dims[0] if side == OUTPUT else self.dims[1])


@dataclass(slots=True)
class Survey:
    """Everything that was found."""

    modules: list[ModuleRow]
    pairs: list[PairMean]
    left_out: list[str]  # modules in which some update is zero everywhere


def split_name(module: str) -> tuple[str, int | None]:
    """The part of a module's name that is the same in all layers, and the layer's number."""
    found = re.fullmatch(r"(?:.*\.)?(\d+)\.(.+)", module)
    return (found[2], int(found[1])) if found else (module, None)


def common_modules(subjects: Sequence[Subject]) -> list[str]:
    """The modules that all adapt, in the first one's order, their shapes compared."""
    first = subjects[0]
    common = [m for m in first.adapter.modules if all(m in s.adapter.modules for s in subjects[1:])]
    if not common:
        apart = (s for s in subjects if not set(s.adapter.modules) & set(first.adapter.modules))
        other = next(apart, subjects[-1])
        raise CheckpointError(
            f"{other.name} adapts other modules than {first.name} ({other.adapter.modules[0]} and not "
            f"{first.adapter.modules[0]}); only modules that all of them adapt can be compared"
        )
    for module in common:
        shapes = {s.name: _shape(s, module) for s in subjects}
        for name, shape in shapes.items():
            if shape != shapes[first.name]:
                raise CheckpointError(
                    f"{name} and {first.name} are of different bases: {module} has {shape} weights (out, in) in one, "
                    f"{shapes[first.name]} in the other"
                )
    return common


def _shape(subject: Subject, module: str) -> tuple[int, int]:
    a, b, _ = subject.factors(module)
    return len(b), a.shape[1]


def survey(
    subjects: Sequence[Subject],
    base: ModelFolder | None,
    seed: int = 0,
    progress: Callable[[int, int, str], None] = lambda done, total, module: None,
) -> Survey:
    """Walk the modules that all `subjects` adapt; without `base` nothing is said of the weights."""
    generator = torch.Generator().manual_seed(seed)
    found = Survey([], [], [])
    means: dict[Any, PairMean] = {}
    modules = common_modules(subjects)
    weights = _weights(subjects[0], modules, base) if base else dict.fromkeys(modules)
    with Reader() as reader:
        for number, module in enumerate(modules):
            progress(number, len(modules), module)
            updates = {s.name: analysis.decompose(*s.factors(module)) for s in subjects}
            row = ModuleRow(module, *split_name(module), _shape(subjects[0], module))
            row.spectra = {name: _spectrum(update) for name, update in updates.items()}
            found.modules.append(row)
            if not all(update.norm for update in updates.values()):
                found.left_out.append(module)
                continue
            for one, other in combinations(subjects, 2):
                _compare(row, one, other, updates, means, generator)
            if entry := weights[module]:
                _correlate(row, _read(reader, entry, subjects[0]), updates, generator)
    if len(found.left_out) == len(modules):
        raise CheckpointError(
            f"the update of {subjects[0].name} is zero in every module, or that of one compared with it: "
            "lora_B is as it starts; train first"
        )
    found.pairs = list(means.values())
    return found


def _spectrum(update: Update) -> Spectrum:
    values = update.values
    rank, count = analysis.effective_rank(values), analysis.directions_for(values)
    return Spectrum(len(values), tuple(values.tolist()), update.norm, rank, count)


def _compare(
    row: ModuleRow,
    one: Subject,
    other: Subject,
    updates: Mapping[str, Update],
    means: dict[Any, PairMean],
    generator: torch.Generator,
) -> None:
    """phi of two updates of one module, added to the means of its group."""
    first, second = updates[one.name], updates[other.name]
    sides = {
        A: (first.a_right, second.a_right),
        INPUT: (first.right, second.right),
        OUTPUT: (first.left, second.left),
        START: _starts(one, other, row),
        RANDOM: tuple(analysis.random_directions(row.shape[1], len(u.values), generator) for u in (first, second)),
    }
    found = {side: analysis.similarity(*both) for side, both in sides.items() if both}
    names = (one.name, other.name)
    row.pairs[names] = {side: (phi[0, 0].item(), phi[-1, -1].item()) for side, phi in found.items()}
    key = (names, row.group, row.shape, len(first.values), len(second.values))
    mean = means.setdefault(key, PairMean(names, row.group, row.shape))
    mean.count += 1
    for side, phi in found.items():
        mean.sums[side] = mean.sums.get(side, 0.0) + phi


def _starts(one: Subject, other: Subject, row: ModuleRow) -> tuple[Tensor, ...] | None:
    """The right-singular vectors of both A as they were drawn: what two runs of one seed share before any training."""
    if one.seed is None or other.seed is None:
        return None
    ranks = [len(s.factors(row.module)[0]) for s in (one, other)]
    drawn = (
        draw_a(seed, row.module, r, row.shape[1], s.init_a)
        for s, r, seed in zip((one, other), ranks, (one.seed, other.seed), strict=True)
    )
    return tuple(torch.linalg.svd(a.double(), full_matrices=False)[2].T for a in drawn)


def _correlate(row: ModuleRow, weight: Tensor, updates: Mapping[str, Update], generator: torch.Generator) -> None:
    norm = analysis.frobenius(weight)
    if not math.isfinite(norm):
        raise ModelError(f"the base's {row.module}.weight holds a value that is not finite; download it again")
    top = analysis.top_values(weight, max(len(u.values) for u in updates.values()), generator)
    row.correlations = {name: analysis.correlate(weight, u, top, norm, generator) for name, u in updates.items()}


def _weights(subject: Subject, modules: Sequence[str], base: ModelFolder) -> dict[str, TensorEntry | None]:
    """The file tensor of each module's weight: (out, in), or (in, out) for a Conv1D."""
    found: dict[str, TensorEntry | None] = {}
    for module in modules:
        shape = _shape(subject, module)
        stored = shape[::-1] if subject.adapter.config.get("fan_in_fan_out") else shape
        found[module] = sources(base, f"{module}.weight", stored, module.partition(".")[0])[0]
    return found


def _read(reader: Reader, entry: TensorEntry, subject: Subject) -> Tensor:
    """The weight as (out, in), in the file's dtype; in fp32 where the file has fp8 blocks."""
    stored = torch.float8_e4m3fn if entry.blocks else _TORCH_DTYPES[entry.dtype]
    weight = torch.empty(entry.shape, dtype=stored)
    reader.read_into(entry.whole(), weight.view(-1).view(torch.uint8).numpy().data)
    if entry.blocks:
        scales = fp8.read_scales(reader, entry, 0, entry.numel)
        weight = fp8.dequantised(weight.view(-1), entry, 0, scales).view(entry.shape)
    return weight.T if subject.adapter.config.get("fan_in_fan_out") else weight


def history(adapters: Iterable[tuple[int, Subject]]) -> Iterator[tuple[int, str, float]]:
    """(step, module, ||dW||_F) of each of a run's checkpoints."""
    for step, subject in adapters:
        for module in subject.adapter.modules:
            yield step, module, analysis.update_norm(*subject.factors(module))
