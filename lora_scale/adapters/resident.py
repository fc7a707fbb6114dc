"""Many adapters in memory on one base. Using another one moves pointers, or one block of bytes; only where an adapter
brings parts of the base are these put in their place, and the base's own back when it is no longer used.

The factors are plain tensors, not parameters: ZeRO-3 must neither partition nor gather them, and nothing trains. They
have the base's dtype, to which `adapters.lora` casts them for compute anyway. Knows no process group; who cuts a
factor for its rank is the caller.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_scale.adapters.peft import Adapter
from lora_scale.adapters.targets import features

Cut = Callable[[str, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(module, lora_A, lora_B) to this rank's part of both."""


class SwitchedLinear(nn.Module):
    """y = W x + scaling * B A x with the factors of the adapter in use, its outputs brought to DoRA's lengths where it
    has such, or y = W x."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = features(base_layer)
        self.factors: tuple[Tensor, Tensor, float] | None = None  # lora_A (r, in), lora_B (out, r), scaling
        self.ratio: Tensor | None = None  # of DoRA's magnitudes to the rows' lengths, (out,), fp32

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self.factors is None:
            return y
        a, b, scaling = self.factors
        update = F.linear(F.linear(x, a), b) * scaling
        if self.ratio is None:
            return y + update
        bias: Any = self.base_layer.bias
        plain = y if bias is None else y - bias
        return y + (self.ratio - 1).to(y.dtype) * plain + self.ratio.to(y.dtype) * update


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
class Run:
    """A run of this rank's memory of the base, flat, and what an adapter puts there."""

    base: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Beside:
    """What an adapter has beside its factors, of this rank: ratios of DoRA's layers, parts of the base."""

    ratios: Mapping[str, Tensor] = field(default_factory=dict)
    runs: Sequence[Run] = ()


@dataclass(frozen=True, slots=True)
class _Resident:
    """One adapter: its factors end to end, and where each layer's lie."""

    flat: Tensor
    places: tuple[tuple[str, int, tuple[int, int], tuple[int, int], float], ...]  # module, offset, shapes, scaling
    beside: Beside


class Residents:
    """Adapters by name, and which one the layers use."""

    def __init__(self, layers: Mapping[str, SwitchedLinear], device: torch.device, dtype: torch.dtype) -> None:
        self._layers, self._device, self._dtype = layers, device, dtype
        self._all: dict[str, _Resident] = {}
        self._displaced: list[Run] = []  # of the base, by the adapter in use

    def add(
        self, name: str, adapter: Adapter, cut: Cut, beside: Beside | None = None, *, on_host: bool = False
    ) -> None:
        """Keep an adapter whose modules are among the layers; `on_host`: in (pinned) host memory, copied when used."""
        pieces, places, offset = [], [], 0
        for module in adapter.modules:
            a, b = cut(module, adapter.factors[f"{module}.lora_A"], adapter.factors[f"{module}.lora_B"])
            places.append((module, offset, tuple(a.shape), tuple(b.shape), adapter.scaling(module)))
            pieces += [a.reshape(-1).to(self._dtype), b.reshape(-1).to(self._dtype)]
            offset += a.numel() + b.numel()
        beside = beside or Beside()
        ratios = {module: ratio.to(self._device) for module, ratio in beside.ratios.items()}
        runs = [Run(run.base, self._kept(run.values.to(run.base.dtype), on_host)) for run in beside.runs]
        flat = self._kept(torch.cat(pieces), on_host)
        self._all[name] = _Resident(flat, tuple(places), Beside(ratios, runs))  # type: ignore[arg-type]

    def _kept(self, values: Tensor, on_host: bool) -> Tensor:
        if not on_host:
            return values.to(self._device)
        return values.pin_memory() if self._device.type == "cuda" else values

    def nbytes(self, name: str) -> int:
        """What one adapter takes on this rank."""
        kept = self._all[name]
        tensors = [kept.flat, *kept.beside.ratios.values(), *(run.values for run in kept.beside.runs)]
        return sum(tensor.nbytes for tensor in tensors)

    def use(self, name: str | None) -> int:
        """Have every layer compute with this adapter, or with the base alone; the bytes that were copied for it."""
        for layer in self._layers.values():
            layer.factors = layer.ratio = None
        copied = self._put_back()
        if name is None:
            return copied
        kept = self._all[name]
        flat = kept.flat.to(self._device, non_blocking=True)
        for module, start, shape_a, shape_b, scaling in kept.places:
            middle = start + shape_a[0] * shape_a[1]
            a = flat[start:middle].view(shape_a)
            b = flat[middle : middle + shape_b[0] * shape_b[1]].view(shape_b)
            self._layers[module].factors = (a, b, scaling)
            self._layers[module].ratio = kept.beside.ratios.get(module)
        for run in kept.beside.runs:
            self._displaced.append(Run(run.base, run.base.clone()))
            run.base.copy_(run.values)
            copied += run.base.nbytes
        return copied + (0 if flat is kept.flat else flat.nbytes)

    def _put_back(self) -> int:
        """The base's own values, where an adapter has put others; their bytes."""
        for run in self._displaced:
            run.base.copy_(run.values)
        copied = sum(run.base.nbytes for run in self._displaced)
        self._displaced.clear()
        return copied
