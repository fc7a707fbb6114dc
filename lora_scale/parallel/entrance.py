"""Where gradients end: the input of the first decoder layer has one, because what gathers layers waits for it, but
nobody needs its value."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lora_scale.adapters import marks
from lora_scale.spec.config import RunConfig

READERS = {"q_proj", "k_proj", "v_proj"}


def open_inputs(model: nn.Module, cfg: RunConfig, layers: Sequence[nn.Module]) -> None:
    """Let the first layer's input have a gradient where the base is frozen: a layer that is gathered as one needs it.
    What reaches it through attention is left out where nothing trains before."""
    if cfg.method == "full":
        return
    model.enable_input_require_grads()  # type: ignore[operator]
    attention = next((m for m in layers[0].children() if dict(m.named_children()).keys() >= READERS), None)
    if attention is None or cfg.method != "lora" or cfg.parallel.tensor_parallel_size > 1:
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
