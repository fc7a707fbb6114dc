"""What autograd keeps, counted: bytes of the storages behind all saved tensors, each once, parameters left out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def kept_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that `forward` made autograd keep. Parameters, buffers and their views do not count."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)  # held, so that no other gets its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    assert result is not None
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)
