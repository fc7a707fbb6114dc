"""Collectives that autograd can go through, each with the one that its gradient needs. Hidden states are (batch,
sequence, features); `group` is the tensor-parallel group.

    sum_gradient       identity                     backward: sum
    sum_ranks          sum                          backward: identity
    gather_sequence    all-gather of tokens         backward: reduce-scatter
    scatter_sequence   reduce-scatter of tokens     backward: all-gather
    take_sequence      own tokens of all            backward: all-gather
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lora_scale.adapters import marks
from lora_scale.parallel.clock import exposed


class _Operator(torch.autograd.Function):
    """`there` on the way forward, `back` on the gradient; nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any, there: Any, back: Any) -> Tensor:
        ctx.group, ctx.back = group, back
        return there(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.back(grads[0], ctx.group), None, None, None


def sum_gradient(x: Tensor, group: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return x
    return marks.same(_Operator.apply(x, group, _same, _sum), x)


def sum_ranks(x: Tensor, group: Any) -> Tensor:
    """`x` is what a layer has just made, and nobody else's: without a gradient it is overwritten."""
    if not torch.is_grad_enabled() and x.is_contiguous():
        with exposed(x.device):
            dist.all_reduce(x, group=group)
        return x
    return _Operator.apply(x, group, _sum, _same)


def gather_sequence(x: Tensor, group: Any) -> Tensor:
    return marks.gathered(_Operator.apply(x, group, _gather, scatter), x, partial(begin_scatter, group=group))


def scatter_sequence(x: Tensor, group: Any) -> Tensor:
    return _Operator.apply(x, group, scatter, _gather)


def begin_scatter(x: Tensor, group: Any) -> Callable[[], Tensor]:
    """What waits for the sum over the ranks of (batch, tokens, features) and gives this rank's tokens of it; not for
    autograd."""
    ranks, (batch, tokens, features) = dist.get_world_size(group), x.shape
    own = x.new_empty(batch, tokens // ranks, features)
    parts = _by_rank(x, ranks).flatten(0, 1)
    work = dist.reduce_scatter_tensor(own, parts, group=group, async_op=True)

    def wait() -> Tensor:
        with exposed(own.device):
            work.wait()
        return own

    return wait


def scatter(x: Tensor, group: Any) -> Tensor:
    """The same, waited for."""
    return begin_scatter(x, group)()


def total(x: Tensor, group: Any) -> Tensor:
    """The sum over the ranks; not for autograd."""
    return _sum(x, group)


def take_sequence(x: Tensor, group: Any) -> Tensor:
    return _Operator.apply(x, group, _take, _gather)


def _same(x: Tensor, group: Any) -> Tensor:
    return x.view_as(x)


def _sum(x: Tensor, group: Any) -> Tensor:
    y = x.clone(memory_format=torch.contiguous_format)
    with exposed(y.device):
        dist.all_reduce(y, group=group)
    return y


def _gather(x: Tensor, group: Any) -> Tensor:
    """(batch, tokens, features) of each rank, in the order of the ranks."""
    ranks, (batch, tokens, features) = dist.get_world_size(group), x.shape
    parts = x.new_empty(ranks * batch, tokens, features)
    x = x.contiguous()
    with exposed(x.device):
        dist.all_gather_into_tensor(parts, x, group=group)
    return parts.view(ranks, batch, tokens, features).transpose(0, 1).reshape(batch, ranks * tokens, features)


def _take(x: Tensor, group: Any) -> Tensor:
    return _by_rank(x, dist.get_world_size(group))[dist.get_rank(group)]


def _by_rank(x: Tensor, ranks: int) -> Tensor:
    """(batch, tokens, features) as (ranks, batch, tokens of one rank, features)."""
    batch, tokens, features = x.shape
    return x.reshape(batch, ranks, tokens // ranks, features).transpose(0, 1).contiguous()
