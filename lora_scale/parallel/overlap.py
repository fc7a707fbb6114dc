"""Sequence-parallel collectives that hide behind the products beside them, for one block of tokens at a time.

The tokens are cut into two chunks, of each of which every rank has its part (`collectives.chunks`), so that a gathered
chunk is a run of tokens. While one chunk is on its way, the product of the other is computed:

    block input    the first layer that reads it waits for each chunk before its rows (`marks.arriving`); in backward
                   the last product that adds to its gradient sends each chunk off as soon as it is there (`marks.Sum`)
    rowwise layer  sends each chunk of its output off; in backward it waits for each chunk of the gradient

Half of each collective stays exposed, of the first chunk on the way in and of the last one on the way out.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_scale.adapters import marks
from lora_scale.adapters.frozen import FrozenLinear
from lora_scale.adapters.lora import LoRALinear
from lora_scale.parallel import collectives
from lora_scale.parallel.clock import exposed

READERS = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})  # what reads a block's input, and nothing else


def reads_by_chunks(block: nn.Module) -> bool:
    """Whether all that reads the block's input are frozen linear layers, adapted or not."""
    children = dict(block.named_children())
    readers = next((names for names in READERS if names <= children.keys()), set())
    return bool(readers) and all(_is_frozen(children[name]) for name in readers)


def _is_frozen(layer: nn.Module) -> bool:
    return type(layer.base_layer if isinstance(layer, LoRALinear) else layer) is FrozenLinear


def gather_for_readers(x: Tensor, group: Any) -> Tensor:
    """(batch, this rank's tokens, features) -> (batch, all tokens, features), still arriving."""
    if not (torch.is_grad_enabled() and x.requires_grad) or x.shape[0] > 1:
        return collectives.gather_sequence(x, group)
    total = _Sent(group)
    y = marks.gathered(_Gathered.apply(x, group, total), x, lambda dx: collectives.scatter(dx, group))
    marks.let_readers_add(y, total)
    marks.let_arrive(y, total.arriving)
    return y


def _wait(work: Any, device: torch.device) -> None:
    with exposed(device):
        work.wait()


class _Sent(marks.Sum):
    """A gradient that its last reader sends off chunk by chunk, summed over the ranks and cut to this rank's tokens."""

    def __init__(self, group: Any):
        super().__init__()
        self.group = group
        self.arriving: list[marks.Arrival] = []
        self._own: Tensor | None = None
        self._works: list[Any] = []

    def add(self, dy: Tensor, weight: Tensor) -> None:
        if not self.is_last():
            super().add(dy, weight)
            return
        ranks = dist.get_world_size(self.group)
        count = collectives.chunks(1, len(dy) // ranks)
        total = dy.new_empty(len(dy), weight.shape[1]) if self.total is None else self.total
        own = dy.new_empty(count, len(dy) // ranks // count, weight.shape[1])
        for rows, mine, piece in zip(total.chunk(count), own, dy.chunk(count), strict=True):
            if self.total is None:
                torch.mm(piece, weight, out=rows)
            else:
                rows.addmm_(piece, weight)
            self._works.append(dist.reduce_scatter_tensor(mine, rows, group=self.group, async_op=True))
        self.total, self._own = total, own

    def own(self) -> Tensor | None:
        """This rank's tokens of the gradient, (tokens, features), once all of it has been added; None if it was not."""
        if self._own is None:
            return None
        for work in self._works:
            _wait(work, self._own.device)
        own, self._own, self.total = self._own, None, None
        self._works.clear()
        return own.flatten(0, 1)


class _Gathered(torch.autograd.Function):
    """All-gather of tokens, left on its way; backward: reduce-scatter, already on its way if all readers were ours."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, total: _Sent) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.total, ctx.shape = total, x.shape
        count, ranks, (_, tokens, features) = collectives.chunks(1, x.shape[1]), dist.get_world_size(group), x.shape
        y = x.new_empty(1, ranks * tokens, features)
        for mine, rows in zip(x.contiguous().chunk(count, 1), y.chunk(count, 1), strict=True):
            work = dist.all_gather_into_tensor(rows[0], mine[0], group=group, async_op=True)
            total.arriving.append((rows.shape[1], partial(_wait, work, x.device)))
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        total: _Sent = ctx.total
        own = total.own()
        rest = grads[0]
        if own is None and (left := total.take()) is not None:
            left = left.view(1, *left.shape)
            rest = left if rest is None else rest + left
        if rest is not None:
            scattered = collectives.scatter(rest, total.group)
            return scattered if own is None else scattered + own.view(ctx.shape), None, None
        return own.view(ctx.shape) if own is not None else None, None, None


class _ProductScattered(torch.autograd.Function):
    """x W^T + b, summed over the ranks and cut to this rank's tokens; W frozen, nothing kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, group: Any) -> Tensor:
        ctx.weight, ctx.group = weight, group  # the Parameter itself, not its gathered tensor
        ranks, (_, tokens, _) = dist.get_world_size(group), x.shape
        count = collectives.chunks(1, tokens // ranks)
        own = x.new_empty(count, tokens // ranks // count, weight.shape[0])
        on_the_way = []
        for piece, mine in zip(x[0].chunk(count), own, strict=True):
            y = torch.nn.functional.linear(piece, weight, bias)
            on_the_way.append((dist.reduce_scatter_tensor(mine, y, group=group, async_op=True), y))
        for work, _ in on_the_way:
            _wait(work, x.device)
        return torch.ops.aten._unsafe_view(own, (1, tokens // ranks, weight.shape[0]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        dy, weight, group = grads[0], ctx.weight.data, ctx.group
        ranks, tokens = dist.get_world_size(group), dy.shape[1]
        count = collectives.chunks(1, tokens)
        whole = dy.new_empty(count, ranks * tokens // count, dy.shape[2])
        dx = dy.new_empty(count, ranks * tokens // count, weight.shape[1])
        works = [
            dist.all_gather_into_tensor(rows, mine, group=group, async_op=True)
            for rows, mine in zip(whole, dy[0].contiguous().chunk(count), strict=True)
        ]
        for work, rows, out in zip(works, whole, dx, strict=True):
            _wait(work, dy.device)
            torch.mm(rows, weight, out=out)
        return dx.view(1, ranks * tokens, -1), None, None, None


class ScatteredLinear(FrozenLinear):
    """A rowwise frozen layer and the sum over the ranks behind it."""

    group: Any

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[0] > 1:
            return collectives.scatter_sequence(super().forward(input), self.group)
        return _ProductScattered.apply(input, self.weight, self.bias, self.group)


def scatter_output(layer: nn.Module, group: Any) -> bool:
    """Make a frozen rowwise layer scatter its own output; False for any other layer, which is left as it is."""
    if type(layer) is not FrozenLinear:
        return False
    layer.__class__ = ScatteredLinear
    layer.group = group
    return True
