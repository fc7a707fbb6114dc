"""The steps before the first training step, each under its own name: data, model, engine. What they share is the
config and the world."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lora_scale.adapters import baselines, initial, peft, trained
from lora_scale.adapters.dropout import DropoutContext
from lora_scale.adapters.frozen import freeze_linears
from lora_scale.adapters.lean import make_lean
from lora_scale.adapters.lora import adapt, adapted_layers
from lora_scale.adapters.targets import fused_notes
from lora_scale.parallel import (
    flat,
    flow,
    load,
    masters,
    offload,
    principal,
    recompute,
    samples,
    source,
    tensor_parallel,
    transport,
    zero3,
)
from lora_scale.parallel.checkpoint import State
from lora_scale.parallel.data import Data
from lora_scale.parallel.deepspeed_config import ds_config
from lora_scale.parallel.engine import Engine
from lora_scale.parallel.gathering import Gathering
from lora_scale.parallel.grid import Grid
from lora_scale.parallel.samples import Samples
from lora_scale.parallel.world import World, on_every_rank, on_rank_zero
from lora_scale.spec import configfile, cost, shapes, splits
from lora_scale.spec import hardware as gpus
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError, ModelError
from lora_scale.spec.families import family
from lora_scale.spec.splits import Split
from lora_scale.spec.states import keeps_adapters_whole, keeps_base_flat
from lora_scale.storage import hub, provenance
from lora_scale.storage.console import Console, bar, size
from lora_scale.storage.folder import ModelFolder, fingerprint, open_folder


@dataclass(frozen=True, slots=True)
class Parameters:
    """Counts of the whole model."""

    total: int
    trainable: int


@dataclass(frozen=True, slots=True)
class Work:
    """Arithmetic of one token, in FLOPs, and what a GPU could do; definitions in spec.cost."""

    flops_per_token: float  # 4N for an adapter, 6N for full fine-tuning
    with_attention: float  # and the attention scores and values over the documents' lengths
    peak_tflops: float | None  # of the GPU in bf16; None where it is not known


@dataclass(frozen=True, slots=True)
class Job:
    """A run that is set up: everything the loop needs, on this rank."""

    cfg: RunConfig
    world: World
    folder: ModelFolder
    base_fingerprint: str
    data: Data
    engine: Engine
    loaded: load.Loaded
    parameters: Parameters
    work: Work
    samples: Samples | None = None

    def evaluate(self, step: int) -> dict[str, Any]:
        """The columns of a step's row that an evaluation gives: the validation loss, and scores of what is written."""
        row: dict[str, Any] = {"val_loss": self.engine.evaluate(self.data.validation)}
        if self.samples:
            row["generated"] = samples.write(self.samples, self.engine.module, self.engine.grid, self.cfg.run_dir, step)
        return row

    def state(self, step: int, tokens_seen: int) -> State:
        """What a checkpoint after `step` steps says of this run."""
        return state_of(self.cfg, self.base_fingerprint, self.data, step, tokens_seen)

    def key(self, parameter: str) -> str:
        """How a checkpoint names a trainable parameter."""
        return peft.key(parameter) if self.cfg.method == "lora" else parameter

    def write_adapter_config(self, folder: Path) -> None:
        """What PEFT needs beside the tensors; nothing for full fine-tuning."""
        if self.cfg.method == "lora":
            base = peft.public_name(self.cfg.model.path)
            peft.write_config(
                folder, peft.adapter_config(self.engine.module, adapted_layers(self.engine.module), self.cfg.lora, base)
            )


def state_of(cfg: RunConfig, base_fingerprint: str, data: Data, step: int, tokens_seen: int) -> State:
    """What a checkpoint after `step` steps of a run says of it; known before the model is loaded."""
    return State(
        step=step,
        method=cfg.method,
        seed=cfg.seed,
        global_batch_size=cfg.train.global_batch_size,
        tokens_seen=tokens_seen,
        base_fingerprint=base_fingerprint,
        config_sha256=configfile.config_sha256(cfg),
        data=data.identity(cfg),
        lora=cfg.lora.model_dump(mode="json"),
        baseline=cfg.baseline.model_dump(mode="json"),
        versions=provenance.versions(),
    )


