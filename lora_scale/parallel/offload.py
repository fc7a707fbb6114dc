"""Activations that wait for their backward pass in host memory (`activation_offloading`): of chosen decoder layers what
autograd saves is copied out while the next layers compute, and copied back while the layers behind compute backward.

    forward    what a chosen layer saves is on its way at once; its memory is free again two layers later
    backward   when the layer behind it begins, all of it is on its way back

Copies are by copy engines on a stream of their own. Host memory is pinned at the first step and kept. Small tensors
(`SMALLEST`) and those that fill their memory with gaps stay where they are.
"""

import mmap
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_scale.parallel import memory
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import DoesNotFitError
from lora_scale.spec.kept import BEHIND, offloaded_layers

SMALLEST = 2 << 20  # bytes: less stays


@dataclass(eq=False, slots=True)
class _Away:
    """One tensor's memory, as a flat run of elements."""

    host: Tensor
    source: Tensor | None  # until it is copied, and nobody else may have its memory before
    back: Tensor | None = None
    uses: int = 0  # how often it was saved, and is still to be asked for


@dataclass(eq=False, slots=True)
class _Layer:
    """What one layer saved in one pass."""

    index: int
    away: dict[tuple[int, int, torch.dtype], _Away] = field(default_factory=dict)
    copied: torch.cuda.Event | None = None
    fetched: torch.cuda.Event | None = None
    is_back: bool = False


@dataclass(frozen=True, slots=True)
class _Packed:
    """In place of a saved tensor."""

    layer: _Layer
    away: _Away
    size: torch.Size
    stride: tuple[int, ...]


def apply(layers: Sequence[nn.Module], cfg: RunConfig, device: torch.device) -> None:
    """Let those of the decoder layers that the config chooses keep their activations in host memory."""
    if chosen := offloaded_layers(cfg, len(layers)):
        Offloading(device, SMALLEST).attach(layers, chosen)


