"""What the tests of variants run on ranks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from training import Trace, everything, start, train

from lora_scale.parallel import checkpoint, masters
from lora_scale.parallel.world import World


@dataclass
class Run:
    """One run that was saved midway, and the rest of it again from there."""

    begun: dict[str, Tensor]  # what trains, before the first step
    trace: Trace  # of all steps
    resumed: dict[str, Tensor]  # what trains, after the steps from the checkpoint
    final: Path  # the last checkpoint


def begin_save_go_on(here: World, trees: dict[Any, dict[str, Any]], step: int) -> dict[Any, Run]:
    """Every run, PiSSA from the start that it makes for itself and the others from random values; saved after `step`
    steps and at the end."""
    found = {}
    for name, tree in trees.items():
        print(name, flush=True)
        job = start(here, tree, randomise="pissa" not in tree["lora"])
        begun = everything(job, masters.VALUE)
        total, place = job.data.plan.total_steps, Path(tree["run_dir"])
        first = train(job, 0, step)
        middle = checkpoint.save(job.engine, job.state(step, 0), place, job.write_adapter_config, job.key)
        rest = train(job, step, total - step)
        final = checkpoint.save(job.engine, job.state(total, 0), place, job.write_adapter_config, job.key)
        job.engine.ds.destroy()
        job = start(here, tree, resume=middle)
        resumed = train(job, step, total - step)
        job.engine.ds.destroy()
        trace = Trace(first.losses + rest.losses, first.norms + rest.norms, first.gradients, rest.values)
        found[name] = Run(begun, trace, resumed.values, final)
    return found