def open_base(cfg: RunConfig, screen: Console) -> tuple[ModelFolder, str]:
    """The base's headers, read by every rank, and its fingerprint, computed by the first."""
    path = on_every_rank(lambda: hub.resolve(cfg.model, only_cached=True))
    folder = on_every_rank(lambda: open_folder(path, cfg.model.trust_remote_code))
    on_every_rank(lambda: load.read_config(folder, cfg) and None)  # before the data is read
    identity = on_rank_zero(lambda: fingerprint(folder))
    screen.line(
        f"base     {cfg.model.path}: {folder.config.get('model_type')}, {len(folder.files)} files, "
        f"{size(folder.nbytes)}{', fp8 blocks dequantised while read' if folder.has_blocks else ''}, {identity[:19]}"
    )
    return folder, identity


def find_init_adapter(cfg: RunConfig, folder: ModelFolder, identity: str) -> Path | None:
    """The folder with the factors to start from, once it is known to be of this base; for the first rank."""
    if cfg.init_adapter is None:
        return None
    found = source.find(cfg.init_adapter)
    if not cfg.allow_other_base:
        way_out = "set model.path to that base, or allow_other_base=true"
        source.refuse_another_base(found, folder, identity, way_out)
    return found.path


def build_model(
    cfg: RunConfig, folder: ModelFolder, start: Path | None = None, resume: Path | None = None
) -> tuple[nn.Module, DropoutContext | None, list[str]]:
    """The model on meta with its trainable parts marked: adapters put in, or the whole base; and notes for the user.

    `start` is an adapter folder whose factors are taken in place of drawn ones, `resume` the checkpoint that the run
    goes on from. Collective over all ranks.
    """
    model = load.empty(folder, cfg)
    if cfg.kernels == "auto":
        make_lean(model)
    if cfg.method == "full":
        model.requires_grad_(True)
        return model, None, []
    if cfg.method != "lora":
        baselines.insert(model, cfg, recompute.decoder_layers(model))
        freeze_linears(model)
        return model, None, []
    dropout = DropoutContext(cfg.seed) if cfg.lora.dropout else None
    notes = fused_notes(model, cfg.lora)
    layers = adapt(model, cfg.lora, cfg.seed, dropout)
    trained.mark(model, cfg.lora, layers)
    if start is not None:
        initial.start_from(start, model, layers)
        notes.append(f"starts from the factors of {start}")
    notes += principal.begin(cfg, model, layers, folder, resume)
    freeze_linears(model)
    return model, dropout, notes


def start_engine(
    cfg: RunConfig,
    model: nn.Module,
    dropout: DropoutContext | None,
    folder: ModelFolder,
    identity: str,
    data: Data,
    grid: Grid,
    screen: Console,
    start: Path | None = None,
) -> Job:
    """Fill the model, every rank its own bytes, and hand it to DeepSpeed. `start` as in `build_model`."""
    world = grid.world
    found = samples.read(cfg, folder, grid)
    parameters = count(model)
    cuts, note = on_every_rank(lambda: cut(cfg, model, folder, grid))
    if note:
        screen.line(f"note     {note}")
    recompute.apply(model, cfg.recompute)
    layers = recompute.decoder_layers(model)
    flow.arrange(model, cfg, layers)
    offload.apply(layers, cfg, world.device)
    config = ds_config(
        cfg,
        cost.accumulation_steps(cfg, world.size),
        recompute.layer_numel(layers),
        parameters.trainable,
        sorted({type(layer).__name__ for layer in layers}),
    )
    partitioner = _partitioner(cfg, config, layers, grid, screen)
    show = _load_bar(screen)
    loaded = on_every_rank(lambda: load.fill(model, folder, world.device, partitioner, cuts, grid, show))
    if isinstance(partitioner, flat.FlatBase):
        model.gathering = Gathering(partitioner)  # type: ignore[assignment]
    elif partitioner and cfg.method == "lora":
        group = grid.own_group if keeps_adapters_whole(cfg, parameters.trainable) else grid.dp_group
        for p in filter(lambda p: p.requires_grad and not zero3.is_partitioned(p), model.parameters()):
            zero3.partition_over(p, group)
    model.to(world.device)  # the adapters; what was filled is there already
    screen.line(
        f"loaded   {size(loaded.nbytes)} a rank in {loaded.seconds:.1f} s ({loaded.gb_per_second:.2f} GB/s); "
        f"trains {parameters.trainable:,} of {parameters.total:,} parameters "
        f"({parameters.trainable / parameters.total:.2%})"
    )
    if loaded.unused:
        screen.line(
            f"note     {len(loaded.unused)} tensors of the base are not used by this model, first {loaded.unused[0]}"
        )
    engine = Engine(model, cfg, grid, config, dropout, cuts)
    if start is not None:
        masters.begin_at(engine.ds, engine.parts(), on_every_rank(lambda: initial.brought(start)))
    work = work_of(cfg, folder, parameters, data, world)
    return Job(cfg, world, folder, identity, data, engine, loaded, parameters, work, found)


