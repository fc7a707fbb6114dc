"""Several adapters that train in turns on one base in memory. Each has its own factors, optimizer, data and schedule,
and learns to the bit what it would have learned alone; the layers hold the factors of whose turn it is."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from lora_scale.adapters import initial
from lora_scale.adapters.lora import adapted_layers
from lora_scale.parallel import masters, recompute, samples, setup
from lora_scale.parallel.data import Data
from lora_scale.parallel.deepspeed_config import ds_config
from lora_scale.parallel.engine import Engine
from lora_scale.parallel.setup import Job
from lora_scale.parallel.world import on_every_rank
from lora_scale.spec import cost
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import InterruptedRunError

HELD = ("lora_A", "lora_B", "r", "lora_alpha", "scaling")  # of a layer, by one adapter


@dataclass(frozen=True, eq=False, slots=True)
class Factors:
    """What the layers of a model hold while one adapter trains, by layer."""

    held: dict[str, tuple[object, ...]]

    @classmethod
    def of(cls, model: nn.Module) -> "Factors":
        """Those that the model holds now."""
        layers = adapted_layers(model).items()
        return cls({name: tuple(getattr(layer, key) for key in HELD) for name, layer in layers})

    def put(self, model: nn.Module) -> None:
        for name, layer in adapted_layers(model).items():
            for key, value in zip(HELD, self.held[name], strict=True):
                setattr(layer, key, value)


@dataclass(eq=False, slots=True)
class Turn:
    """One run: its factors, and what does a step each time it is asked."""

    factors: Factors
    steps: Iterator[None]


def start_engine(cfg: RunConfig, first: Job, model: nn.Module, data: Data, start: Path | None = None) -> Job:
    """A run on the base of `first`, whose model holds its factors from now on. `model` is its own, on meta, of which
    only the factors are taken. Collective."""
    shared, grid, parameters = first.engine.module, first.engine.grid, setup.count(model)
    alone = cfg.model_copy(update={"parallel": cfg.parallel.model_copy(update={"overlap": False})})  # never computes
    cuts, _ = on_every_rank(lambda: setup.cut(alone, model, first.folder, grid))
    for layer in adapted_layers(model).values():
        for factor in (layer.lora_A, layer.lora_B):
            factor.data = factor.data.to(first.world.device)
    Factors.of(model).put(shared)
    layers = recompute.decoder_layers(shared)
    accumulation, classes = cost.accumulation_steps(cfg, first.world.size), sorted({type(x).__name__ for x in layers})
    config = ds_config(cfg, accumulation, recompute.layer_numel(layers), parameters.trainable, classes)
    engine = Engine(shared, cfg, grid, config, None, cuts)
    if start is not None:
        masters.begin_at(engine.ds, engine.parts(), on_every_rank(lambda: initial.brought(start)))
    work = setup.work_of(cfg, first.folder, parameters, data, first.world)
    found = samples.read(cfg, first.folder, grid)
    return Job(
        cfg, first.world, first.folder, first.base_fingerprint, data, engine, first.loaded, parameters, work, found
    )


def take_turns(model: nn.Module, turns: Sequence[Turn]) -> None:
    """A step of each run after the other, until all are over. A run that is interrupted has saved: the others go on to
    where they are interrupted too, then the first one's error is raised."""
    left, ended = list(turns), None
    while left:
        for turn in list(left):
            turn.factors.put(model)
            try:
                next(turn.steps)
            except StopIteration:
                left.remove(turn)
            except InterruptedRunError as error:
                left.remove(turn)
                ended = ended or error
    if ended:
        raise ended
