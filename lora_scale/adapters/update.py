"""The adapter's part of a layer as one operation: y + scaling * B A x, added into y by the product itself."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_scale.adapters import marks


class _Update(torch.autograd.Function):
    """Keeps A x, r wide, and what `x` is made of; casts of the factors are made anew in backward."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, x: Tensor, lora_a: nn.Parameter, lora_b: nn.Parameter, scaling: float, made: marks.Origin
    ) -> Tensor:
        narrow = _flat(x) @ lora_a.to(x.dtype).t()  # (tokens, r)
        _flat(y).addmm_(narrow, lora_b.to(x.dtype).t(), alpha=scaling)
        ctx.mark_dirty(y)
        ctx.save_for_backward(narrow, *made.kept)
        ctx.factors = lora_a, lora_b  # the Parameters themselves: ZeRO-3 gathers them anew for backward
        ctx.scaling, ctx.made, ctx.sum = scaling, replace(made, kept=()), marks.sum_of(x)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), (narrow, *kept), (lora_a, lora_b) = grads, ctx.saved_tensors, ctx.factors
        needs_x, needs_a, needs_b = ctx.needs_input_grad[1:4]
        flat = _flat(dy)
        dx = da = db = shared = None
        if needs_x or needs_a:
            dnarrow = (flat @ lora_b.data.to(dy.dtype)) * ctx.scaling
            if needs_a and ctx.made.share is not None:  # on its way while the other products run
                shared = ctx.made.share(dnarrow.view(*dy.shape[:-1], -1))
            if needs_x and ctx.sum is not None:
                ctx.sum.add(dnarrow, lora_a.data.to(dy.dtype))
            elif needs_x:
                dx = (dnarrow @ lora_a.data.to(dy.dtype)).view(*dy.shape[:-1], lora_a.shape[1])
        if needs_b:
            db = (flat.t() @ narrow).to(lora_b.dtype) * ctx.scaling
        if needs_a:
            own = dnarrow if shared is None else _flat(shared())
            product = ctx.made.product or (lambda own, *kept: own.t() @ _flat(ctx.made.make(*kept)))
            da = product(own, *kept).to(lora_a.dtype)
        return dy, dx, da, db, None, None


def _flat(x: Tensor) -> Tensor:
    return x.view(-1, x.shape[-1]) if x.is_contiguous() else x.reshape(-1, x.shape[-1])


def updated(y: Tensor, x: Tensor, lora_a: nn.Parameter, lora_b: nn.Parameter, scaling: float) -> Tensor:
    """`y` (..., out) plus scaling * B A x for `x` (..., in), A (r, in), B (out, r); `y` is overwritten.

    The factors may be fp32 beside activations in bf16; products are in the activations' dtype.
    """
    return _Update.apply(y.contiguous(), x, lora_a, lora_b, scaling, marks.origin(x))
