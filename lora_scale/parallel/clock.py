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

COLLECTIVES, BETWEEN = "collectives", "between"
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
    wait for one that was issued ahead. On a GPU two events, some microseconds; nothing waits that did not before."""
    if not _open:
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
        self._beside: list[tuple[str, float]] = []
        self._paused = 0.0  # of these, in the pause before the first phase
        self._before: Moment | None = None  # when the last phase of the step before ended

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
        """The items, and beside the phases the processor's seconds that each takes to come."""
        iterator = iter(items)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            seconds = time.perf_counter() - start
            self._beside.append((name, seconds))
            if not self._spans:  # else a step was begun early: its first phase is behind
                self._paused += seconds
            yield item

    def now(self) -> Moment:
        """This moment: on a GPU, when what is begun is done."""
        return _now(self._device)

    def rest(self) -> None:
        """What comes until the next phase is no part of a step: an evaluation, a save."""
        self._before = None

    def take(self) -> Callable[[], dict[str, float]]:
        """What gives the sum of each phase since the last call, of `collectives`, which are in no phase but their own,
        and of the time `between` phases, from the end of the last step on; to be called when the device is past
        them, but not while it waits: events are thousands a step."""
        spans, beside, before, paused = self._spans, self._beside, self._before, self._paused
        self._spans, self._beside, self._paused = [], [], 0.0
        self._before = spans[-1].end if spans else None
        return partial(_sums, spans, beside, before, paused)


def _sums(spans: list[Span], beside: list[tuple[str, float]], before: Moment | None, paused: float) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, seconds in beside:
        sums[name] = sums.get(name, 0.0) + seconds
    waited, between, began = 0.0, 0.0, before
    for span in spans:
        if before is not None:
            between += seconds_between(before, span.start)
        before = span.end
        waits = sum(seconds_between(start, end) for start, end in span.waits)
        assert span.end is not None
        sums[span.name] = sums.get(span.name, 0.0) + seconds_between(span.start, span.end) - waits
        waited += waits
    if began is not None:
        between = max(0.0, between - paused)
    return {**sums, COLLECTIVES: waited, BETWEEN: between}


def _now(device: torch.device) -> Moment:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start: Moment, end: Moment) -> float:
    """Both must be over."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return start.elapsed_time(end) / 1e3
    assert isinstance(start, float) and isinstance(end, float)
    return end - start


def wait(until: Moment) -> None:
    """Until the device is there."""
    if isinstance(until, torch.cuda.Event):
        until.synchronize()
