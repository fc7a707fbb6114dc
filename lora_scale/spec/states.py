"""Model states: the bytes of weights, gradients and optimizer that a rank holds through a whole step. Exact.

How DeepSpeed 0.19 lays them out, and how tensor parallelism splits them first (DESIGN.md section 5). A test holds them
to DeepSpeed's own tensors, byte for byte. What comes and goes within a step is `spec.memory`'s.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, prod

from lora_scale.spec.architecture import Architecture, Parameter
from lora_scale.spec.config import RunConfig
from lora_scale.spec.cost import ADAM, FP32, ITEMSIZE, Shape, numel, reduce_bucket
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.families import family, has_suffix
from lora_scale.spec.targets import ranks as adapter_ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Bytes of model states on the rank that holds most, as DeepSpeed 0.19 keeps them."""

    base: int  # frozen weights
    trained: int  # weights that train, in the form the forward pass reads
    master: int  # the fp32 copy the optimizer steps; of fp32 adapters too: DeepSpeed copies them all the same
    gradients: int
    adam: int
    bucket: int  # where gradients are collected before they are reduced

    @property
    def total(self) -> int:
        return self.base + self.trained + self.master + self.gradients + self.adam + self.bucket


@dataclass(frozen=True, slots=True)
class Grid:
    """How many ranks, and how many of them share one copy of the model by tensor parallelism.

    `base_over` and `adapter_over`: over how many ranks ZeRO-3 partitions either, where that is not all of `dp`.
    """

    ranks: int
    tp: int = 1
    base_over: int | None = None
    adapter_over: int | None = None

    @property
    def dp(self) -> int:
        """Ranks among which the data are shared out."""
        return self.ranks // self.tp


def check_grid(model: Architecture, grid: Grid) -> None:
    """ConfigError for a grid that no model, or not this one, can be laid on."""
    row = family(model.model_type)
    if grid.ranks % grid.tp:
        raise ConfigError(f"tensor parallel size {grid.tp} does not divide {grid.ranks} ranks; choose a divisor")
    if grid.tp > 1 and not (row and row.colwise):
        raise ConfigError(f"tensor parallel size is {grid.tp}, but {model.model_type} cannot be split; set it to 1")
    if model.heads % grid.tp:
        raise ConfigError(f"tensor parallel size {grid.tp} does not divide the {model.heads} attention heads")


def tp_dim(model: Architecture, p: Parameter) -> int | None:
    """The dim along which tensor parallelism splits a parameter; None where every rank has it whole."""
    row = family(model.model_type)
    if p.kind in ("table", "output"):
        return 0  # along the vocabulary
    if row is None or not has_suffix(p.module, (*row.colwise, *row.rowwise)):
        return None
    colwise, transposed = has_suffix(p.module, row.colwise), p.kind == "conv1d"
    if len(p.shape) == 1:
        return 0 if colwise else None  # a rowwise bias is added once, to the sum
    return int(colwise is transposed)


def split(shape: Shape, dim: int | None, tp: int) -> Shape:
    """The shape of the largest shard."""
    return [ceil(n / tp) if i == dim else n for i, n in enumerate(shape)]


def frozen_shapes(model: Architecture, cfg: RunConfig, tp: int = 1) -> list[Shape]:
    """Shapes of one rank's shards of everything that is frozen."""
    return [] if cfg.method == "full" else [split(p.shape, tp_dim(model, p), tp) for p in model.parameters]


def trained_shapes(model: Architecture, cfg: RunConfig, tp: int = 1) -> list[Shape]:
    """Shapes of one rank's shards of what trains. Of an adapted colwise layer lora_A is whole and lora_B split, of a
    rowwise one the other way round."""
    if cfg.method == "full":
        return [split(p.shape, tp_dim(model, p), tp) for p in model.parameters]
    linears = {p.module: p for p in model.parameters if p.is_linear}
    shapes: list[Shape] = []
    for module, r in adapter_ranks(model, cfg.lora).items():
        d_in, d_out = linears[module].features
        dim = tp_dim(model, linears[module])
        on_output = dim is not None and (dim == 0) is (linears[module].kind != "conv1d")
        shapes.append(split((r, d_in), 1 if dim is not None and not on_output else None, tp))
        shapes.append(split((d_out, r), 0 if on_output else None, tp))
    return shapes


def model_states(model: Architecture, cfg: RunConfig, grid: Grid) -> States:
    """Bytes held when gradients and Adam's moments are both there: at the end of a step's last backward pass."""
    return states(frozen_shapes(model, cfg, grid.tp), trained_shapes(model, cfg, grid.tp), cfg, grid)


def states(frozen: Iterable[Shape], trained: Sequence[Shape], cfg: RunConfig, grid: Grid) -> States:
    """The same from the shapes of one rank's shards.

    ZeRO-3 cuts every tensor into ceil(numel / ranks) elements a rank; stages 1 and 2 lay what trains end to end,
    tensors that decay apart from those that do not, padded to a multiple of 2 x ranks elements.
    """
    ranks = grid.dp
    stage, width = cfg.parallel.zero_stage, ITEMSIZE[cfg.precision]
    trained_width = width if cfg.method == "full" else FP32
    base = width * sum(ceil(prod(shape) / ((grid.base_over or ranks) if stage == 3 else 1)) for shape in frozen)
    groups = [[prod(s) for s in trained if (len(s) >= 2) is decays] for decays in (True, False)]
    if stage == 0:
        whole = numel(trained)
        return States(base=base, trained=FP32 * whole, master=0, gradients=FP32 * whole, adam=ADAM * whole, bucket=0)
    if stage == 3:
        held = part = sum(ceil(prod(shape) / (grid.adapter_over or ranks)) for shape in trained)
        gradients, bucket = FP32 * part, FP32 * reduce_bucket(numel(trained))
    else:
        held = sum(_padded(group, ranks) for group in groups)
        part, bucket = held // ranks, 0
        gradients = _gradients(groups, held, trained_width, cfg, ranks)
    return States(
        base=base,
        trained=trained_width * held,
        master=FP32 * part,
        gradients=gradients,
        adam=ADAM * part,
        bucket=bucket,
    )


def _gradients(groups: Sequence[Sequence[int]], held: int, trained_width: int, cfg: RunConfig, ranks: int) -> int:
    """Stages 1 and 2: bytes of gradients on the rank that holds most."""
    whole = sum(map(sum, groups))
    accumulates = cfg.train.global_batch_size > cfg.train.micro_batch_size * ranks
    if cfg.parallel.zero_stage == 1 and trained_width != FP32:
        return FP32 * held + trained_width * whole  # DeepSpeed's bf16 optimizer keeps an fp32 sum beside every .grad
    if cfg.parallel.zero_stage == 1 and accumulates:
        return FP32 * whole  # cut only after the last micro-batch
    if trained_width != FP32:
        return FP32 * (held // ranks)
    return FP32 * max(_overlapping(groups, ranks))


def _overlapping(groups: Sequence[Sequence[int]], ranks: int) -> list[int]:
    """Elements of the tensors that reach into each rank's part, whole: fp32 gradients are kept as views into them."""
    per_rank = [0] * ranks
    for group in groups:
        part, start = _padded(group, ranks) // ranks, 0
        for size in group:
            for rank in range(start // part, (start + size - 1) // part + 1):
                per_rank[rank] += size
            start += size
        for rank in range(ranks):
            per_rank[rank] += max(0, (rank + 1) * part - max(start, rank * part))
    return per_rank


def _padded(group: Sequence[int], ranks: int) -> int:
    return ceil(sum(group) / (2 * ranks)) * 2 * ranks
