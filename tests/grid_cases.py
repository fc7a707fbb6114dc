"""What the tests of grids run on ranks: layouts, loading by parts, planted faults. Each function is called on every
rank of one launch."""

import functools
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from training import Trace, everything, start, train

from lora_scale.adapters import lora
from lora_scale.parallel import checkpoint, gradients, masters, metrics, setup, tensor_parallel, transport
from lora_scale.parallel.world import World
from lora_scale.spec import shapes, splits
from lora_scale.storage.weights import Reader


def replicas(here: World, trees: dict[str, dict[str, Any]]) -> dict[str, dict[tuple[str, int, int, int], str]]:
    """After the last step, a hash of every run of a trainable tensor by (name, shard, start, numel)."""
    found = {}
    for name, tree in trees.items():
        job = start(here, tree)
        train(job)
        optimizer = masters.torch_optimizer(job.engine.ds)
        found[name] = {}
        for part in job.engine.parts():
            cut = part.shard.rank if part.shard.split else 0
            digest = hashlib.sha256()
            for what in (masters.VALUE, *masters.MOMENTS):
                digest.update(part.view(optimizer, what).numpy().tobytes())
            found[name][part.name, cut, part.start, part.numel] = digest.hexdigest()
        job.engine.ds.destroy()
    return found


def loaded_parts(here: World, tree: dict[str, Any]) -> dict[str, Any]:
    """Whether this rank's part of every parameter is the slice of the file that the grid gives it; bytes and sizes of
    reads."""
    sizes: list[int] = []
    original = Reader.read_into

    def counting(self: Reader, source: Any, buffer: Any) -> None:
        sizes.append(source.length)
        original(self, source, buffer)

    before = metrics.bytes_read()
    with mock.patch.object(Reader, "read_into", counting):
        job = start(here, tree, randomise=False)
    read = metrics.bytes_read() - before
    config = job.folder.config
    cuts = splits.splits(shapes.architecture(config), job.engine.grid.tp_size)
    wrong, spans = [], {}
    for parameter, partition in job.loaded.partitions.items():
        name = lora.file_name(parameter)
        with safe_open(job.folder.tensors[name].file, "pt") as file:
            whole = file.get_tensor(name)
        shard = masters.Shard(cuts.get(name), job.engine.grid.tp_rank, job.engine.grid.tp_size).of(whole)
        if name in cuts and cuts[name].parts[0].kept == "first" and job.engine.grid.tp_rank:
            shard = torch.zeros_like(whole)
        first, last = job.loaded.spans[parameter]
        spans[name] = (first, last, shard.numel())
        mine = shard.reshape(-1)[first:last].to(partition.dtype)
        if not torch.equal(partition[: mine.numel()], mine) or partition[mine.numel() :].any():
            wrong.append(name)
    job.engine.ds.destroy()
    weights = sum(entry.nbytes for entry in job.folder.tensors.values())
    found = {"wrong": wrong, "counted": job.loaded.nbytes, "read": read, "weights": weights, "sizes": sizes}
    return found | {"spans": spans, "shard": job.engine.grid.tp_rank}


def save(here: World, tree: dict[str, Any], step: int) -> Trace:
    """Train `step` steps, save, train to the end."""
    job = start(here, tree)
    first = train(job, 0, step)
    checkpoint.save(job.engine, job.state(step, 0), Path(tree["run_dir"]), job.write_adapter_config, job.key)
    rest = train(job, step, job.data.plan.total_steps - step)
    job.engine.ds.destroy()
    return Trace(first.losses + rest.losses, first.norms + rest.norms, first.gradients, rest.values)


def save_at_once(here: World, tree: dict[str, Any]) -> None:
    """Save before the first step."""
    job = start(here, tree, randomise=False)
    checkpoint.save(job.engine, job.state(0, 0), Path(tree["run_dir"]), job.write_adapter_config, job.key)
    job.engine.ds.destroy()


def go_on(here: World, trees: dict[str, dict[str, Any]], saved: str) -> dict[str, list[float]]:
    """The losses after a checkpoint, in each of these layouts."""
    losses = {}
    for name, tree in trees.items():
        job = start(here, tree, randomise=False)
        state = checkpoint.read_state(Path(saved))
        checkpoint.restore(job.engine, Path(saved), state, job.key)
        losses[name] = train(job, state.step, job.data.plan.total_steps - state.step).losses
        job.engine.ds.destroy()
    return losses


