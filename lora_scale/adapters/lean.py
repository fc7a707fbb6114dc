"""Operations that keep little for backward: norms, sums, SwiGLU, dropout. On a GPU norms, SwiGLU and the rotation are
Liger's kernels; elsewhere they are the same arithmetic in torch, so that what is kept, and tested, is the same.

A norm keeps its input and a number a row, SwiGLU its two factors, dropout nothing: what they gave is made again when
backward wants it, or multiplied with without being made (`marks.Origin`).
"""

import importlib.util
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_scale.adapters import marks, products
from lora_scale.adapters.frozen import FrozenLinear

SILU = ("SiLU", "SiLUActivation")
OFFSETS = {  # what a family's norms add to their weight; families that are not named stay as transformers has them
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe"), 0.0),
    **dict.fromkeys(("gemma2", "gemma3_text"), 1.0),
}
SUMMED = ("llama", "mistral", "qwen2", "qwen3")  # layers of two norms, attention and an MLP, and no more
SUMMING = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}  # all that such a layer has
ROTATED = ("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe")  # Liger's rotation is theirs


@cache
def _liger() -> Any:
    """Liger's kernels, or None where they are not installed."""
    if importlib.util.find_spec("liger_kernel") is None or importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("liger_kernel.ops")


def _kernels(x: Tensor) -> Any:
    return _liger() if x.is_cuda else None


class _RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * (offset + weight), over the last dim. offset 1 is Gemma's, which rounds last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: nn.Parameter, eps: float, offset: float) -> tuple[Tensor, Tensor]:
        y, rstd = _normed(x, weight, eps, offset)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(rstd)
        ctx.save_for_backward(x, rstd)
        ctx.weight, ctx.offset = weight, offset  # the Parameter itself: ZeRO-3 gathers it anew for backward
        return y, rstd

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        (dy, _), (x, rstd), weight = grads, ctx.saved_tensors, ctx.weight
        trains = ctx.needs_input_grad[1]
        if kernels := _kernels(dy):
            size, warps = _settings(x.shape[-1])
            flat, mode = x.reshape(-1, x.shape[-1]), _mode(ctx.offset)
            in_place = marks.owns_gradient(ctx)  # else not: a sum hands the same gradient on
            more = (ctx.offset, mode, size, warps, in_place, False, trains)
            dx, dw = kernels.rms_norm_backward(dy.contiguous(), flat, weight.data, rstd, *more)
            return dx, dw, None, None
        return *_norm_gradients(dy, x, weight, rstd, ctx.offset, trains), None, None