class Offloading:
    """The layers of one model whose activations go to host memory. One pass at a time: backward follows forward."""

    def __init__(self, device: torch.device, smallest: int):
        self._device, self._smallest = device, smallest
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._free: dict[int, list[Tensor]] = {}  # host memory that nobody uses, by bytes
        self._leaving: list[_Layer] = []  # whose memory is not free yet
        self._inside: list[tuple[_Layer, Any]] = []  # the layer at work, and its context
        self._now: dict[int, _Layer] = {}  # of the pass under way, by index
        self._pinned: list[Tensor] = []
        weakref.finalize(self, _unpin, self._pinned).atexit = False  # memory that is unmapped must not be pinned

    def attach(self, layers: Sequence[nn.Module], chosen: Sequence[int]) -> None:
        """From now on `layers[i]` for i in `chosen`, none of the last, keep what they save in host memory."""
        assert max(chosen) < len(layers) - BEHIND
        for index in range(min(chosen), len(layers)):
            layer = layers[index]
            if index in chosen:
                layer.register_forward_pre_hook(self._begin(index))
                layer.register_forward_hook(self._end, always_call=True)
            else:
                layer.register_forward_pre_hook(self._pass_by(index))
            if index - 1 in chosen:
                layer.register_forward_hook(self._watch(index - 1))

    # --- forward ------------------------------------------------------------------------------------------------------

    def _begin(self, index: int) -> Callable[..., None]:
        def begin(module: nn.Module, args: Any) -> None:
            self._let_go(index - BEHIND)
            if torch.is_grad_enabled():
                layer = self._now[index] = _Layer(index)
                context = torch.autograd.graph.saved_tensors_hooks(lambda t: self._pack(layer, t), self._unpack)
                context.__enter__()
                self._inside.append((layer, context))

        return begin

    def _pass_by(self, index: int) -> Callable[..., None]:
        return lambda module, args: self._let_go(index - BEHIND)

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self._inside:
            return
        layer, context = self._inside.pop()
        context.__exit__()
        if self._side is not None:
            layer.copied = self._side.record_event()
        self._leaving.append(layer)

    def _let_go(self, last: int) -> None:
        """The memory of layers up to this one is free for others, once it is copied."""
        while self._leaving and self._leaving[0].index <= last:
            layer = self._leaving.pop(0)
            if layer.copied is not None:
                torch.cuda.current_stream(self._device).wait_event(layer.copied)
            for away in layer.away.values():
                away.source = None

    def _pack(self, layer: _Layer, tensor: Tensor) -> Any:
        if not self._goes(tensor):
            return tensor
        key = tensor.data_ptr(), tensor.numel(), tensor.dtype  # nobody else has this memory before `_let_go`
        if (away := layer.away.get(key)) is None:
            flat = tensor.detach().as_strided((tensor.numel(),), (1,))
            away = layer.away[key] = _Away(self._host(flat), flat)
            self._copy(away.host, flat)
        away.uses += 1
        return _Packed(layer, away, tensor.size(), tensor.stride())

    def _goes(self, tensor: Tensor) -> bool:
        if tensor.nbytes < self._smallest or tensor.device.type != self._device.type:
            return False
        of = tensor if tensor._base is None else tensor._base
        return not isinstance(of, nn.Parameter) and torch.ops.aten.is_non_overlapping_and_dense(tensor)

    def _copy(self, to: Tensor, source: Tensor) -> None:
        if self._side is None:
            to.copy_(source)
            return
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._side):
            to.copy_(source, non_blocking=True)

    # --- backward -----------------------------------------------------------------------------------------------------

    def _watch(self, index: int) -> Callable[..., None]:
        """On the layer behind `index`: when its backward pass begins, bring what that one needs."""

        def watch(module: nn.Module, args: Any, output: Any) -> None:
            layer = self._now.get(index)
            hidden = output if isinstance(output, Tensor) else output[0]
            if layer is not None and hidden.requires_grad:
                hidden.register_hook(lambda gradient: self._fetch(layer))

        return watch

    def _fetch(self, layer: _Layer) -> None:
        if layer.is_back:
            return
        layer.is_back = True
        self._now.pop(layer.index, None)
        for away in layer.away.values():
            away.back = torch.empty_like(away.host, device=self._device)
            self._copy(away.back, away.host)
            self._free.setdefault(away.host.nbytes, []).append(away.host.view(torch.uint8))
        if self._side is not None:  # host memory is written to again on the same stream, later
            layer.fetched = self._side.record_event()

    def _unpack(self, packed: Any) -> Tensor:
        if not isinstance(packed, _Packed):
            return packed
        layer, away = packed.layer, packed.away
        self._fetch(layer)  # where the layer behind did not
        if layer.fetched is not None:
            torch.cuda.current_stream(self._device).wait_event(layer.fetched)
            layer.fetched = None
        back = away.host.to(self._device) if away.back is None else away.back  # None: asked for more than once
        away.uses -= 1
        if not away.uses:
            away.back = None
        return back.as_strided(packed.size, packed.stride)

    # --- host memory --------------------------------------------------------------------------------------------------

    def _host(self, like: Tensor) -> Tensor:
        """As many elements in pinned memory."""
        if waiting := self._free.get(like.nbytes):
            return waiting.pop().view(like.dtype)
        return self._pin(like.nbytes).view(like.dtype)

    def _pin(self, nbytes: int) -> Tensor:
        """Exactly so much: torch's own allocator takes the next power of two."""
        if self._side is None:
            return torch.empty(nbytes, dtype=torch.uint8)
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        pages.madvise(mmap.MADV_HUGEPAGE)
        found = torch.frombuffer(pages, dtype=torch.uint8)
        code = torch.cuda.cudart().cudaHostRegister(found.data_ptr(), nbytes, 0)
        if int(code):
            raise DoesNotFitError(
                f"{nbytes:,} more bytes of host memory cannot be pinned for activation_offloading (CUDA error {code}; "
                f"{memory.pinned_bytes():,} are). Set activation_offloading=none, or a smaller number"
            )
        self._pinned.append(found)
        memory.add_pinned(nbytes)
        return found


def _unpin(pinned: list[Tensor]) -> None:
    for one in pinned:
        torch.cuda.cudart().cudaHostUnregister(one.data_ptr())
        memory.add_pinned(-one.nbytes)
    pinned.clear()
