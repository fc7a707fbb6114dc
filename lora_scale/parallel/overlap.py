"""Sequence-parallel exchanges that hide behind the products beside them, for one block of tokens at a time.

    block input    the first layer that reads it waits for each rank's tokens before their rows (`marks.arriving`); in
                   backward the last product that adds to its gradient sends each rank's rows off (`marks.Sum`)
    rowwise layer  sends each rank's rows of its output off; in backward it waits for each rank's rows of the gradient

A rank's own tokens are there from the start, and are wanted from it last: what hides is all but the last addition
(`parallel.exchange`).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_scale.adapters import marks, products
from lora_scale.adapters.frozen import FrozenLinear
from lora_scale.adapters.lora import LoRALinear
from lora_scale.parallel import collectives
from lora_scale.parallel.exchange import Exchange, Summing

READERS = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})  # what reads a block's input, and nothing else


def reads_in_parts(block: nn.Module) -> bool:
    """Whether all that reads the block's input are frozen linear layers, adapted or not."""
    children = dict(block.named_children())
    readers = next((names for names in READERS if names <= children.keys()), set())
    return bool(readers) and all(_is_frozen(children[name]) for name in readers)


def _is_frozen(layer: nn.Module) -> bool:
    """Frozen, and with an adapter that makes its input again: others keep it, in memory that is overwritten."""
    if isinstance(layer, LoRALinear):
        return layer.remakes_input and type(layer.base_layer) is FrozenLinear
    return type(layer) is FrozenLinear


def gatherer(exchange: Exchange) -> Callable[[Tensor, Any], Tensor]:
    """An operator: (batch, this rank's tokens, features) -> (batch, all tokens, features), still arriving."""
    return partial(_gather_for_readers, exchange)


def _gather_for_readers(exchange: Exchange, x: Tensor, group: Any) -> Tensor:
    if not (torch.is_grad_enabled() and x.requires_grad) or x.shape[0] > 1:
        return collectives.gather_sequence(x, group)
    total = _Sent(exchange)
    marks.let_overwrite_gradient(x)  # it is the sum that `total` has made
    y = marks.gathered(_Gathered.apply(x, total), x, partial(collectives.begin_scatter, group=group))
    marks.let_readers_add(y, total)
    marks.let_arrive(y, total.arriving)
    return marks.lent(y)


class _Sent(marks.Sum):
    """A gradient that its last reader sends off rank by rank, summed over the ranks and cut to this rank's tokens."""

    def __init__(self, exchange: Exchange):
        super().__init__()
        self.exchange = exchange
        self.arriving: list[marks.Arrival] = []
        self._summing: Summing | None = None
        self._sent = False

    def add_product(self, dy: Tensor, weight: Tensor, is_last: bool) -> None:
        is_first, tokens = self._summing is None, len(dy) // self.exchange.size
        if self._summing is None:
            self._summing = self.exchange.summing(tokens, weight.shape[1], dy)
        for index, (rank, room) in enumerate(self._summing.rooms):
            piece = dy[rank * tokens : (rank + 1) * tokens]
            if is_first:
                products.mm(piece, weight, room)
            else:
                products.add_mm(room, piece, weight)
            if is_last:
                self._summing.send(index)
        self._sent = is_last

    def own(self) -> Tensor | None:
        """This rank's tokens of the gradient, (tokens, features); None where no reader gave any."""
        self.add_held()
        summing, self._summing = self._summing, None
        if summing is None:
            return None
        if not self._sent:  # a reader had no gradient
            for index in range(len(summing.rooms)):
                summing.send(index)
        return summing.result()


class _Gathered(torch.autograd.Function):
    """Tokens of all ranks, left on their way; backward: the sum, already on its way where all readers were ours."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, total: _Sent) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.total, ctx.shape = total, x.shape
        y, arrivals = total.exchange.gather(x[0])
        total.arriving.extend(arrivals)
        return torch.ops.aten._unsafe_view(y, (1, *y.shape))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        own, rest = ctx.total.own(), grads[0]
        dx = own.view(ctx.shape) if own is not None else None
        if rest is not None:
            scattered = collectives.scatter(rest, ctx.total.exchange.group)
            dx = scattered if dx is None else scattered + dx
        return dx, None


class _ProductScattered(torch.autograd.Function):
    """x W^T + b, summed over the ranks and cut to this rank's tokens; W frozen, nothing kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, exchange: Exchange) -> Tensor:
        ctx.weight, ctx.exchange = weight, exchange  # the Parameter itself, not its gathered tensor
        tokens, matrix = x.shape[1] // exchange.size, weight.t()
        summing = exchange.summing(tokens, weight.shape[0], x)
        for index, (rank, room) in enumerate(summing.rooms):
            piece = x[0, rank * tokens : (rank + 1) * tokens]
            if bias is None:
                products.mm(piece, matrix, room)
            else:
                torch.addmm(bias, piece, matrix, out=room)
            summing.send(index)
        return torch.ops.aten._unsafe_view(summing.result(), (1, tokens, weight.shape[0]))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        whole, arrivals = ctx.exchange.gather(grads[0][0].contiguous())
        weight = ctx.weight.data
        dx = whole.new_empty(len(whole), weight.shape[1])
        for first, rows, wait in arrivals:
            wait()
            products.mm(whole[first : first + rows], weight, dx[first : first + rows])
        return dx.view(1, *dx.shape), None, None, None


class ScatteredLinear(FrozenLinear):
    """A rowwise frozen layer and the sum over the ranks behind it."""

    exchange: Exchange

    def forward(self, input: Tensor) -> Tensor:
        if input.shape[0] > 1 or not (torch.is_grad_enabled() and input.requires_grad):
            return collectives.scatter_sequence(super().forward(input), self.exchange.group)
        return _ProductScattered.apply(input, self.weight, self.bias, self.exchange)


def scatter_output(layer: nn.Module, exchange: Exchange) -> bool:
    """Make a frozen rowwise layer scatter its own output; False for any other layer, which is left as it is."""
    if type(layer) is not FrozenLinear:
        return False
    layer.__class__ = ScatteredLinear
    layer.exchange = exchange  # type: ignore[assignment]
    return True
