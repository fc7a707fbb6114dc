"""Layouts of a run that fit given hardware, the fastest first by `spec.speed`; and how many layers must recompute.

A layout is tensor parallel size, ZeRO stage, blocks a pass, and how many layers recompute: of each of the first three
every value that divides is tried, of the last the fewest layers that fit. Tensor-parallel ranks share their tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lora_scale.spec import planning, speed
from lora_scale.spec.architecture import Architecture
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.hardware import Gpu
from lora_scale.spec.memory import GIB, Work
from lora_scale.spec.planning import Job
from lora_scale.spec.states import grid_of

SPARE = 0.03  # of the GPU's memory is left free: the plan is not exact


@dataclass(frozen=True, slots=True)
class Layout:
    """One way to run a config on given hardware."""

    cfg: RunConfig
    tp: int
    needed: int  # bytes a GPU
    tokens_per_second: float  # of all GPUs, predicted

    @property
    def changes(self) -> list[str]:
        """As the user would type them."""
        cfg = self.cfg
        found = [
            f"parallel.zero_stage={cfg.parallel.zero_stage}",
            f"train.micro_batch_size={cfg.train.micro_batch_size}",
            f"recompute={cfg.recompute}",
        ]
        shares = ["parallel.sequence_parallel=true"] if cfg.parallel.sequence_parallel else []
        return ([f"parallel.tensor_parallel_size={self.tp}", *shares] if self.tp > 1 else []) + found


def layouts(
    model: Architecture, cfg: RunConfig, ranks: int, gpus_per_node: int, gpu: Gpu, work: Work | None = None
) -> list[Layout]:
    """All that fit, the fastest first. Sizes of tensor parallelism that the model does not allow are left out."""
    found = []
    for tp in range(1, gpus_per_node + 1) if cfg.method == "lora" else (1,):
        shares = tp > 1 and cfg.data.seq_len % tp == 0 and not cfg.eval.generate
        parallel = cfg.parallel.model_copy(update={"tensor_parallel_size": tp, "sequence_parallel": shares})
        here = cfg.model_copy(update={"parallel": parallel})
        try:
            job = planning.job_of(model, here, grid_of(model, here, ranks, gpus_per_node), work)
        except ConfigError:  # a size that does not divide
            continue
        for candidate in _candidates(job):
            if (fitting := least_recompute(candidate, gpu.memory_gib * (1 - SPARE))) is not None:
                found.append(_layout(fitting, gpu, gpus_per_node))
    return sorted(found, key=lambda layout: -layout.tokens_per_second)


def least_recompute(job: Job, limit_gib: float) -> Job | None:
    """The job with the fewest recomputed layers that fits; None where recomputing all of them is not enough."""
    count = len(job.parts.layers)

    def fits(layers: int) -> bool:
        return planning.predicted(_with_recompute(job, layers, count)).needed <= limit_gib * GIB

    if not fits(count):
        return None
    low, high = 0, count  # low - 1 layers do not fit, high layers do
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return _with_recompute(job, low, count)


def settled(job: Job, limit_gib: float | None) -> Job:
    """`recompute: auto` as a number: the fewest layers that fit, all where not even that is enough, none where there is
    no limit."""
    if job.cfg.recompute != "auto":
        return job
    count = len(job.parts.layers)
    if limit_gib is None:
        return _with_recompute(job, 0, count)
    return least_recompute(job, limit_gib * (1 - SPARE)) or _with_recompute(job, count, count)


def _with_recompute(job: Job, layers: int, count: int) -> Job:
    value: str | int = "none" if layers == 0 else "all" if layers == count else layers
    return replace(job, cfg=job.cfg.model_copy(update={"recompute": value}))


def _candidates(job: Job) -> Iterator[Job]:
    """Every ZeRO stage that differs for a frozen base, and every number of blocks a pass that divides the global
    batch."""
    cfg = job.cfg
    stages: tuple[int, ...] = (1, 2, 3)
    if cfg.method == "lora":
        stages = (0, 3) if job.grid.dp > 1 else (0,)  # alone there is nobody to partition a base with
    blocks, left = divmod(cfg.train.global_batch_size, job.grid.dp)
    for stage in stages:
        for micro in [n for n in range(1, blocks + 1) if blocks % n == 0] if not left else []:
            update = {
                "parallel": cfg.parallel.model_copy(update={"zero_stage": stage}),
                "train": cfg.train.model_copy(update={"micro_batch_size": micro}),
            }
            yield replace(job, cfg=cfg.model_copy(update=update))


def _layout(job: Job, gpu: Gpu, gpus_per_node: int) -> Layout:
    seconds = speed.seconds_of_pass(job.model, job.cfg, job.grid, job.work, job.parts, gpu, gpus_per_node).total
    rate = speed.tokens_per_second(job.cfg, job.grid, seconds)
    return Layout(job.cfg, job.grid.tp, planning.predicted(job).needed, rate)