def between_nodes(here: World, trees: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Bytes of collectives, in one training step, whose group has members on both of two nodes: half of all ranks
    each."""
    found = {}
    for name, tree in trees.items():
        job = start(here, tree)
        train(job, 0, 1)
        with counted_bytes(lambda ranks: min(ranks) < here.size // 2 <= max(ranks)) as count:
            train_only(job, 1)
        found[name] = count()
        job.engine.ds.destroy()
    return found


def kept_parts(here: World, tree: dict[str, Any]) -> dict[str, Any]:
    """Bytes that loading read, and a hash of all that this rank keeps of each parameter of the base."""
    job = start(here, tree, randomise=False)
    parts = {name: hashlib.sha256(part.numpy().tobytes()).hexdigest() for name, part in job.loaded.partitions.items()}
    return {"read": job.loaded.nbytes, "parts": parts}


def train_only(job: setup.Job, number: int) -> None:
    job.engine.train_step(job.data.plan.step(number), number, 1e-3)


COLLECTIVES = (
    "all_reduce",
    *{transport.ALL_GATHER, "all_gather_into_tensor"},
    "reduce_scatter_tensor",
    "all_gather",
    "broadcast",
)


@contextmanager
def counted_bytes(counts: Callable[[list[int]], bool]) -> Iterator[Callable[[], int]]:
    """Counts bytes of the largest tensor of every collective over a group that `counts`; DeepSpeed's too."""
    import deepspeed.comm.comm as deepspeed_comm

    total = 0

    def counting(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal total
        group = kwargs.get("group") or dist.group.WORLD
        for value in args:
            group = value if isinstance(value, dist.ProcessGroup) else group
        if counts(dist.get_process_group_ranks(group)):
            tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            total += max((t.numel() * t.element_size() for t in tensors), default=0)
        return function(*args, **kwargs)

    backend = deepspeed_comm.cdb
    patches = [mock.patch.object(dist, name, functools.partial(counting, getattr(dist, name))) for name in COLLECTIVES]
    for name in ("all_gather_function", "reduce_scatter_function"):  # DeepSpeed keeps these two
        patches.append(mock.patch.object(backend, name, functools.partial(counting, getattr(backend, name))))
    for patch in patches:
        patch.start()
    try:
        yield lambda: total
    finally:
        for patch in patches:
            patch.stop()


# --- faults: each is one line of the product left out or changed ---------------------------------------------------


@contextmanager
def left_out(factor: str) -> Iterator[None]:
    """The sum over tensor-parallel ranks of one kind of whole factor's gradient."""
    original = tensor_parallel.shared_elements

    def without(*args: Any) -> dict[str, Any]:
        return {name: spans for name, spans in original(*args).items() if not name.endswith(factor)}

    with mock.patch.object(tensor_parallel, "shared_elements", without):
        yield


@contextmanager
def masks_from_the_first_feature() -> Iterator[None]:
    original = lora.LoRALinear.forward

    def forward(self: lora.LoRALinear, x: Tensor) -> Tensor:
        self.first_feature = 0
        return original(self, x)

    with mock.patch.object(lora.LoRALinear, "forward", forward):
        yield


@contextmanager
def whole_factors_counted_on_every_rank() -> Iterator[None]:
    original, calls = gradients._squares, [0]

    def squares(tensors: list[Tensor], device: torch.device) -> Tensor:
        calls[0] += 1
        return original([] if calls[0] % 2 else tensors, device)  # the first of two calls is of the whole factors

    with mock.patch.object(gradients, "_squares", squares):
        yield


@contextmanager
def drawn_by_each_rank() -> Iterator[None]:
    original = lora.draw_a
    with mock.patch.object(lora, "draw_a", lambda seed, *args: original(seed + dist.get_rank(), *args)):
        yield


@contextmanager
def bias_on_every_rank() -> Iterator[None]:
    original = splits.Part.span

    def span(self: splits.Part, rank: int, ranks: int) -> tuple[int, int]:
        return original(self, 0 if self.kept == "first" else rank, ranks)

    with mock.patch.object(splits.Part, "span", span):
        yield


@contextmanager
def clipped_before_the_sum() -> Iterator[None]:
    original = gradients.finish

    def finish(ds: Any, parts: Any, shared: Any, alike: Any, grid: Any, limit: float) -> Tensor:
        norm = original(ds, parts, {}, frozenset(), grid, limit)
        original(ds, parts, shared, alike, grid, 0.0)
        return norm

    with mock.patch.object(gradients, "finish", finish):
        yield


FAULTS: dict[str, Callable[[], Any]] = {
    "sum of colwise lora_A left out": functools.partial(left_out, "lora_A"),
    "sum of rowwise lora_B left out": functools.partial(left_out, "lora_B"),
    "mask of another slice": masks_from_the_first_feature,
    "norm counts whole factors on every rank": whole_factors_counted_on_every_rank,
    "each rank draws its own factors": drawn_by_each_rank,
    "bias added on every rank": bias_on_every_rank,
    "clipped before the sum": clipped_before_the_sum,
}


def with_faults(here: World, tree: dict[str, Any]) -> dict[str, tuple[Trace, dict[str, Tensor]]]:
    """Two steps of the same run, right and with each fault: its trace, and the factors as they were drawn."""
    found = {}
    for name, fault in {"right": nullcontext, **FAULTS}.items():
        with fault():
            drawn = start(here, tree, randomise=False)
            values = everything(drawn, masters.VALUE)
            drawn.engine.ds.destroy()
            job = start(here, tree)
            found[name] = train(job, 0, 2), values
            job.engine.ds.destroy()
    return found


def with_wrong_local_ranks(here: World, tree: dict[str, Any]) -> None:
    start(replace(here, local_rank=1), tree)
