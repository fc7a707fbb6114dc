"""Model states: the bytes of weights, gradients and optimizer that a rank holds through a whole step. Exact.

How DeepSpeed 0.19 lays them out, and how tensor parallelism splits them first (DESIGN.md section 5). A test holds them
to DeepSpeed's own tensors, byte for byte. What comes and goes within a step is `spec.memory`'s.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, prod

from lora_scale.spec import baselines
from lora_scale.spec.architecture import Architecture, Parameter, layer_of
from lora_scale.spec.config import RunConfig
from lora_scale.spec.cost import ADAM, FP32, ITEMSIZE, Shape, numel, reduce_bucket
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.families import has_suffix
from lora_scale.spec.layout import flat_bytes, flat_piece
from lora_scale.spec.splits import Split, factor_splits, magnitude_split, splits, trained
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


def grid_of(model: Architecture, cfg: RunConfig, ranks: int, gpus_per_node: int | None = None) -> Grid:
    """The grid that a config asks for. ConfigError for one that no model, or not this one, can be laid on."""
    tp = cfg.parallel.tensor_parallel_size
    if ranks % tp:
        raise ConfigError(
            f"parallel.tensor_parallel_size is {tp}, which does not divide this job's {ranks} ranks; start a multiple "
            f"of {tp} ranks, or set it to 1"
        )
    splits(model, tp)
    per_node = (gpus_per_node or ranks) // tp
    return Grid(
        ranks,
        tp,
        base_over=max(1, per_node) if cfg.parallel.base_sharding == "node" else None,
        adapter_over=1 if keeps_adapters_whole(cfg, numel(trained_shapes(model, cfg))) else None,
    )


def keeps_base_flat(cfg: RunConfig) -> bool:
    """Whether the frozen base is kept in flat pieces of our own (`parallel.flat`), not by DeepSpeed's ZeRO-3."""
    if cfg.method == "full" or trains_of_base(cfg):
        return False
    return cfg.parallel.zero_stage == 3 and cfg.parallel.base_engine == "flat"


def deepspeed_stage(cfg: RunConfig, trainable: int) -> int:
    """The stage that DeepSpeed is told. Beside a flat base it has the adapter only: replicated, or with its optimizer's
    states partitioned."""
    if not keeps_base_flat(cfg):
        return cfg.parallel.zero_stage
    return 0 if keeps_adapters_whole(cfg, trainable) else 1


def keeps_adapters_whole(cfg: RunConfig, trainable: int) -> bool:
    """Whether ZeRO-3 leaves the adapter whole on every rank. Its values, gradient, second fp32 copy and two moments
    cost 20 bytes a parameter there."""
    if cfg.parallel.zero_stage != 3 or not (cfg.method == "lora" or keeps_base_flat(cfg)):
        return False
    if trains_of_base(cfg):
        return False  # what trains of the base is partitioned, and everything with it
    if cfg.parallel.adapter_sharding == "auto":
        return 20 * trainable // cfg.parallel.tensor_parallel_size < 1 << 30
    return cfg.parallel.adapter_sharding == "replicate"


def frozen_units(model: Architecture, cfg: RunConfig, tp: int = 1) -> list[list[Shape]]:
    """Shapes of one rank's shards of everything that is frozen, by what a flat base gathers at once: a decoder layer,
    or a tensor outside of them."""
    if cfg.method == "full":
        return []
    cuts, units = splits(model, tp), dict[str, list[Shape]]()
    trained = {p.name for p in trained_base(model, cfg)}
    for p in model.parameters:
        if p.name not in trained:
            units.setdefault(layer_of(p.name) or p.name, []).append(_largest(p.shape, cuts.get(p.name), tp))
    return list(units.values())


def trains_of_base(cfg: RunConfig) -> bool:
    """Whether parameters of the base train beside the factors."""
    return cfg.method == "lora" and (cfg.lora.bias != "none" or bool(cfg.lora.modules_to_save))


def trained_base(model: Architecture, cfg: RunConfig) -> list[Parameter]:
    """What of the base trains beside the factors (`lora.bias`, `lora.modules_to_save`)."""
    if not trains_of_base(cfg):
        return []
    biased = {
        "none": (),
        "lora_only": adapter_ranks(model, cfg.lora).keys(),
        "all": {p.module for p in model.parameters},
    }[cfg.lora.bias]
    return [
        p
        for p in model.parameters
        if has_suffix(p.module, cfg.lora.modules_to_save) or (p.name.endswith(".bias") and p.module in biased)
    ]


