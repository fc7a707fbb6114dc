"""Linear layers whose weight never trains: the backward pass needs the weight, not the input, and keeps neither.

torch's linear saves its input whenever the weight may want a gradient, and pins the weight it computed with. Under
ZeRO-3 the pinned weight is the gathered copy, so every layer's full weight would stay alive until backward. Here the
Parameter is looked up again in backward, when ZeRO-3's hooks have gathered it anew.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_scale.adapters import marks, products


class FrozenMatmul(torch.autograd.Function):
    """y = x W^T + b for W (out, in), or x W + b for a Conv1D's W (in, out); plus `added`, of y's shape. Gradients for x
    and `added` only."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        transposed: bool,
        added: Tensor | None,
    ) -> Tensor:
        ctx.weight, ctx.transposed = weight, transposed  # the Parameter itself, not its gathered tensor
        ctx.sum, ctx.adds = marks.sum_of(x), added is not None
        flat, matrix = x.reshape(-1, x.shape[-1]), weight if transposed else weight.t()
        if added is not None:  # of a layer without a bias, whose input is there
            y = products.sum_mm(added.reshape(len(flat), -1), flat, matrix)
            return torch.ops.aten._unsafe_view(y, added.shape)
        y = flat.new_empty(len(flat), matrix.shape[1])
        for first, rows, wait in marks.arriving(x) or [(0, len(flat), lambda: None)]:
            wait()
            here = slice(first, first + rows)
            if bias is None:
                products.mm(flat[here], matrix, y[here])
            else:
                torch.addmm(bias, flat[here], matrix, out=y[here])
        return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1]))  # a view could not be added to

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, Tensor | None]:
        weight = ctx.weight.data.t() if ctx.transposed else ctx.weight.data
        dy = grads[0]
        if ctx.sum is not None:
            ctx.sum.add(dy.reshape(-1, dy.shape[-1]), weight)
            return None, None, None, None, dy if ctx.adds else None
        dx = products.mm(dy.reshape(-1, dy.shape[-1]), weight)
        return dx.view(*dy.shape[:-1], dx.shape[1]), None, None, None, dy if ctx.adds else None


class FrozenLinear(nn.Linear):
    """nn.Linear with a frozen weight and bias."""

    added: Tensor | None = None  # to what it gives next

    def forward(self, input: Tensor) -> Tensor:
        added, self.added = self.added, None
        if not torch.is_grad_enabled() and added is None:
            return F.linear(input, self.weight, self.bias)
        return FrozenMatmul.apply(input, self.weight, self.bias, False, added)


class FrozenConv1D(nn.Module):
    """transformers' Conv1D (GPT-2; weight (in, out)) with a frozen weight and bias."""

    weight: nn.Parameter
    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return FrozenMatmul.apply(x, self.weight, self.bias, True, None)


def freeze_linears(model: nn.Module) -> int:
    """Turn every linear layer whose own parameters are all frozen into its frozen form, in place; how many there were.

    Names and parameters stay as they are. Subclasses of nn.Linear are left alone: their forward is their own business.
    Conv1D is known by its name, because this floor does not import transformers.
    """
    count = 0
    for module in model.modules():
        if any(p.requires_grad for p in module.parameters(recurse=False)):
            continue
        if type(module) is nn.Linear:
            module.__class__ = FrozenLinear
            count += 1
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
            module.__class__ = FrozenConv1D
            count += 1
    return count
