"""What the tests of variants run on ranks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from training import Trace, everything, start, train

from lora_scale.parallel import checkpoint, masters, setup
from lora_scale.parallel.world import World
from lora_scale.spec import shapes, states


@dataclass
class Run:
    """One run that was saved midway, and the rest of it again from there."""

    begun: dict[str, Tensor]  # what trains, before the first step
    trace: Trace  # of all steps
    resumed: dict[str, Tensor]  # what trains, after the steps from the checkpoint
    middle: Path  # that checkpoint
    final: Path  # the last one
    moved: Trace | None  # the steps from another layout's checkpoint, where there is one before
    again: dict[str, Tensor] | None  # what a run trains that starts from the last one; PiSSA has a start of its own


def begin_save_go_on(here: World, trees: dict[Any, dict[str, Any]], step: int) -> dict[Any, Run]:
    """Every run, PiSSA from the start that it makes for itself and the others from random values; saved after `step`
    steps and at the end. Names are (what, layout)."""
    found: dict[Any, Run] = {}
    for name, tree in trees.items():
        print(name, flush=True)
        others = [run.middle for (what, _), run in found.items() if what == name[0]]
        job = start(here, tree, randomise="pissa" not in tree["lora"])
        check_plan(job)
        begun = everything(job, masters.VALUE)
        total, place = job.data.plan.total_steps, Path(tree["run_dir"])
        first = train(job, 0, step)
        middle = checkpoint.save(job.engine, job.state(step, 0), place, job.write_adapter_config, job.key)
        rest = train(job, step, total - step)
        final = checkpoint.save(job.engine, job.state(total, 0), place, job.write_adapter_config, job.key)
        job.engine.ds.destroy()
        resumed = go_on(here, tree, middle, step)
        moved = go_on(here, tree, others[-1], step) if others else None
        trace = Trace(first.losses + rest.losses, first.norms + rest.norms, first.gradients, rest.values)
        again = None if "pissa" in tree["lora"] else begun_at(here, tree, final)
        found[name] = Run(begun, trace, resumed.values, middle, final, moved, again)
    return found


def check_plan(job: setup.Job) -> None:
    """The plan knows what trains on the rank that holds most: the last one of a tensor-parallel group."""
    grid, model = job.engine.grid, shapes.architecture(job.folder.config)
    if grid.tp_rank == grid.tp_size - 1:
        planned = states.trained_shapes(model, job.cfg, grid.tp_size)
        assert sorted(tuple(part.shape) for part in job.engine.parts()) == sorted(map(tuple, planned))


def begun_at(here: World, tree: dict[str, Any], adapter: Path) -> dict[str, Tensor]:
    """What trains in a new run with this `init_adapter`."""
    job = start(here, {**tree, "init_adapter": str(adapter)})
    values = everything(job, masters.VALUE)
    job.engine.ds.destroy()
    return values


def go_on(here: World, tree: dict[str, Any], checkpoint: Path, step: int) -> Trace:
    """The steps after a checkpoint, of whatever layout."""
    job = start(here, tree, resume=checkpoint)
    rest = train(job, step, job.data.plan.total_steps - step)
    job.engine.ds.destroy()
    return rest


def all_go_on(here: World, runs: dict[str, tuple[dict[str, Any], Path]], step: int) -> dict[str, Trace]:
    return {name: go_on(here, tree, checkpoint, step) for name, (tree, checkpoint) in runs.items()}
