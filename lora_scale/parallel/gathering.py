"""When a unit of the flat base is whole: while its module computes, forward or backward, and the next one's gather runs
beside it on a stream of its own.

Two buffers, each as large as the largest unit. A unit that was used last stays in its buffer until another needs that:
the last layer and the output layer are there still when backward begins, the first layer when the next pass does. But a
parameter points into a buffer only while its module computes; at any other time it is empty, and using it an error.
Units take turns in the buffers, forth and back alike, so each is in backward where it was in forward: a view of a
weight that autograd has saved finds the same values again.

The order of the modules is that of the first pass. It is the same on all ranks, and so is that of their gathers.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lora_scale.adapters import marks
from lora_scale.parallel.clock import exposed
from lora_scale.parallel.flat import FlatBase, Member, Unit
from lora_scale.spec.layout import FLAT_BUFFERS


class _Buffer:
    """Memory of one unit at a time, and the events that order its users."""

    def __init__(self, nbytes: int, device: torch.device):
        self.bytes = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self.unit: Unit | None = None
        self.busy = False  # a module computes with it
        self.touched = 0  # when it was last gathered into or given back
        self._views: dict[Member, Tensor] = {}
        on_gpu = device.type == "cuda"
        self.gathered = torch.cuda.Event() if on_gpu else None
        self.free = torch.cuda.Event() if on_gpu else None  # nothing that was begun reads it any more

    def view(self, member: Member) -> Tensor:
        """A parameter's values here; made once, because a step points thousands of parameters at them."""
        if member not in self._views:
            self._views[member] = member.of(self.bytes) if member.own is None else member.own
        return self._views[member]


class _Stop:
    """A module that computes with a unit."""

    def __init__(self, unit: Unit):
        self.unit = unit
        self.has_backward = False  # in the pass at hand: its input had a gradient
        self.in_backward = False
        self.buffer: _Buffer | None = None  # of the last forward pass


class Gathering:
    """Gathers the units of a base around the modules of a model; put there by hooks, once."""

    def __init__(self, base: FlatBase):
        self.base = base
        largest = max(unit.piece for unit in base.units) * base.transport.size
        self._buffers = [_Buffer(largest, base.device) for _ in range(FLAT_BUFFERS)]
        self._stream = torch.cuda.Stream(base.device) if base.device.type == "cuda" else None
        self._order: list[_Stop] = []
        self._clock = 0
        self.gathers = 0  # so far
        for unit in base.units:
            for module in unit.modules:
                stop = _Stop(unit)
                module.register_forward_pre_hook(self._before(stop), with_kwargs=True)
                module.register_forward_hook(self._after(stop))

    @property
    def buffers(self) -> list[Tensor]:
        return [buffer.bytes for buffer in self._buffers]

    # --- around a module -------------------------------------------------------------------------------------------

    def _before(self, stop: _Stop) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if stop.in_backward:  # recompute: backward has gathered it
                return None
            if stop not in self._order:
                self._order.append(stop)
            stop.buffer = self._use(stop.unit)
            self._ahead(self._order[self._order.index(stop) + 1 :][:1])
            x = args[0] if args else kwargs.get("hidden_states")
            stop.has_backward = False
            if not (torch.is_grad_enabled() and isinstance(x, Tensor) and x.requires_grad):
                return None
            stop.has_backward = True
            y = marks.same(_Entry.apply(x, self, stop), x)
            return ((y, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": y})

        return before

    def _after(self, stop: _Stop) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if stop.in_backward:
                return None
            self._give_back(stop.unit)
            if not stop.has_backward:
                return None
            if isinstance(output, Tensor):
                return _Exit.apply(output, self, stop)
            return (_Exit.apply(output[0], self, stop), *output[1:])

        return after

    def begin_backward(self, stop: _Stop) -> None:
        stop.in_backward = True
        buffer = self._use(stop.unit)
        assert buffer is stop.buffer, "what autograd saved of a weight is a view of the other buffer"
        before = self._order[: self._order.index(stop)]
        self._ahead([other for other in before if other.has_backward][-1:])

    def end_backward(self, stop: _Stop) -> None:
        stop.in_backward = False
        self._give_back(stop.unit)

    # --- buffers ---------------------------------------------------------------------------------------------------

    def _use(self, unit: Unit) -> _Buffer:
        """Point the unit's parameters at its values."""
        buffer = self._holding(unit) or self._gather(unit)
        assert buffer is not None, "more units are in use than there are buffers"
        if buffer.gathered is not None:
            with exposed(self.base.device):
                torch.cuda.current_stream(self.base.device).wait_event(buffer.gathered)
        buffer.busy = True
        for member in unit.members:
            member.parameter.data = buffer.view(member)
        return buffer

    def _give_back(self, unit: Unit) -> None:
        buffer = self._holding(unit)
        assert buffer is not None and buffer.busy
        for member in unit.members:
            member.empty()
        buffer.busy, buffer.touched = False, self._tick()
        if buffer.free is not None:
            buffer.free.record(torch.cuda.current_stream(self.base.device))

    def _ahead(self, stops: list[_Stop]) -> None:
        """Begin to gather what comes next, if a buffer is free."""
        for stop in stops:
            if self._holding(stop.unit) is None:
                self._gather(stop.unit)

    def _holding(self, unit: Unit) -> _Buffer | None:
        return next((buffer for buffer in self._buffers if buffer.unit is unit), None)

    def _gather(self, unit: Unit) -> _Buffer | None:
        """Begin to gather a unit into the buffer that has been idle longest; None where all are busy."""
        idle = [buffer for buffer in self._buffers if not buffer.busy]
        if not idle:
            return None
        buffer = min(idle, key=lambda buffer: buffer.touched)
        buffer.unit, buffer.touched = unit, self._tick()
        out = buffer.bytes.narrow(0, 0, unit.piece * self.base.transport.size)
        with torch.cuda.stream(self._stream):  # nothing on a CPU
            if self._stream is not None and buffer.free is not None:
                self._stream.wait_event(buffer.free)
            self.base.transport.gather(out, unit.offset, unit.piece, unit.shared)
            if buffer.gathered is not None:
                buffer.gathered.record()
        self.gathers += 1
        return buffer

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


class _Entry(torch.autograd.Function):
    """Identity on a module's input. Its backward comes after the module's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gathering: Gathering, stop: _Stop) -> Tensor:
        ctx.gathering, ctx.stop = gathering, stop
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.gathering.end_backward(ctx.stop)
        return grads[0], None, None


class _Exit(torch.autograd.Function):
    """Identity on a module's output. Its backward comes before the module's."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, gathering: Gathering, stop: _Stop) -> Tensor:
        ctx.gathering, ctx.stop = gathering, stop
        return torch.ops.aten._unsafe_view(y, y.shape)  # a view could not be added to in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        ctx.gathering.begin_backward(ctx.stop)
        return grads[0], None, None
