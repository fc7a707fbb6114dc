"""A run's plan where its data and device are known: what it assumes is measured, and it is held against the device."""

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lora_scale.parallel import verify
from lora_scale.parallel.data import Data
from lora_scale.parallel.engine import positions_with_target
from lora_scale.parallel.grid import Grid
from lora_scale.spec import planning
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import DoesNotFitError, ModelError
from lora_scale.spec.memory import GIB, LIBRARIES, Work
from lora_scale.spec.planning import Job
from lora_scale.spec.shapes import architecture
from lora_scale.spec.states import grid_of
from lora_scale.spec.wording import binary
from lora_scale.storage.folder import ModelFolder

SAMPLE = 64  # passes that are looked at for their targets


def job_of(cfg: RunConfig, folder: ModelFolder, data: Data, grid: Grid) -> Job | None:
    """The run as a job to plan; None for a model type without a row of shapes."""
    try:
        model = architecture(folder.config)
    except ModelError:
        return None
    assumed = planning.assumed_work(model, cfg)
    shares_node = cfg.parallel.base_sharding == "node"
    per_node = dist.get_world_size(grid.base_group) * grid.tp_size if shares_node else None
    work = Work(masked=assumed.masked and has_masks(data), target_share=target_share(data))
    return planning.job_of(model, cfg, grid_of(model, cfg, grid.world.size, per_node), work)


def has_masks(data: Data) -> bool:
    """Whether some block holds two documents, or padding."""
    return any(
        bool((np.diff(blocks.starts) > 1).any() or (blocks.n_tokens < blocks.seq_len).any())
        for blocks in data.blocks.parts
    )


def target_share(data: Data) -> float:
    """The largest share of a pass's positions that logits are computed for, over the first passes of this rank."""
    largest, seen = 0.0, 0
    for number in range(data.plan.total_steps):
        for batch in data.plan.step(number).micro_batches:
            kept = positions_with_target(batch.labels)
            largest, seen = max(largest, 1.0 if kept is None else len(kept) / batch.labels.shape[1]), seen + 1
        if seen >= SAMPLE:
            break
    return largest


def device_gib(device: torch.device) -> float | None:
    """What a run can have of each rank's GPU: all but what others use now, the least of all ranks; None on CPUs."""
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    least = torch.tensor(free + torch.cuda.memory_reserved(device), device=device)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return round(int(least) / GIB, 1)


def host_warnings(cfg: RunConfig, row: dict[str, Any], ranks: int) -> list[str]:
    """What is to be pinned for activations on this host, whose kernel would end the run without a word, beside what is
    free there now. `ranks`: on this host. Some hosts grow as they are used, so it is no error."""
    wants, free = ranks * row["this_run"]["pinned"], verify.bytes_free()
    if cfg.activation_offloading == "none" or wants <= free:
        return []
    return [
        f"activation_offloading is {cfg.activation_offloading}: {ranks} ranks of this host pin {binary(wants)} of its "
        f"memory, {binary(free)} are free; fewer layers take less, and so does recompute"
    ]


def check(job: Job, row: dict[str, Any], limit_gib: float | None, ignore: bool) -> str:
    """The answer as one line; DoesNotFitError with what would make it fit, unless that is to be ignored."""
    said = planning.answer(row["this_run"], job.grid.ranks, limit_gib)
    if limit_gib is None:  # a CPU: there is neither context nor NCCL, and host memory is not judged
        return f"{binary(row['this_run']['allocated'] - LIBRARIES)} of tensors a rank at the fullest moment"
    if said.fits is not False or ignore:
        return said.sentence
    ways = ["; or ".join(" and ".join(way.changes) for way in planning.ways_out(job, limit_gib))]
    hint = f"\nthis would make it fit: {ways[0]}" if ways[0] else ""
    raise DoesNotFitError(f"{said.sentence}{hint}\n`lora-scale plan` shows why; --ignore-plan tries all the same")
