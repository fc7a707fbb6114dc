"""The output layer of a frozen base tells the loss, not logits: those are made for a chunk of tokens at a time, turned
into their gradient where they lie, and that into the gradient of what the layer reads. What is kept for backward is as
large as its input, whatever the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_scale.adapters import products
from lora_scale.adapters.frozen import FrozenLinear
from lora_scale.parallel.grid import Grid
from lora_scale.parallel.vocabulary import IGNORED, exponentials
from lora_scale.spec import output
from lora_scale.spec.config import RunConfig
from lora_scale.spec.splits import Part


@dataclass(frozen=True, slots=True)
class Cut:
    """Where this rank's part of the vocabulary begins, and who has the others."""

    first: int
    group: Any


class LossHead(FrozenLinear):
    """A frozen output layer that gives, when it was told labels, the loss of what it reads; else logits."""

    cut: Cut | None
    labels: Tensor | None

    def forward(self, input: Tensor) -> Tensor:
        labels, self.labels = self.labels, None
        if labels is None:
            return super().forward(input)
        return _LossInChunks.apply(input.flatten(0, -2), self.weight, self.bias, labels, self.cut)


def let_head_tell_loss(model: nn.Module, cfg: RunConfig, grid: Grid) -> LossHead | None:
    """Turn the model's output layer into its other form, in place, and give it; None where it trains or is not the
    last there is."""
    config: Any = model.config
    is_tied = bool(config.get_text_config().tie_word_embeddings)
    if not output.in_chunks(config.model_type, is_tied, cfg, getattr(config, "final_logit_softcapping", None)):
        return None
    head = model.get_output_embeddings()  # type: ignore[operator]
    if type(head) not in (FrozenLinear, LossHead):  # it is told labels already where several runs share a base
        return None
    head.__class__ = LossHead
    assert isinstance(head, LossHead)
    head.cut = head.labels = None
    if grid.tp_size > 1:
        first, _ = Part(config.get_text_config().vocab_size).span(grid.tp_rank, grid.tp_size)
        head.cut = Cut(first, grid.tp_group)
    return head


class _LossInChunks(torch.autograd.Function):
    """Cross-entropy summed over the tokens whose label is not -100, fp32, shape (); the same on every rank of the
    group. Its gradient for the input is there when it is: backward multiplies it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, labels: Tensor, cut: Cut | None
    ) -> Tensor:
        counted = labels != IGNORED
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        size = output.chunk(len(x), len(weight), x.element_size())
        for first in range(0, len(x), size):
            here = slice(first, first + size)
            losses = _chunk(x[here], weight, bias, labels[here], cut, None if dx is None else dx[here])
            total += losses.masked_fill_(~counted[here], 0.0).sum()
        ctx.dx, ctx.counted = dx, counted
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx, ctx.dx = ctx.dx, None
        dx.mul_((grads[0] * ctx.counted)[:, None])  # in fp32, rounded once
        return dx, None, None, None, None


def _chunk(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, cut: Cut | None, dx: Tensor | None
) -> Tensor:
    """Each token's loss, whatever its label; the gradient of their sum goes into `dx`. Nothing else is left of it."""
    logits = products.mm(x, weight.t())
    if bias is not None:
        logits += bias
    losses, gradient = _whole(logits, labels) if cut is None else _of_part(logits, labels, cut)
    if dx is not None:
        products.mm(logits.copy_(gradient()), weight.data, dx)
    return losses


def _whole(logits: Tensor, labels: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
    """Each row's loss, in fp32, and what gives the gradient of their sum for the logits, in fp32."""
    logs = torch.log_softmax(logits.float(), -1)
    own = labels.clamp(min=0)[:, None]

    def gradient() -> Tensor:
        return logs.exp_().scatter_add_(-1, own, logs.new_full(own.shape, -1.0))

    return -logs.gather(-1, own)[:, 0], gradient


def _of_part(logits: Tensor, labels: Tensor, cut: Cut) -> tuple[Tensor, Callable[[], Tensor]]:
    """The same of one rank's words."""
    rows = exponentials(logits, labels, cut.first, cut.group)

    def gradient() -> Tensor:
        missing = -rows.here[:, None].to(rows.wide.dtype)
        return rows.wide.div_(rows.sums[:, None]).scatter_add_(-1, rows.own[:, None], missing)

    return rows.sums.log() - rows.of_label, gradient
