"""Seconds by phase of a step, and memory with them. On a GPU the device's own time, read once a step."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lora_scale.parallel.memory import PhaseMemory


class PhaseClock:
    """Seconds by phase. On a GPU the times are the device's own (events), read once at the end, without extra
    waiting."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self.memory = PhaseMemory(device)
        self._spans: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._now()
        with self.memory.phase(name):
            yield
        self._spans.append((name, start, self._now()))

    def seconds(self) -> dict[str, float]:
        """Sum of each phase since the last call. The caller has synchronised the device."""
        sums: dict[str, float] = {}
        for name, start, end in self._spans:
            if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
                span = start.elapsed_time(end) / 1e3
            else:
                assert isinstance(start, float) and isinstance(end, float)
                span = end - start
            sums[name] = sums.get(name, 0.0) + span
        self._spans.clear()
        return sums

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
