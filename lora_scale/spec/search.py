"""Layouts of a run that fit given hardware, the fastest first by `spec.speed`; and how many layers must recompute.

A layout is tensor parallel size, ZeRO stage, blocks a pass, how many layers recompute, and how many have activations in
host memory: of each of the first three every value that divides is tried, of recompute the fewest layers that fit, with
activations in host memory and without. Tensor-parallel ranks share their tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from lora_scale.spec import planning, speed
from lora_scale.spec.architecture import Architecture
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.hardware import GPUS, Gpu
from lora_scale.spec.kept import offloadable, offloaded_layers, recomputed_layers
from lora_scale.spec.memory import GIB, Work
from lora_scale.spec.planning import Job
from lora_scale.spec.states import grid_of

AUTO = ("recompute", "activation_offloading")  # keys that `auto` leaves to the plan
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
        if cfg.activation_offloading != "none":
            found.append(f"activation_offloading={cfg.activation_offloading}")
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
            limit = gpu.memory_gib * (1 - SPARE)
            if (fitting := least_recompute(candidate, limit)) is None:
                continue
            found.append(_layout(fitting, gpu, gpus_per_node))
            if cfg.method == "lora" and cfg.activation_offloading == "none" and fitting.cfg.recompute != "none":
                instead = candidate.cfg.model_copy(update={"activation_offloading": "auto"})
                with_host = least_recompute(replace(candidate, cfg=instead), limit)
                assert with_host is not None, "what is in host memory takes no more of the GPU"
                found.append(_layout(with_host, gpu, gpus_per_node))
    return sorted(found, key=lambda layout: -layout.tokens_per_second)


def least_recompute(job: Job, limit_gib: float) -> Job | None:
    """The job with the fewest recomputed layers that fits; None where recomputing all of them is not enough. With
    `activation_offloading: auto` as many layers as the link carries are in host memory before any recomputes, and none
    more than must be."""
    count = len(job.parts.layers)

    def with_layers(recomputed: int) -> Job:
        return _with_most_offloaded(_with_recompute(job, recomputed, count))

    found = _fewest(with_layers, count, limit_gib)
    if found is None or job.cfg.activation_offloading != "auto":
        return found
    return _fewest(partial(_with_offloading, found), len(offloaded_layers(found.cfg, count)), limit_gib)


def _fewest(made: Callable[[int], Job], most: int, limit_gib: float) -> Job | None:
    """The job made of the smallest number, up to `most`, with which it fits."""

    def fits(number: int) -> bool:
        return planning.predicted(made(number)).needed <= limit_gib * GIB

    if not fits(most):
        return None
    low, high = 0, most  # low - 1 do not fit, high do
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return made(low)


def unsettled(cfg: RunConfig) -> str:
    """The first key that is still auto, or ""."""
    return next((key for key in AUTO if getattr(cfg, key) == "auto"), "")


def settled(job: Job, limit_gib: float | None) -> Job:
    """`recompute` and `activation_offloading`, where they are auto, as numbers: the fewest layers that fit; all where
    not even that is enough, none where there is no limit."""
    asked, count = (job.cfg.recompute, job.cfg.activation_offloading), len(job.parts.layers)
    if "auto" not in asked:
        return job
    if limit_gib is None:
        job = job if asked[0] != "auto" else _with_recompute(job, 0, count)
        return job if asked[1] != "auto" else _with_offloading(job, 0)
    limit_gib *= 1 - SPARE
    if asked[0] == "auto":
        return least_recompute(job, limit_gib) or _with_offloading(_with_recompute(job, count, count), 0)
    most = _with_most_offloaded(job)
    layers = len(offloaded_layers(most.cfg, count))
    return _fewest(partial(_with_offloading, job), layers, limit_gib) or most


def _with_recompute(job: Job, layers: int, count: int) -> Job:
    value: str | int = "none" if layers == 0 else "all" if layers == count else layers
    return replace(job, cfg=job.cfg.model_copy(update={"recompute": value}))


def _with_most_offloaded(job: Job) -> Job:
    """As many layers' activations in host memory as were asked for, as there are, and for `auto` as there is time to
    copy: on an H200, whose link to the host is the slowest beside what it computes of all GPUs known here."""
    asked, count = job.cfg.activation_offloading, len(job.parts.layers)
    if asked in ("all", "none"):
        return job
    able = offloadable(recomputed_layers(job.cfg, count), count)
    if asked == "auto":
        in_time = speed.offloaded_in_time(job.model, job.cfg, job.grid, job.work, job.parts, GPUS["h200"])
        return _with_offloading(job, int(able * in_time))
    return _with_offloading(job, min(int(asked), able))


def _with_offloading(job: Job, layers: int) -> Job:
    return replace(job, cfg=job.cfg.model_copy(update={"activation_offloading": layers or "none"}))


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
