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
    """y = x W^T + b for W (out, in), or x W + b for a Conv1D's W (in, out); gradient for x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, bias: nn.Parameter | None, transposed: bool) -> Tensor:
        ctx.weight, ctx.transposed = weight, transposed  # the Parameter itself, not its gathered tensor
        ctx.sum = marks.sum_of(x)
        flat, matrix = x.reshape(-1, x.shape[-1]), weight if transposed else weight.t()
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
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        weight = ctx.weight.data.t() if ctx.transposed else ctx.weight.data
        dy = grads[0]
        if ctx.sum is not None:
            ctx.sum.add(dy.reshape(-1, dy.shape[-1]), weight)
            return None, None, None, None
        dx = products.mm(dy.reshape(-1, dy.shape[-1]), weight)
        return dx.view(*dy.shape[:-1], dx.shape[1]), None, None, None


class FrozenLinear(nn.Linear):
    """nn.Linear with a frozen weight and bias."""

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return F.linear(input, self.weight, self.bias)
        return FrozenMatmul.apply(input, self.weight, self.bias, False)


class FrozenConv1D(nn.Module):
    """transformers' Conv1D (GPT-2; weight (in, out)) with a frozen weight and bias."""

    weight: nn.Parameter
    bias: nn.Parameter

    def forward(self, x: Tensor) -> Tensor:
        return FrozenMatmul.apply(x, self.weight, self.bias, True)


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
