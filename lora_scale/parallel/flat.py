"""The frozen base cut into flat pieces, one of every unit a rank. Knows how a unit is laid out; not when it is gathered
(`parallel.gathering`), nor how (`parallel.transport`).

A unit is a decoder layer, or a matrix outside of them: the embedding, the output layer. Its parameters lie end to end
and the whole is cut into as many equal pieces as there are ranks, so that pieces put side by side are the unit, and
parameters are views of it. A piece is a run of bytes, whatever parameters it begins and ends in. Vectors outside of the
layers, such as the last norm, are whole on every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from lora_scale.parallel.transport import Transport
from lora_scale.spec.layout import FLAT_ALIGNMENT, flat_piece


@dataclass(slots=True, eq=False)
class Member:
    """One parameter of a unit. `parameter` holds nothing but while its unit is gathered."""

    name: str
    shape: tuple[int, ...]
    parameter: nn.Parameter
    offset: int  # bytes from the start of the unit
    nothing: Tensor
    own: Tensor | None = None  # where all of it lies in this rank's piece: there, for good

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.parameter.dtype.itemsize

    def of(self, whole: Tensor) -> Tensor:
        """The parameter's values in the bytes of its unit."""
        return whole.narrow(0, self.offset, self.nbytes).view(self.parameter.dtype).view(self.shape)

    def empty(self) -> None:
        self.parameter.data = self.nothing


@dataclass(slots=True, eq=False)
class Unit:
    """What is gathered at once, and the modules that compute with it: one, but for a tied matrix."""

    modules: list[nn.Module]
    members: list[Member] = field(default_factory=list)
    used: int = 0  # bytes of its members, aligned
    piece: int = 0  # bytes of each rank's piece
    offset: int = 0  # of the piece in the rank's memory, bytes
    shared: list[tuple[int, int]] = field(default_factory=list)  # bytes of the piece that other ranks' complete


class FlatBase:
    """This rank's pieces of the frozen base."""

    def __init__(self, layers: Sequence[nn.Module], transport: Transport, device: torch.device):
        self.transport, self.device = transport, device
        self.units: list[Unit] = []
        self.memory = torch.empty(0, dtype=torch.uint8, device=device)  # all pieces
        self._layer_of = {id(module): layer for layer in layers for module in layer.modules()}
        self._unit_of: dict[int, Unit] = {}  # by the module that it is gathered for
        self._homes: dict[str, tuple[Unit, Member]] = {}

    def add(self, name: str, owners: list[nn.Module], shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Lay out one more frozen parameter, in module order; False for one that every rank keeps whole."""
        layer = self._layer_of.get(id(owners[0]))
        if layer is None and len(shape) < 2:
            return False
        modules = owners if layer is None else [layer]
        unit = self._unit_of.get(id(modules[0]))
        if unit is None:
            unit = self._unit_of[id(modules[0])] = Unit(modules)
            self.units.append(unit)
        nothing = torch.empty(0, dtype=dtype, device=self.device)
        member = Member(name, shape, nn.Parameter(nothing, requires_grad=False), unit.used, nothing)
        unit.members.append(member)
        unit.used += -(-member.nbytes // FLAT_ALIGNMENT) * FLAT_ALIGNMENT
        self._homes[name] = unit, member
        return True

    def allocate(self) -> None:
        """Memory for this rank's pieces, zeroed. Collective where ranks read each other's."""
        total = 0
        for unit in self.units:
            unit.piece, unit.offset = flat_piece(unit.used, self.transport.size), total
            total += unit.piece
        self.memory = self.transport.allocate(total, self.device)
        for unit in self.units:
            for member in unit.members:
                part = self.part(member.name)
                if part.numel() == prod(member.shape):
                    member.own = part.view(member.shape)
                elif part.numel():
                    start = max(0, member.offset - self.transport.rank * unit.piece)
                    unit.shared.append((start, start + part.nbytes))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # values are copied in on other streams than that which zeroed it

    def parameter(self, name: str) -> nn.Parameter:
        return self._homes[name][1].parameter

    def span(self, name: str) -> tuple[int, int]:
        """The elements [start, stop) of a flattened parameter that lie in this rank's piece; often none."""
        unit, member = self._homes[name]
        first = self.transport.rank * unit.piece - member.offset
        start, stop = (min(max(at, 0), member.nbytes) for at in (first, first + unit.piece))
        width = member.parameter.dtype.itemsize
        return start // width, stop // width

    def part(self, name: str) -> Tensor:
        """Those elements: flat, in this rank's memory."""
        unit, member = self._homes[name]
        start, stop = self.span(name)
        dtype = member.parameter.dtype
        at = member.offset + start * dtype.itemsize - self.transport.rank * unit.piece if start < stop else 0
        return self.memory.narrow(0, unit.offset + at, (stop - start) * dtype.itemsize).view(dtype)
