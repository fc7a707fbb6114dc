"""Logits that are cut along the vocabulary over a group. For their cross-entropy no rank ever holds a whole row of
them; for generation, which asks for one position at a time, each gets it."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from lora_scale.parallel.clock import exposed
from lora_scale.spec.splits import Part

IGNORED = -100  # a label that carries no loss, as in torch and transformers


class _CutCrossEntropy(torch.autograd.Function):
    """Kept for backward are the logits as they came and two numbers a row; the exponentials are computed again."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, first: int, group: Any) -> Tensor:
        rows = exponentials(logits, labels, first, group)
        normaliser = rows.sums.log()
        counted = labels != IGNORED
        ctx.save_for_backward(logits, rows.largest + normaliser, rows.own, rows.here & counted, counted)
        return (normaliser - rows.of_label).masked_fill(~counted, 0.0).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits, normaliser, own, here, counted = ctx.saved_tensors
        gradient = (logits.float() - normaliser[:, None]).exp_()
        gradient.mul_(counted[:, None])
        gradient.scatter_add_(-1, own[:, None], -here[:, None].to(gradient.dtype))
        return gradient.mul_(grads[0]).to(logits.dtype), None, None, None


@dataclass(frozen=True, slots=True)
class Exponentials:
    """Of rows of logits that are cut, in fp32; what is a number a row is the same on every rank."""

    wide: Tensor  # exp(logit - largest) of this rank's words
    largest: Tensor  # of the whole row
    sums: Tensor  # of the whole row's exponentials
    of_label: Tensor  # the label's logit - largest
    own: Tensor  # labels counted from this rank's first word on, 0 where they are not here
    here: Tensor


def exponentials(logits: Tensor, labels: Tensor, first: int, group: Any) -> Exponentials:
    """Two collectives: the rows' maxima; then, in one sum, their sums of exponentials and their labels' logits."""
    wide = logits.to(torch.float32, copy=True)
    largest = wide.amax(-1)
    with exposed(logits.device):
        dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    own = labels - first
    here = (own >= 0) & (own < logits.shape[-1])
    own = own.masked_fill(~here, 0)
    of_label = wide.sub_(largest[:, None]).gather(-1, own[:, None])[:, 0].masked_fill(~here, 0.0)
    sums = torch.stack([wide.exp_().sum(-1), of_label])
    with exposed(logits.device):
        dist.all_reduce(sums, group=group)
    return Exponentials(wide, largest, sums[0], sums[1], own, here)


def cross_entropy(logits: Tensor, labels: Tensor, first: int, group: Any) -> Tensor:
    """Loss summed over the rows whose label is not -100, fp32, shape (); the same on every rank of the group.

    `logits` (rows, this rank's tokens) are those of the tokens from `first` on; `labels` (rows) count whole.
    """
    return _CutCrossEntropy.apply(logits, labels, first, group)


def gather(logits: Tensor, tokens: int, group: Any) -> Tensor:
    """Logits (..., this rank's tokens) of every rank of the group, whole: (..., tokens), the same on each.

    The parts differ in size where the vocabulary does not divide, so they travel padded to the largest.
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    spans = [Part(tokens).span(number, ranks) for number in range(ranks)]
    widest = max(stop - start for start, stop in spans)
    assert logits.shape[-1] == spans[rank][1] - spans[rank][0], (logits.shape, spans[rank])
    own = F.pad(logits, (0, widest - logits.shape[-1])).contiguous()
    parts = [torch.empty_like(own) for _ in spans]
    dist.all_gather(parts, own, group=group)
    return torch.cat([part[..., : stop - start] for part, (start, stop) in zip(parts, spans, strict=True)], -1)