def _partitioner(
    cfg: RunConfig, config: dict[str, Any], layers: list[nn.Module], grid: Grid, screen: Console
) -> zero3.Partitioner | flat.FlatBase | None:
    """Who cuts the base over the ranks; None where each keeps a whole one. Collective."""
    if not keeps_base_flat(cfg):
        three = cfg.parallel.zero_stage == 3
        return zero3.Partitioner(config, load.dtype_of(cfg), grid.base_group) if three else None
    if dist.get_world_size(grid.base_group) == 1:
        return None
    way, note = transport.choose(grid.world, grid.base_group, cfg.parallel.base_transport)
    if note:
        screen.line(f"note     {note}")
    return flat.FlatBase(layers, way, grid.world.device)


def cut(cfg: RunConfig, model: nn.Module, folder: ModelFolder, grid: Grid) -> tuple[dict[str, Split], str]:
    """Make the model this rank's tensor-parallel part of itself; how its base is to be cut while it is read, and a note
    for the user ("": none). Collective."""
    if grid.tp_size == 1:
        return {}, ""
    try:
        found = splits.splits(shapes.architecture(folder.config), grid.tp_size)
    except ModelError as error:
        ranks = f"parallel.tensor_parallel_size is {grid.tp_size}"
        raise ConfigError(f"{ranks}, but {error}; set it to 1: ZeRO-3 shards every model") from error
    row = family(str(folder.config["model_type"]))
    assert row is not None, "splits() refuses such a model"
    ways = {"sequence_parallel": cfg.parallel.sequence_parallel, "overlaps": cfg.parallel.overlap}
    return found, tensor_parallel.apply(model, row, found, grid, **ways)


def count(model: nn.Module) -> Parameters:
    """Parameters of the model; a tied one counts once."""
    sizes = {id(p): zero3.numel(p) for p in model.parameters()}
    trainable = sum(sizes[id(p)] for p in model.parameters() if p.requires_grad)
    total = sum(sizes.values())
    return Parameters(total, trainable)


def work_of(cfg: RunConfig, folder: ModelFolder, parameters: Parameters, data: Data, world: World) -> Work:
    """The work of a token of this run's data; for a model type without a row of shapes, N is every parameter."""
    lengths = data.blocks.lengths.astype("float64")
    attended = float((lengths * (lengths + 1)).sum() / 2 / lengths.sum())
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else ""
    peak = gpus.peak_tflops(name) if cfg.precision == "bf16" else None
    try:
        model = shapes.architecture(folder.config)
    except ModelError:
        flops = float((6 if cfg.method == "full" else 4) * parameters.total)
        return Work(flops, flops, peak)
    flops = float(cost.flops_per_token(model, cfg))
    return Work(flops, flops + cost.attention_flops_per_token(model, attended), peak)


def _load_bar(screen: Console) -> Callable[[int, int], None]:
    start = time.perf_counter()

    def show(done: int, total: int) -> None:
        rate = done / max(1e-3, time.perf_counter() - start)
        screen.live(lambda: f"loading  {bar(done, total)} {size(done)} of {size(total)} a rank, {size(rate)}/s")

    return show
