"""The fp32 values and Adam moments of trainable tensors, wherever DeepSpeed's stage keeps them. Trainable tensors only.

Each stage flattens differently. What they share: a trainable tensor's fp32 value is a run of some flat tensor that
the optimizer steps, and its moments are the same run of that tensor's state. `parts` finds the runs of this rank;
gathering and restoring need nothing else.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_scale.parallel import zero3

VALUE, MOMENTS = "value", ("exp_avg", "exp_avg_sq")
_BATCH = 64 << 20  # bytes gathered in one collective, so that full fine-tuning does not hold the model in host memory


@dataclass(frozen=True, slots=True)
class Part:
    """The run [start, start + numel) of one flattened trainable tensor that this rank's optimizer steps."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]  # of the whole tensor
    flat: Tensor | None  # the optimizer's own tensor; None where this rank owns nothing of it
    offset: int  # of the run in `flat`
    start: int  # of the run in the flattened whole tensor
    numel: int
    working: Tensor | None  # ZeRO-3: the same run of what the forward pass gathers
    speaks: bool = (
        True  # whether this rank sends the run when the tensor is gathered: at stage 0 every rank has all of it
    )

    def view(self, optimizer: torch.optim.Optimizer, what: str) -> Tensor:
        """The run itself: shape (numel,), fp32, writable."""
        if self.flat is None or not self.numel:
            return torch.empty(0, device=self.parameter.device)
        source = self.flat.detach() if what == VALUE else _state(optimizer, self.flat)[what]
        return source.view(-1).narrow(0, self.offset, self.numel)


def parts(ds: Any) -> list[Part]:
    """This rank's run of every trainable tensor, in the model's order; the same names on every rank."""
    named = [(name, p) for name, p in ds.module.named_parameters() if p.requires_grad]
    return [_part(ds, name, p) for name, p in named]


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
        return Part(name, p, shape, flat, int(offset), start, owned, p.ds_tensor.view(-1)[:owned])  # type: ignore[attr-defined]
    if hasattr(p, "_hp_mapping"):  # stages 1 and 2
        if p._hp_mapping is None:
            return Part(name, p, shape, None, 0, 0, 0, None)
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
            None,
        )
    return Part(name, p, shape, p, 0, 0, total, None, speaks=dist.get_rank() == 0)


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
        mine = torch.tensor([[p.start, p.numel if p.speaks else 0] for p in batch], device=found[0].parameter.device)
        places = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(places, mine)
        spans = torch.stack(places).cpu()  # (ranks, tensors, 2)
        owned = torch.cat([p.view(optimizer, what).float() for p in batch if p.speaks] or [mine.new_empty(0).float()])
        flats = _to_rank_zero(owned, spans[:, :, 1].sum(1).tolist())
        if flats is None:
            yield from ((p.name, None) for p in batch)
            continue
        cursor = [0] * len(flats)
        for i, p in enumerate(batch):
            whole = torch.empty(_numel(p.shape), dtype=torch.float32)
            for rank, flat in enumerate(flats):
                start, numel = spans[rank, i].tolist()
                whole[start : start + numel] = flat[cursor[rank] : cursor[rank] + numel]
                cursor[rank] += numel
            yield p.name, whole.view(p.shape)


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


def restore(ds: Any, values: Mapping[str, Mapping[str, Tensor]], step: int) -> None:
    """Put whole fp32 tensors back: `values[what][name]`, what being value, exp_avg, exp_avg_sq. No collective.

    `step` is the number of optimizer steps the moments have seen (Adam's bias correction).
    """
    optimizer = torch_optimizer(ds)
    for p in parts(ds):
        if not hasattr(p.parameter, "ds_id"):  # stages 0-2: what the forward pass reads is whole on every rank
            p.parameter.data.copy_(values[VALUE][p.name].view(p.shape))
        for what in (VALUE, *MOMENTS):
            piece = values[what][p.name].reshape(-1)[p.start : p.start + p.numel]
            p.view(optimizer, what).copy_(piece)
            if what == VALUE and p.working is not None:
                p.working.copy_(piece)
        if p.flat is not None:  # not from param_groups: DeepSpeed's stage 3 keeps those empty between steps
            _state(optimizer, p.flat)["step"].fill_(float(step))


def _batches(found: list[Part]) -> Iterator[list[Part]]:
    batch: list[Part] = []
    size = 0
    for p in found:
        nbytes = 4 * _numel(p.shape)
        if batch and size + nbytes > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(p)
        size += nbytes
    if batch:
        yield batch


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
