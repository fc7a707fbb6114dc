"""The base, sharded as for training, with adapters beside it, ready to generate. Nothing trains; there is no optimizer.

Under ZeRO-3 DeepSpeed gathers one decoder layer at a time, as in training. With one data-parallel rank, or at another
stage, each rank keeps its tensor-parallel part of the base whole, and DeepSpeed has nothing to do.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_scale.adapters import merging, resident, rewriting
from lora_scale.adapters.frozen import freeze_linears
from lora_scale.adapters.lora import file_name
from lora_scale.adapters.peft import MAGNITUDE, Adapter
from lora_scale.adapters.resident import Beside, Residents, Run
from lora_scale.parallel import load, recompute, setup, tensor_parallel, zero3
from lora_scale.parallel.deepspeed_config import ds_config
from lora_scale.parallel.grid import Grid, Mpu
from lora_scale.parallel.world import on_every_rank
from lora_scale.spec.config import RunConfig
from lora_scale.spec.splits import Split, magnitude_split, trained
from lora_scale.spec.splits import factor_splits as split_factors
from lora_scale.storage.folder import ModelFolder


@dataclass(frozen=True, slots=True)
class Served:
    """A loaded base on this rank and the adapters beside it."""

    model: nn.Module
    adapters: Residents
    loaded: load.Loaded


def check(folder: ModelFolder, cfg: RunConfig, adapters: Mapping[str, tuple[Path, Adapter]]) -> None:
    """CheckpointError for the first adapter that does not fit the base; only headers are read."""
    skeleton = load.empty(folder, cfg)
    for path, adapter in adapters.values():
        merging.check_fits(path, adapter, skeleton, folder)


def serve(
    cfg: RunConfig,
    folder: ModelFolder,
    adapters: Mapping[str, tuple[Path, Adapter]],
    grid: Grid,
    *,
    on_host: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Served:
    """Load the base by `cfg.parallel`, every rank its own bytes, with all adapters resident; none is in use.

    Collective over all ranks. `on_host` keeps the adapters in host memory until they are used.
    """
    parallel = cfg.parallel.model_copy(update={"base_engine": "deepspeed", "overlap": False})
    cfg = cfg.model_copy(update={"parallel": parallel})  # the flat base's hooks, and what hides, are those of training
    model = on_every_rank(lambda: load.empty(folder, cfg))
    layers = resident.insert(model, {name for _, adapter in adapters.values() for name in adapter.modules})
    cuts, _ = on_every_rank(lambda: setup.cut(cfg, model, folder, grid))
    model.requires_grad_(False).eval()
    freeze_linears(model)
    device, partitioner = grid.world.device, None
    decoder_layers = recompute.decoder_layers(model)
    classes = sorted({type(layer).__name__ for layer in decoder_layers})
    config = ds_config(cfg, 1, recompute.layer_numel(decoder_layers), 1, classes)
    if cfg.parallel.zero_stage == 3 and grid.dp_size > 1:
        partitioner = zero3.Partitioner(config, load.dtype_of(cfg), grid.base_group)
    loaded = on_every_rank(lambda: load.fill(model, folder, device, partitioner, cuts, grid, progress))
    if partitioner:
        importlib.import_module("deepspeed").initialize(
            model=model, config=config, dist_init_required=False, mpu=Mpu(grid) if grid.tp_size > 1 else None
        )
    residents = Residents(layers, device, load.dtype_of(cfg))
    skeleton = on_every_rank(lambda: load.empty(folder, cfg))
    for name, (path, adapter) in adapters.items():
        ratios = _ratios(path, adapter, skeleton, folder, layers, cuts, grid)
        beside = Beside(ratios, list(_runs(adapter, loaded, cuts, grid)))
        residents.add(name, adapter, _cut_of(layers, cuts, grid), beside, on_host=on_host)
    return Served(model, residents, loaded)


def _cut_of(
    layers: Mapping[str, resident.SwitchedLinear], cuts: Mapping[str, Split], grid: Grid
) -> Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]:
    def cut(module: str, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        conv1d = not isinstance(layers[module].base_layer, nn.Linear)
        pair = split_factors(cuts.get(f"{module}.weight"), conv1d)
        here = [
            factor if split is None else tensor_parallel.cut(factor, split, grid.tp_rank, grid.tp_size)
            for factor, split in zip((a, b), pair, strict=True)
        ]
        return here[0], here[1]

    return cut


def _ratios(
    path: Path,
    adapter: Adapter,
    skeleton: nn.Module,
    folder: ModelFolder,
    layers: Mapping[str, resident.SwitchedLinear],
    cuts: Mapping[str, Split],
    grid: Grid,
) -> dict[str, Tensor]:
    """By what DoRA's outputs are multiplied, this rank's; of each weight one rank finds it for all. Collective."""
    modules = [name for name in adapter.modules if f"{name}.{MAGNITUDE}" in adapter.others]
    if not modules:
        return {}
    world, found = grid.world, {}
    plain = dict(skeleton.named_modules())
    entries = [merging.entry_of(folder, skeleton, f"{name}.weight", plain[name].weight).name for name in modules]

    def measure() -> Mapping[str, Tensor]:
        plan = merging.plan(folder, skeleton, [(path, adapter, 1.0)])
        mine = {entry: plan.lengths[entry] for entry in entries[world.rank :: world.size]}
        return rewriting.measured(replace(plan, lengths=mine), 1).ratios

    measured = on_every_rank(measure)
    for number, (name, entry) in enumerate(zip(modules, entries, strict=True)):
        own = measured.get(entry)
        ratio = (torch.empty(layers[name].out_features) if own is None else own).to(world.device)
        dist.broadcast(ratio, src=number % world.size)
        conv1d = not isinstance(layers[name].base_layer, nn.Linear)
        split = magnitude_split(split_factors(cuts.get(f"{name}.weight"), conv1d)[1])
        found[name] = ratio if split is None else tensor_parallel.cut(ratio, split, grid.tp_rank, grid.tp_size)
    return found


def _runs(adapter: Adapter, loaded: load.Loaded, cuts: Mapping[str, Split], grid: Grid) -> Iterator[Run]:
    """Where this rank has the parts of the base that an adapter brings."""
    names = {file_name(name): name for name in loaded.partitions}
    for parameter, replacement in merging.replacements(adapter).items():
        kept, (first, last) = loaded.partitions[names[parameter]], loaded.spans[names[parameter]]
        split, values = cuts.get(parameter), replacement.values
        if trained(split) is not split and grid.tp_rank:
            continue  # a bias that the first rank adds
        if replacement.rows is None:
            own = values if split is None else tensor_parallel.cut(values, split, grid.tp_rank, grid.tp_size)
            yield Run(kept[: last - first], own.reshape(-1)[first:last])
            continue
        width, below = values.shape[1], 0  # rows of the table that ranks before this one have
        if split is not None:
            ((below, _),) = split.spans(sum(part.size for part in split.parts), grid.tp_rank, grid.tp_size)
        for row, value in zip(replacement.rows.tolist(), values, strict=True):
            start = (row - below) * width
            lo, hi = max(start, first), min(start + width, last)
            if lo < hi:
                yield Run(kept[lo - first : hi - first], value[lo - start : hi - start])
