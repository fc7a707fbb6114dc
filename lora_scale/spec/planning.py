"""The whole plan of a run as one JSON row, its answer in one sentence, and what would make a run fit that does not.

Joins `spec.cost` (counts), `spec.memory` (bytes) and `spec.servers` (vLLM). Suggestions are found by trying them: each
is planned like the run itself, and none is printed that was not computed.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from lora_scale.spec import cost, servers
from lora_scale.spec.architecture import Architecture
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.families import WITHOUT_MASKS, family
from lora_scale.spec.memory import GIB, Memory, Parts, Work, memory, parts_of
from lora_scale.spec.states import Grid, trained_shapes
from lora_scale.spec.states import states as states_of
from lora_scale.spec.wording import binary

MOST_SUGGESTIONS = 3
MOST_GPUS = 1024


@dataclass(frozen=True, slots=True)
class Job:
    """Everything a plan is a function of."""

    model: Architecture
    cfg: RunConfig
    grid: Grid
    work: Work
    parts: Parts


def job_of(model: Architecture, cfg: RunConfig, grid: Grid, work: Work | None = None) -> Job:
    """A job to plan; its work is assumed where it is not known."""
    return Job(model, cfg, grid, work or assumed_work(model, cfg), parts_of(model, cfg, grid.tp))


def with_attention(cfg: RunConfig, model_type: str, on_gpus: bool) -> RunConfig:
    """The config with `model.attention: auto` settled. ConfigError for documents where attention is more than these."""
    asked = cfg.model.attention
    if asked == "documents" and model_type not in WITHOUT_MASKS:
        raise ConfigError(
            f"model.attention is documents, which is not known to be the attention of model type {model_type!r}; it is "
            f"for {', '.join(WITHOUT_MASKS)}. Set model.attention=auto"
        )
    if asked != "auto":
        return cfg
    chosen = "documents" if on_gpus and model_type in WITHOUT_MASKS else "sdpa"
    return cfg.model_copy(update={"model": cfg.model.model_copy(update={"attention": chosen})})


def assumed_work(model: Architecture, cfg: RunConfig) -> Work:
    """What a plan assumes before it has seen data: the larger case of each. Families that tell documents apart by their
    positions get a mask where a block holds two, or padding; `model.attention: documents` has none. On GPUs."""
    row = family(model.model_type)
    settled = with_attention(cfg, model.model_type, on_gpus=True)
    masked = settled.model.attention != "documents" and (row is None or row.packs)
    return Work(masked=masked, target_share=1.0)


def plan(job: Job) -> dict[str, Any]:
    """Every figure of `lora-scale plan`, in bytes and counts, beside the same job as full fine-tuning."""
    model, cfg = job.model, job.cfg
    row: dict[str, Any] = {
        "ranks": job.grid.ranks,
        "tensor_parallel_size": job.grid.tp,
        "accumulation_steps": cost.accumulation_steps(cfg, job.grid.ranks),
        "assumes": asdict(job.work),
        "parameters": {"total": cost.total(model), "computing": cost.computing(model)},
        "this_run": _figures(job),
        "warnings": servers.warnings(model, cfg),
    }
    if cfg.method == "lora":
        row["full_fine_tuning"] = _figures(job_of(model, cost.full_fine_tuning(cfg), Grid(job.grid.ranks), job.work))
    return row


def _figures(job: Job) -> dict[str, Any]:
    model, cfg, grid = job.model, job.cfg, job.grid
    trained = cost.numel(job.parts.trained if grid.tp == 1 else trained_shapes(model, cfg))
    states, found = states_of(job.parts.frozen, job.parts.trained, cfg, grid), predicted(job)
    return {
        "trainable": trained,
        "model_states": asdict(states) | {"total": states.total},
        "moments": {name: asdict(moment) | {"total": moment.total} for name, moment in found.moments.items()},
        "peak_moment": found.peak_moment,
        "allocated": found.allocated,
        "waste": found.waste,
        "context": found.context,
        "nccl": found.nccl,
        "needed": found.needed,
        "likely": found.likely,
        "host": found.host,
        "pinned": found.pinned,
        "by_analogy": found.by_analogy,
        "export": cost.export_bytes(trained),
        "checkpoint": cost.checkpoint_bytes(trained),
        "flops_per_token": cost.flops_per_token(model, cfg),
    }


@dataclass(frozen=True, slots=True)
class Answer:
    """`fits` is None where it was not said on what."""

    fits: bool | None
    sentence: str


def answer(run: dict[str, Any], ranks: int, limit_gib: float | None) -> Answer:
    """The first line of a plan."""
    needed, on = run["needed"], "1 GPU" if ranks == 1 else f"{ranks} GPUs"
    if limit_gib is None:
        return Answer(None, f"needs {binary(needed)} a GPU on {on}; --gpu says whether that fits")
    of = f"{needed / GIB:,.1f} of {limit_gib:g} GiB a GPU on {on}"
    if needed > limit_gib * GIB:
        return Answer(False, f"does not fit: {needed / GIB - limit_gib:,.1f} GiB short, {of}")
    if run["likely"] > limit_gib * GIB:
        return Answer(True, f"fits tightly: {of}; the allocator will have to give back what it reserves in vain")
    return Answer(True, f"fits: {of}")


@dataclass(frozen=True, slots=True)
class WayOut:
    """Changes that together make a run fit, as the user would type them, and what it needs then."""

    changes: tuple[str, ...]
    needed: int


def ways_out(job: Job, limit_gib: float) -> list[WayOut]:
    """Up to three ways to fit, found by trying: each change alone where one is enough, else those that save most, one
    after the other, until it fits. Empty where nothing that is tried is enough."""
    changes = _changes(job)
    alone = [WayOut((change.text,), change.needed) for change in changes if change.needed <= limit_gib * GIB]
    if alone:
        return alone[:MOST_SUGGESTIONS]
    taken: dict[str, str] = {}
    needed = predicted(job).needed
    while saving := [change for change in changes if change.needed < needed]:
        best = min(saving, key=lambda change: change.needed)
        taken[best.key], needed = best.text, best.needed
        if needed <= limit_gib * GIB:
            return [WayOut(tuple(taken.values()), needed)]
        changes = _changes(best.job)
    return []


@dataclass(frozen=True, slots=True)
class _Change:
    key: str
    text: str
    job: Job
    needed: int


def _changes(job: Job) -> list[_Change]:
    """Single changes, those first that cost least: recompute, a smaller pass, partitioning, more GPUs, shorter
    blocks."""
    return [_Change(key, text, changed, predicted(changed).needed) for key, text, changed in _candidates(job)]


def _candidates(job: Job) -> Iterator[tuple[str, str, Job]]:
    cfg, grid, train = job.cfg, job.grid, job.cfg.train
    if cfg.recompute != "all":
        yield ("recompute", "recompute=all", _with(job, recompute="all"))
    if (micro := train.micro_batch_size) > 1:
        size = micro // 2 if micro % 2 == 0 else 1
        text = f"train.micro_batch_size={size}"
        yield ("micro", text, _with(job, train={"micro_batch_size": size}))
    if cfg.parallel.zero_stage != 3 and grid.dp > 1:
        yield ("stage", "parallel.zero_stage=3", _with(job, parallel={"zero_stage": 3}))
    if cfg.parallel.zero_stage == 3 and grid.ranks * 2 <= MOST_GPUS:
        more = replace(job, grid=replace(grid, ranks=2 * grid.ranks))
        yield ("gpus", f"{2 * grid.ranks} GPUs", _with(more))
    if (length := cfg.data.seq_len) > 512:
        yield ("length", f"data.seq_len={length // 2}", _with(job, data={"seq_len": length // 2}))


def _with(job: Job, **changes: Any) -> Job:
    """The job with other values; sections as dicts. The global batch grows to the next multiple where it must."""
    update = {
        key: getattr(job.cfg, key).model_copy(update=value) if isinstance(value, dict) else value
        for key, value in changes.items()
    }
    cfg = job.cfg.model_copy(update=update)
    one_pass = cfg.train.micro_batch_size * job.grid.dp
    batch = -(-cfg.train.global_batch_size // one_pass) * one_pass
    return replace(job, cfg=cfg.model_copy(update={"train": cfg.train.model_copy(update={"global_batch_size": batch})}))


def predicted(job: Job) -> Memory:
    """Memory of a job's largest rank."""
    return memory(job.model, job.cfg, job.grid, job.work, job.parts)
