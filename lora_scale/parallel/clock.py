"""Seconds by phase of a step, and memory with them. On a GPU the device's own time, read once a step.

What waits for other ranks is timed wherever a collective is issued (`exposed`) and taken out of the phase around it.
Autograd issues some in its backward, with no handle on the engine: hence one list, of the phase this process is in.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch

from lora_scale.parallel.memory import PhaseMemory

COLLECTIVES = "collectives"
T = TypeVar("T")
Moment = float | torch.cuda.Event  # seconds, or an event on the current stream


@dataclass(slots=True)
class Span:
    """One phase, and the waits for other ranks in it."""

    name: str
    start: Moment
    end: Moment | None = None
    waits: list[tuple[Moment, Moment]] = field(default_factory=list)


_open: list[Span] = []  # the phase this process is in, if any: outside of steps nothing is kept


@contextmanager
def exposed(device: torch.device) -> Iterator[None]:
    """What is issued here keeps the stream from computing until other ranks have done their part: a collective, or the
    wait for one that was issued ahead. On a GPU two events, some microseconds; nothing waits that did not before. Only
    on the stream of the phases: on others something may be computed meanwhile."""
    if not _open or (device.type == "cuda" and torch.cuda.current_stream(device) != torch.cuda.default_stream(device)):
        yield
        return
    start = _now(device)
    yield
    _open[-1].waits.append((start, _now(device)))


class PhaseClock:
    """Seconds by phase. On a GPU the times are the device's own (events), read once a step, without extra
    waiting."""

    def __init__(self, device: torch.device):
        self._device = device
        self.memory = PhaseMemory(device)
        self._spans: list[Span] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        span = Span(name, _now(self._device))
        _open.append(span)
        try:
            with self.memory.phase(name):
                yield
        finally:
            _open.remove(span)
        span.end = _now(self._device)
        self._spans.append(span)

    def timed(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """The items, and as a phase the processor's seconds that each takes to come."""
        iterator = iter(items)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._spans.append(Span(name, start, time.perf_counter()))
            yield item

    def take(self) -> Callable[[], dict[str, float]]:
        """What gives the sum of each phase since the last call, and of `collectives`, which are in no phase but their
        own; to be called when the device is synchronised, but not while it waits: events are thousands a step."""
        spans, self._spans = self._spans, []
        return partial(_sums, spans)


def _sums(spans: list[Span]) -> dict[str, float]:
    sums: dict[str, float] = {}
    waited = 0.0
    for span in spans:
        waits = sum(_between(start, end) for start, end in span.waits)
        assert span.end is not None
        sums[span.name] = sums.get(span.name, 0.0) + _between(span.start, span.end) - waits
        waited += waits
    return {**sums, COLLECTIVES: waited}


def _now(device: torch.device) -> Moment:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Moment, end: Moment) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return start.elapsed_time(end) / 1e3
    assert isinstance(start, float) and isinstance(end, float)
    return end - start
