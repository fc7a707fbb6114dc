"""The fp32 values and Adam moments of trainable tensors, wherever DeepSpeed's stage keeps them. Trainable tensors only.

Each stage flattens differently. What they share: a trainable tensor's fp32 value is a run of some flat tensor that
the optimizer steps, and its moments are the same run of that tensor's state. `parts` finds the runs of this rank;
gathering and restoring need nothing else.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_scale.adapters.lora import file_name
from lora_scale.parallel import zero3
from lora_scale.parallel.grid import Grid
from lora_scale.parallel.tensor_parallel import cut, join
from lora_scale.spec.splits import Split

VALUE, MOMENTS = "value", ("exp_avg", "exp_avg_sq")
_BATCH = 64 << 20  # bytes gathered in one collective, so that full fine-tuning does not hold the model in host memory


@dataclass(frozen=True, slots=True)
class Shard:
    """How a tensor is cut over tensor-parallel ranks, and which of them this one is."""

    split: Split | None  # None: whole on every rank
    rank: int
    ranks: int

    def of(self, whole: Tensor) -> Tensor:
        return whole if self.split is None else cut(whole, self.split, self.rank, self.ranks)

    def whole_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the whole tensor, from the shard's."""
        if self.split is None:
            return shape
        dim = self.split.dim % len(shape)
        return (*shape[:dim], sum(part.size for part in self.split.parts), *shape[dim + 1 :])


WHOLE = Shard(None, 0, 1)


@dataclass(frozen=True, slots=True)
class Part:
    """The run [start, start + numel) of one flattened trainable tensor that this rank's optimizer steps."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]  # of this rank's tensor-parallel shard; the whole tensor where it is not cut
    flat: Tensor | None  # the optimizer's own tensor; None where this rank owns nothing of it
    offset: int  # of the run in `flat`
    start: int  # of the run in the flattened shard
    numel: int
    group: int | None = None  # the optimizer's number of `flat`; None at stage 0, where it is the parameter
    working: Tensor | None = None  # ZeRO-3: the same run of what the forward pass gathers
    replicated: bool = False  # ZeRO-3: kept whole by every data-parallel rank, which DeepSpeed then does not reduce
    shard: "Shard" = field(default_factory=lambda: WHOLE)
    is_first: bool = True  # of the data-parallel ranks

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self.shard.whole_shape(self.shape)

    @property
    def partitioned(self) -> bool:
        """Whether the data-parallel ranks own different runs of it."""
        return self.group is not None and not self.replicated

    @property
    def speaks(self) -> bool:
        """Whether this rank sends its run when the tensor is gathered: of equal ones, one does."""
        return (self.partitioned or self.is_first) and (self.shard.split is not None or self.shard.rank == 0)

    def view(self, optimizer: torch.optim.Optimizer, what: str) -> Tensor:
        """The run itself: shape (numel,), fp32, writable."""
        if self.flat is None or not self.numel:
            return torch.empty(0, device=self.parameter.device)
        source = self.flat.detach() if what == VALUE else _state(optimizer, self.flat)[what]
        return source.view(-1).narrow(0, self.offset, self.numel)


def parts(ds: Any, grid: Grid, splits: Mapping[str, Split]) -> list[Part]:
    """This rank's run of every trainable tensor, in the model's order; the same names on every rank. `splits` says
    which are cut over tensor-parallel ranks, and how."""
    named = [(name, p) for name, p in ds.module.named_parameters() if p.requires_grad]
    found = []
    for name, p in named:
        shard = Shard(splits.get(name), grid.tp_rank, grid.tp_size)
        found.append(replace(_part(ds, name, p), shard=shard, is_first=grid.dp_rank == 0))
    return found


def torch_optimizer(ds: Any) -> torch.optim.Optimizer:
    """The AdamW inside whatever DeepSpeed wrapped around it."""
    inner = getattr(ds.optimizer, "optimizer", ds.optimizer)
    assert isinstance(inner, torch.optim.Optimizer)
    return inner


def _part(ds: Any, name: str, p: nn.Parameter) -> Part:
    shape, total = zero3.shape(p), zero3.numel(p)
    if hasattr(p, "ds_id"):  # stage 3
        group, offset, numel = ds.optimizer.grad_position[ds.optimizer.get_param_id(p)]
        start = min(numel * p.ds_zero_partition_rank, total)  # type: ignore[attr-defined]
        owned = min(numel, total - start)  # the last partitions end in padding
        flat = ds.optimizer.fp32_partitioned_groups_flat[group]
        working = p.ds_tensor.view(-1)[:owned]  # type: ignore[attr-defined]
        replicated = zero3.group_size(p) == 1
        return Part(name, p, shape, flat, int(offset), start, owned, group, working, replicated)
    if hasattr(p, "_hp_mapping"):  # stages 1 and 2
        if p._hp_mapping is None:
            return Part(name, p, shape, None, 0, 0, 0, 0)
        here = p._hp_mapping
        optimizer = ds.optimizer
        flats = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
        address = here.lp_fragment_address
        return Part(
            name,
            p,
            shape,
            flats[here.param_group_index],
            here.hp_fragment_address.start,
            address.start,
            address.numel,
            here.param_group_index,
        )
    return Part(name, p, shape, p, 0, 0, total)


def _state(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """AdamW's state of a tensor; made as AdamW makes it where no step has been taken."""
    state = optimizer.state[flat]
    if not state:
        state["step"] = torch.tensor(0.0, dtype=torch.float32)
        state.update({moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS})
    return state


