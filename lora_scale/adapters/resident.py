"""Many adapters in memory on one base that stays as it is. Using another one moves pointers, or one block of bytes.

The factors are plain tensors, not parameters: ZeRO-3 must neither partition nor gather them, and nothing trains. They
have the base's dtype, to which `adapters.lora` casts them for compute anyway. Knows no process group; who cuts a
factor for its rank is the caller.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_scale.adapters.peft import Adapter
from lora_scale.adapters.targets import features

Cut = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(module, lora_A, lora_B) to this rank's part of both."""


class SwitchedLinear(nn.Module):
    """y = W x + scaling * B A x with the factors of the adapter in use, or y = W x."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = features(base_layer)
        self.factors: tuple[Tensor, Tensor, float] | None = None  # lora_A (r, in), lora_B (out, r), scaling

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self.factors is None:
            return y
        a, b, scaling = self.factors
        return y + F.linear(F.linear(x, a), b) * scaling


def insert(model: nn.Module, names: Iterable[str]) -> dict[str, SwitchedLinear]:
    """Wrap the linear layers of these names in place; the wrapped layers by name, in module order."""
    wanted, layers = set(names), {}
    for name in [name for name, _ in model.named_modules() if name in wanted]:
        layers[name] = SwitchedLinear(model.get_submodule(name))
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layers[name])
    assert layers.keys() == wanted, wanted - layers.keys()
    return layers


@dataclass(frozen=True, slots=True)
class _Resident:
    """One adapter: its factors end to end, and where each layer's lie."""

    flat: Tensor
    places: tuple[tuple[str, int, tuple[int, int], tuple[int, int], float], ...]  # module, offset, shapes, scaling


class Residents:
    """Adapters by name, and which one the layers use."""

    def __init__(self, layers: Mapping[str, SwitchedLinear], device: torch.device, dtype: torch.dtype) -> None:
        self._layers, self._device, self._dtype = layers, device, dtype
        self._all: dict[str, _Resident] = {}

    def add(self, name: str, adapter: Adapter, cut: Cut, *, on_host: bool = False) -> None:
        """Keep an adapter whose modules are among the layers; `on_host`: in (pinned) host memory, copied when used."""
        pieces, places, offset = [], [], 0
        for module in adapter.modules:
            a, b = cut(module, adapter.factors[f"{module}.lora_A"], adapter.factors[f"{module}.lora_B"])
            places.append((module, offset, tuple(a.shape), tuple(b.shape), adapter.scaling(module)))
            pieces += [a.reshape(-1).to(self._dtype), b.reshape(-1).to(self._dtype)]
            offset += a.numel() + b.numel()
        flat = torch.cat(pieces)
        if not on_host:
            flat = flat.to(self._device)
        elif self._device.type == "cuda":
            flat = flat.pin_memory()
        self._all[name] = _Resident(flat, tuple(places))  # type: ignore[arg-type]

    def nbytes(self, name: str) -> int:
        """What one adapter takes on this rank."""
        return self._all[name].flat.nbytes

    def use(self, name: str | None) -> int:
        """Have every layer compute with this adapter, or with the base alone; the bytes that were copied for it."""
        for layer in self._layers.values():
            layer.factors = None
        if name is None:
            return 0
        kept = self._all[name]
        flat = kept.flat.to(self._device, non_blocking=True)
        for module, start, shape_a, shape_b, scaling in kept.places:
            middle = start + shape_a[0] * shape_a[1]
            a = flat[start:middle].view(shape_a)
            b = flat[middle : middle + shape_b[0] * shape_b[1]].view(shape_b)
            self._layers[module].factors = (a, b, scaling)
        return 0 if flat is kept.flat else flat.nbytes
