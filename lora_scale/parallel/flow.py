"""How sums and gradients go through the layers of a frozen base: in as few operations as the layout allows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_scale.adapters import marks
from lora_scale.adapters.frozen import FrozenLinear
from lora_scale.adapters.lean import LeanLayer
from lora_scale.adapters.lora import LoRALinear
from lora_scale.spec.config import RunConfig

READERS = {"q_proj", "k_proj", "v_proj"}


def arrange(model: nn.Module, cfg: RunConfig, layers: Sequence[nn.Module]) -> None:
    """To be called when all other hooks are there, and before what gathers layers."""
    is_whole = cfg.parallel.tensor_parallel_size == 1
    if cfg.kernels == "auto":
        marks.share_inputs(model)
        if is_whole and cfg.method == "lora":
            _let_products_add(layers)
    if cfg.method != "full":  # a layer that is gathered as one needs an input with a gradient
        model.enable_input_require_grads()  # type: ignore[operator]
    if is_whole and cfg.method == "lora":
        _end_at_attention(model, layers)


def _let_products_add(layers: Sequence[nn.Module]) -> None:
    """Let the last products of attention and MLP add what is added to their results, which are then rounded once."""
    for layer in layers:
        if not isinstance(layer, LeanLayer):
            continue
        last = getattr(layer.self_attn, "o_proj", None), getattr(layer.mlp, "down_proj", None)
        bases = tuple(module.base_layer if type(module) is LoRALinear else module for module in last)
        if all(type(module) is FrozenLinear and module.bias is None for module in bases):
            object.__setattr__(layer, "adders", bases)  # they are other modules' children


def _end_at_attention(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Let the first layer's attention give its input no gradient where nothing trains before."""
    attention = next((m for m in layers[0].children() if dict(m.named_children()).keys() >= READERS), None)
    if attention is None:
        return
    behind = [attention, getattr(layers[0], "mlp", attention), *layers[1:]]
    known = {id(p) for module in behind for p in module.parameters()}
    if all(id(p) in known for p in model.parameters() if p.requires_grad):
        attention.register_forward_pre_hook(_cut, with_kwargs=True, prepend=True)


def _cut(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not torch.is_grad_enabled():
        return None
    x = args[0] if args else kwargs["hidden_states"]
    y = marks.same(x.detach(), x)
    return ((y, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": y})
