"""The adapter's gradients between the last backward pass and the optimizer, wherever DeepSpeed's stage keeps them: the
sum over tensor-parallel ranks, the mean over data-parallel ones where DeepSpeed leaves it to us, the norm, the
clipping. In this order: the norm of parts is none.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lora_scale.parallel.clock import exposed
from lora_scale.parallel.grid import Grid
from lora_scale.parallel.masters import Part

Spans = Mapping[str, list[tuple[int, int]]]


def finish(ds: Any, parts: list[Part], shared: Spans, alike: frozenset[str], grid: Grid, max_norm: float) -> Tensor:
    """Make the gradients whole, clip them to `max_norm` (0: do not), and return their norm before that, shape ().

    `shared` gives the elements of a flattened tensor that several tensor-parallel ranks keep, of whose gradient each
    has seen a part: these are summed, in fp32 and all in one collective, and counted once in the norm. So are tensors
    that are `alike`, whole on each of these ranks with all of their gradient, after a division: rounding must not drive
    the copies apart.
    """
    runs = [(part, gradient) for part in parts if (gradient := _gradient(ds, part)) is not None]
    device = parts[0].parameter.device
    everything = [gradient for _, gradient in runs]
    copies = [gradient for part, gradient in runs if part.name in alike]
    if copies:
        torch._foreach_div_(copies, grid.tp_size)
    pieces = [piece for part, gradient in runs for piece in _pieces(part, gradient, shared.get(part.name, []))] + copies
    _sum(pieces, grid.tp_group)
    if grid.dp_size > 1 and any(part.replicated for part in parts):
        _sum(everything, grid.dp_group)
        torch._foreach_div_(everything, grid.dp_size)
    twice = _squares(pieces, device) * (1 - 1 / grid.tp_size)
    total = _squares(everything, device) - twice
    with exposed(device):
        if any(part.partitioned for part in parts):
            dist.all_reduce(total)
        elif grid.tp_size > 1:
            dist.all_reduce(total, group=grid.tp_group)
    norm = total.sqrt()
    if max_norm and everything:
        torch._foreach_mul_(everything, (max_norm / (norm + 1e-6)).clamp(max=1.0))  # torch.nn.utils' own formula
    return norm


def look_at_trained_only(ds: Any, grid: Grid) -> None:
    """Stage 0: between backward and step DeepSpeed walks all parameters, frozen ones too, to reduce gradients that one
    data-parallel rank has whole, and to forget them. At 100B a GPU has less work left than that takes."""
    if grid.dp_size == 1:
        ds.enable_backward_allreduce = False
    trained = [p for p in ds.module.parameters() if p.requires_grad]

    def forget() -> None:
        for p in trained:
            p.grad = None

    ds.zero_grad = forget


def _sum(tensors: list[Tensor], group: Any) -> None:
    """Sum flat tensors over a group, in place, in one collective. Every rank of the group has as many elements."""
    if not tensors:
        return
    flat = torch.cat(tensors)
    with exposed(flat.device):
        dist.all_reduce(flat, group=group)
    torch._foreach_copy_(tensors, flat.split([tensor.numel() for tensor in tensors]))


def _squares(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Sum of all squares, shape ()."""
    if not tensors:
        return torch.zeros((), device=device)
    return torch.stack(torch._foreach_norm(tensors)).square().sum()


def _gradient(ds: Any, part: Part) -> Tensor | None:
    """The gradient of this rank's run: flat, a view; None where this rank has no run."""
    if part.group is None:  # stage 0
        if part.parameter.grad is None:  # an expert without tokens: Adam's moments fall all the same
            part.parameter.grad = torch.zeros_like(part.parameter)
        return part.parameter.grad.view(-1)
    offset = part.offset
    for tensor in ds.optimizer.averaged_gradients[part.group] if part.numel else ():  # end to end: one flat partition
        if offset < tensor.numel():
            return tensor.view(-1).narrow(0, offset, part.numel)
        offset -= tensor.numel()
    return None


def _pieces(part: Part, gradient: Tensor, spans: list[tuple[int, int]]) -> Iterator[Tensor]:
    """What of `spans` (of the whole flattened shard) lies in this rank's run."""
    for start, stop in spans:
        first, last = max(start, part.start), min(stop, part.start + part.numel)
        if first < last:
            yield gradient.narrow(0, first - part.start, last - first)
