"""What torch's CPU allocator did while a function ran: bytes still held at its end, and the most held in between."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def allocations(work: Callable[[], Any], folder: Path) -> tuple[Any, int, int]:
    """(what `work` returned, net bytes, peak bytes), both above what was held before."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = work()
    trace = folder / "trace.json"
    profile.export_chrome_trace(str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["name"] == "[memory]"]
    trace.unlink()
    assert events, "the profiler saw no allocation"
    now = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return result, now, peak