class _RMSNormOfSum(torch.autograd.Function):
    """The norm of x + other, and that sum, whose own gradient is added by the norm's kernel. Without another the sum is
    x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, other: Tensor | None, weight: nn.Parameter, eps: float, offset: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.weight, ctx.offset, ctx.is_sum = weight, offset, other is not None
        if other is None:
            y, rstd = _normed(x, weight, eps, offset)
            ctx.mark_non_differentiable(rstd)
            ctx.save_for_backward(x, rstd)
            return y, x.view_as(x), rstd
        if kernels := _kernels(x):
            more = (weight.data, eps, offset, _mode(offset))
            y, total, rstd, *_ = kernels.fused_add_rms_norm_forward(x.contiguous(), other.contiguous(), *more)
        else:
            total = other + x
            y, rstd = _normed(total, weight, eps, offset)
        ctx.mark_non_differentiable(rstd)
        ctx.save_for_backward(total, rstd)
        return y, total, rstd

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (dy, dtotal, _), (total, rstd), weight = grads, ctx.saved_tensors, ctx.weight
        if dy is None:  # who reads the norm wants no gradient of it
            return dtotal, dtotal if ctx.is_sum else None, None, None, None
        assert dtotal is not None  # what comes after the norm is added to the sum
        trains = ctx.needs_input_grad[2]
        if kernels := _kernels(dy):
            more = (ctx.offset, _mode(ctx.offset), *_settings(dy.shape[-1]), 2, marks.owns_gradient(ctx), trains)
            both = dy.contiguous(), dtotal.contiguous()
            dx, _, dw = kernels.fused_add_rms_norm_backward(*both, total, weight.data, rstd, *more)
        else:
            dx, dw = _norm_gradients(dy, total, weight, rstd, ctx.offset, trains)
            dx = dtotal + dx
        return dx, dx if ctx.is_sum else None, dw, None, None


def _norm_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, trains: bool
) -> tuple[Tensor, Tensor | None]:
    """Of the input and, where it trains, of the weight."""
    width = weight.float() + offset
    scaled = (dy.float() * width) if offset else (dy * weight).float()
    unit = x.float() * rstd
    dx = rstd * (scaled - unit * (scaled * unit).mean(-1, keepdim=True))
    dw = (dy.float() * unit).flatten(0, -2).sum(0).to(weight.dtype) if trains else None
    return dx.to(x.dtype), dw


def _normed(x: Tensor, weight: Tensor, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """The norm and, in fp32, a reciprocal root a row."""
    if kernels := _kernels(x):
        y, _, rstd, *_ = kernels.rms_norm_forward(x.contiguous(), weight.data, eps, offset, _mode(offset), False)
        return y, rstd
    wide = x.float()
    rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if offset:
        return (wide * rstd * (offset + weight.float())).to(x.dtype), rstd
    return weight * (wide * rstd).to(x.dtype), rstd


def _product_with_normed(weight: Tensor, offset: float, narrow: Tensor, x: Tensor, rstd: Tensor) -> Tensor:
    """narrow^T times the norm of x, which is x but for a factor a row and one a column; fp32."""
    scaled = (narrow * rstd.view(-1, 1)).to(x.dtype)
    return (scaled.t() @ x.reshape(len(narrow), -1)) * (weight.float() + offset)


def _mode(offset: float) -> int:
    """Where Liger rounds to the working precision: before the weight (0, Llama), or after it (1, Gemma)."""
    return 1 if offset else 0


@cache
def _settings(features: int) -> tuple[int, int]:
    return importlib.import_module("liger_kernel.ops.utils").calculate_settings(features)


class LeanRMSNorm(nn.Module):
    """A family's own RMSNorm, keeping less. Its attributes are those of the module it was."""

    weight: nn.Parameter
    offset: float

    def forward(
        self, hidden_states: Tensor, other: Tensor | None = None, *, with_sum: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The norm; `with_sum` that of `hidden_states` + `other`, and the sum."""
        eps, offset = float(getattr(self, "variance_epsilon", 0.0) or self.eps), self.offset  # type: ignore[arg-type]
        if with_sum:
            y, x, rstd = _RMSNormOfSum.apply(hidden_states, other, self.weight, eps, offset)
        else:
            (y, rstd), x = _RMSNorm.apply(hidden_states, self.weight, eps, offset), hidden_states
        if torch.is_grad_enabled():
            kept, product = (x.detach(), rstd), partial(_product_with_normed, self.weight, offset)
            made = marks.Origin(lambda x, _: _normed(x, self.weight, eps, offset)[0], kept, product=product)
            y = marks.with_origin(y, made)
        return (y, x) if with_sum else y


class LeanLayer(nn.Module):
    """A decoder layer whose sums are made, and their gradients added, by the norms that read them; or made by the
    products before, whose layers are told what to add."""

    input_layernorm: LeanRMSNorm
    self_attn: nn.Module
    post_attention_layernorm: LeanRMSNorm
    mlp: nn.Module
    adders: tuple[FrozenLinear, FrozenLinear] | None = None  # the last layers of attention and of the MLP

    def forward(self, hidden_states: Tensor, **options: Any) -> Tensor:
        y, x = self.input_layernorm(hidden_states, with_sum=True)
        if self.adders is None:
            y, *_ = self.self_attn(hidden_states=y, **options)
            y, x = self.post_attention_layernorm(y, x, with_sum=True)
            return x + self.mlp(y)
        self.adders[0].added = x
        x, *_ = self.self_attn(hidden_states=y, **options)
        y, x = self.post_attention_layernorm(x, with_sum=True)
        self.adders[1].added = x
        return self.mlp(y)


@cache
def _summed(kind: type) -> type:
    """A family's own class of layer, with our forward pass; by its name others know it."""
    return type(kind.__name__, (LeanLayer, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _product(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (dy,), (gate, up) = grads, ctx.saved_tensors
        if kernels := _kernels(dy):
            return kernels.swiglu_backward(gate, up, dy.contiguous())  # in place of what was kept
        sigmoid = torch.sigmoid(gate)
        return dy * up * sigmoid * (1 + gate * (1 - sigmoid)), dy * gate * sigmoid


def _product(gate: Tensor, up: Tensor) -> Tensor:
    if kernels := _kernels(gate):
        return kernels.swiglu_forward(gate, up)[2]
    return F.silu(gate) * up


class LeanMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), as Llama's."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        y = _SwiGLU.apply(gate, up)
        return self.down_proj(marks.with_origin(y, marks.Origin(_product, (gate.detach(), up.detach()))))


class _Dropped(torch.autograd.Function):
    """A mask that can be had again whenever it is asked for: nothing is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.drop = drop
        return drop(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.drop(grads[0]), None


def dropped(x: Tensor, drop: Callable[[Tensor], Tensor]) -> Tensor:
    """`drop(x)`, where `drop` multiplies each element by what does not depend on it, the same at every call."""
    y, before = _Dropped.apply(x, drop), marks.origin(x)
    if before.share is not None:  # made again are this rank's tokens only, and the mask is for all of them
        before = marks.Origin(marks.itself, (marks.kept(x),))
    return marks.with_origin(y, marks.Origin(lambda *kept: drop(before.make(*kept)), before.kept))


def make_lean(model: nn.Module) -> int:
    """Turn the norms and SwiGLU products of a known family into their lean forms, in place; how many there were.

    Names and parameters stay. On GPUs large products are those of `products`, and with Liger the family's rotation is
    Liger's, from then on, in this process.
    """
    products.choose_kernels()
    model_type = str(model.config.model_type)  # type: ignore[union-attr]
    if model_type not in OFFSETS:
        return 0
    count = 0
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.__class__ = LeanRMSNorm
            module.offset = OFFSETS[model_type]  # type: ignore[assignment]
            count += 1
        elif kind.endswith("MLP") and hasattr(module, "gate_proj") and type(module.act_fn).__name__ in SILU:
            module.__class__ = LeanMLP
            count += 1
    if model_type in SUMMED:
        for module in model.modules():
            if dict(module.named_children()).keys() == SUMMING:
                module.__class__ = _summed(type(module))  # type: ignore[arg-type]
    if model_type in ROTATED and torch.cuda.is_available() and _liger():
        vars(sys.modules[type(model).__module__])["apply_rotary_pos_emb"] = _rotated
    return count


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    """transformers' `apply_rotary_pos_emb` for whole heads; where the tensors are not on a GPU, in its own words."""
    if q.is_cuda:
        return _liger().LigerRopeFunction.apply(q, k, cos, sin, None, unsqueeze_dim)
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + _half_turned(q) * sin, k * cos + _half_turned(k) * sin


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)