def trained_shapes(model: Architecture, cfg: RunConfig, tp: int = 1) -> list[Shape]:
    """Shapes of one rank's shards of what trains."""
    if cfg.method == "full":
        return [p.shape for p in model.parameters]
    if cfg.method != "lora":
        return list(baselines.shapes(model, cfg))
    linears, cuts = {p.module: p for p in model.parameters if p.is_linear}, splits(model, tp)
    shapes: list[Shape] = []
    for module, r in adapter_ranks(model, cfg.lora).items():
        linear = linears[module]
        d_in, d_out = linear.features
        of_a, of_b = factor_splits(cuts.get(linear.name), linear.kind == "conv1d")
        shapes += [_largest((r, d_in), of_a, tp), _largest((d_out, r), of_b, tp)]
        shapes += [_largest((d_out,), magnitude_split(of_b), tp)] if cfg.lora.use_dora else []
    if ids := cfg.lora.trainable_token_indices:
        shapes += [(len(ids), p.shape[1]) for p in model.parameters if p.kind == "table"]
    return [*shapes, *(_largest(p.shape, trained(cuts.get(p.name)), tp) for p in trained_base(model, cfg))]


def _largest(shape: Shape, split: Split | None, tp: int) -> Shape:
    """The largest rank's shard: pieces of a size that does not divide grow with the rank."""
    return shape if split is None else split.shape(tuple(shape), tp - 1, tp)


def model_states(model: Architecture, cfg: RunConfig, grid: Grid) -> States:
    """Bytes held when gradients and Adam's moments are both there: at the end of a step's last backward pass."""
    return states(frozen_units(model, cfg, grid.tp), trained_shapes(model, cfg, grid.tp), cfg, grid)


def flat_pieces(units: Iterable[Sequence[Shape]], cfg: RunConfig, grid: Grid) -> list[int]:
    """Bytes of a rank's piece of each unit of a flat base; of a vector outside of the layers, all of it."""
    width, over, found = ITEMSIZE[cfg.precision], grid.base_over or grid.dp, []
    for unit in units:
        if over == 1 or (len(unit) == 1 and len(unit[0]) == 1):
            found.append(width * numel(unit))
        else:
            found.append(flat_piece(flat_bytes([width * prod(shape) for shape in unit]), over))
    return found


def states(frozen: Sequence[Sequence[Shape]], trained: Sequence[Shape], cfg: RunConfig, grid: Grid) -> States:
    """The same from the shapes of one rank's shards, the frozen ones by unit.

    ZeRO-3 cuts every tensor into ceil(numel / ranks) elements a rank; stages 1 and 2 lay what trains end to end,
    tensors that decay apart from those that do not, padded to a multiple of 2 x ranks elements.
    """
    ranks = grid.dp
    stage, width = cfg.parallel.zero_stage, ITEMSIZE[cfg.precision]
    trained_width = width if cfg.method == "full" else FP32
    over = (grid.base_over or ranks) if stage == 3 else 1
    base = width * sum(ceil(prod(shape) / over) for unit in frozen for shape in unit)
    if keeps_base_flat(cfg):
        base, stage = sum(flat_pieces(frozen, cfg, grid)), 0 if grid.adapter_over == 1 else 1
    if cfg.method == "lora" and cfg.lora.pissa is not None:
        base += FP32 * numel(trained)  # where each factor began, whole on every rank
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
        gradients = _gradients(groups, held, trained_width, cfg, ranks, stage)
    return States(
        base=base,
        trained=trained_width * held,
        master=FP32 * part,
        gradients=gradients,
        adam=ADAM * part,
        bucket=bucket,
    )


def _gradients(
    groups: Sequence[Sequence[int]], held: int, trained_width: int, cfg: RunConfig, ranks: int, stage: int
) -> int:
    """Stages 1 and 2: bytes of gradients on the rank that holds most."""
    whole = sum(map(sum, groups))
    accumulates = cfg.train.global_batch_size > cfg.train.micro_batch_size * ranks
    if stage == 1 and trained_width != FP32:
        return FP32 * held + trained_width * whole  # DeepSpeed's bf16 optimizer keeps an fp32 sum beside every .grad
    if stage == 1 and accumulates:
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