def gather(ds: Any, found: list[Part], what: str) -> Iterator[tuple[str, Tensor | None]]:
    """(name, whole tensor in fp32 on the CPU) on rank 0, (name, None) elsewhere; a collective that every rank must
    drain.

    Only the owned runs travel, to rank 0 alone: as many bytes as the trainable tensors have.
    """
    optimizer = torch_optimizer(ds)
    for batch in _batches(found):
        mine = torch.tensor(
            [[p.start, p.numel if p.speaks else 0, p.shard.rank] for p in batch], device=found[0].parameter.device
        )
        places = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(places, mine)
        spans = torch.stack(places).cpu()  # (ranks, tensors, 3)
        owned = torch.cat([p.view(optimizer, what).float() for p in batch if p.speaks] or [mine.new_empty(0).float()])
        flats = _to_rank_zero(owned, spans[:, :, 1].sum(1).tolist())
        if flats is None:
            yield from ((p.name, None) for p in batch)
            continue
        cursor = [0] * len(flats)
        for i, p in enumerate(batch):
            whole = p.whole_shape
            shapes = [
                (whole if (split := p.shard.split) is None else split.shape(whole, t, p.shard.ranks))
                for t in range(1 if p.shard.split is None else p.shard.ranks)
            ]
            shards = [torch.empty(_numel(shape), dtype=torch.float32) for shape in shapes]
            for rank, flat in enumerate(flats):
                start, numel, shard = spans[rank, i].tolist()
                if numel:
                    shards[shard][start : start + numel] = flat[cursor[rank] : cursor[rank] + numel]
                cursor[rank] += numel
            shaped = [shard.view(shape) for shard, shape in zip(shards, shapes, strict=True)]
            yield p.name, shaped[0] if p.shard.split is None else join(shaped, p.shard.split, whole)


def _to_rank_zero(owned: Tensor, numels: list[int]) -> list[Tensor] | None:
    """Every rank's flat tensor on rank 0 (CPU), None elsewhere. Sizes differ, so each travels by itself, unpadded."""
    if dist.get_rank() != 0:
        if owned.numel():
            dist.send(owned, dst=0)
        return None
    flats = [owned.cpu()]
    for rank, numel in enumerate(numels[1:], start=1):
        buffer = torch.empty(numel, dtype=owned.dtype, device=owned.device)
        if numel:
            dist.recv(buffer, src=rank)
        flats.append(buffer.cpu())
    return flats


def restore(ds: Any, found: list[Part], values: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
    """Put whole fp32 tensors back: `values[what][name]`, what being value, exp_avg, exp_avg_sq. No collective.

    `step` is the number of optimizer steps the moments have seen (Adam's bias correction).
    """
    optimizer = torch_optimizer(ds)
    for p in found:
        for what in (VALUE, *MOMENTS):
            _put(optimizer, p, what, values[what][p.name])
        if p.flat is not None:  # not from param_groups: DeepSpeed's stage 3 keeps those empty between steps
            _state(optimizer, p.flat)["step"].fill_(float(step))


def begin_at(ds: Any, found: list[Part], values: Mapping[str, Tensor]) -> None:
    """Give the tensors that `values` names, by their names in the base's files, these whole values. No collective."""
    for p in found:
        if (value := values.get(file_name(p.name))) is not None:
            _put(torch_optimizer(ds), p, VALUE, value)


def _put(optimizer: torch.optim.Optimizer, p: Part, what: str, whole: Tensor) -> None:
    """This rank's run of a whole tensor, wherever it is kept."""
    shard = p.shard.of(whole)
    piece = shard.reshape(-1)[p.start : p.start + p.numel]
    p.view(optimizer, what).copy_(piece)
    if what != VALUE:
        return
    if not hasattr(p.parameter, "ds_id"):  # stages 0-2: what the forward pass reads is whole on every rank
        p.parameter.data.copy_(shard)
    if p.working is not None:
        p.working.copy_(piece)


def _batches(found: list[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    size = 0
    for p in found:
        nbytes = 4 * _numel(p.whole_shape)
        if batch and size + nbytes > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(p)
        size += nbytes
    if batch:
        yield batch


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
