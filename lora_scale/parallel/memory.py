"""Memory of this rank as it is: what our tensors hold by category, the allocator's books by phase, the process's own.

The categories are those of the plan (`spec.memory`). Tensors are found where DeepSpeed keeps them, storages are counted
once, and what the allocator has given out beyond them is "unexplained": activations between phases are not, because at
the end of a phase there are none. The only module that looks into DeepSpeed's buffers to count them.
"""

import importlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GIB = 1 << 30
_NVML: dict[str, Any] = {}
_ASIDE: list[int] = []
_PINNED: list[int] = []


class Tracked:
    """Bytes that this rank's tensors hold, by category of the plan; each storage counts in the first that has it.

    Weights of ZeRO-3 count as their partition, and `gathered` is what whole copies of them are there beside it. The
    frozen base stays where it is and is looked at once: its thousands of tensors are not walked at every step.
    """

    def __init__(self, ds: Any):
        self._ds = ds
        parameters = list(ds.module.parameters())
        self._trained = [p for p in parameters if p.requires_grad]
        self._partitioned = [p for p in parameters if hasattr(p, "ds_tensor")]
        self._gathering = getattr(ds.module, "gathering", None)  # of a flat base
        flat = [self._gathering.base.memory] if self._gathering else []
        self._base_storages: set[int] = set()
        frozen = [_held(p) for p in parameters if not p.requires_grad]
        self._base = _nbytes([*flat, *frozen], self._base_storages)
        self._buffers = _nbytes(ds.module.buffers(), self._base_storages.copy())

    def now(self) -> dict[str, int]:
        seen = self._base_storages.copy()
        changing = {category: _nbytes(tensors, seen) for category, tensors in self._tensors()}
        return {"base": self._base, **changing, "buffers": self._buffers}

    def _tensors(self) -> Iterator[tuple[str, list[Tensor | None]]]:
        """Of all categories but the base and the buffers."""
        optimizer, trained = self._ds.optimizer, self._trained
        inner = getattr(optimizer, "optimizer", optimizer)
        yield "trained", [*_flats(optimizer, _WORKING), *(_held(p) for p in trained)]
        yield "master", _flats(optimizer, _MASTERS)
        averaged = (getattr(optimizer, "averaged_gradients", None) or {}).values()
        yield (
            "gradients",
            [
                *_flats(optimizer, ("grad_partitions_flat_buffer", "fp32_groups_gradients_flat")),
                *(p.grad for p in trained),
                *(getattr(p, "grad_accum", None) for p in trained),
                *(tensor for group in averaged for tensor in group or []),
            ],
        )
        yield "adam", [t for state in inner.state.values() for name, t in state.items() if name != "step"]
        yield "bucket", [_buffer(bucket.buffer) for bucket in getattr(optimizer, "ipg_buckets", {}).values()]
        gathering = self._gathering
        yield "gathered", [*(gathering.buffers if gathering else []), *(p.data for p in self._partitioned)]


def _nbytes(tensors: Iterable[Tensor | None], seen: set[int]) -> int:
    total = 0
    for tensor in tensors:
        if tensor is None or tensor.is_meta or not tensor.numel():
            continue
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


_WORKING = ("fp16_partitioned_groups_flat", "bit16_groups_flat", "bf16_groups_flat")
_MASTERS = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")


def _flats(optimizer: Any, names: Iterable[str]) -> list[Tensor | None]:
    """DeepSpeed's flat tensors of these names, whatever of them this stage has; each name holds one or a list."""
    found: list[Tensor | None] = []
    for name in names:
        value = getattr(optimizer, name, None)
        found += value if isinstance(value, list) else [value]
    return found


def _held(parameter: Tensor) -> Tensor:
    """A parameter's own memory: ZeRO-3's partition, or the tensor."""
    return getattr(parameter, "ds_tensor", parameter.data)


def _buffer(buffer: Any) -> Tensor | None:
    """Stages 1 and 2 hold a list here, which is empty outside of backward."""
    return buffer if isinstance(buffer, Tensor) else None


class PhaseMemory:
    """Peaks of the CUDA allocator by phase, over a step. On a CPU there is no such book, and the rows are empty."""

    def __init__(self, device: torch.device):
        self._device = device if device.type == "cuda" else None
        self._rows: dict[str, dict[str, int]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Peaks between here and the end count for `name`; of a phase that comes several times, the largest."""
        if self._device is None:
            yield
            return
        torch.cuda.reset_peak_memory_stats(self._device)
        yield
        now = _books(self._device)
        before = self._rows.get(name, {})
        self._rows[name] = {
            key: value if key == "end" else max(value, before.get(key, 0)) for key, value in now.items()
        }

    def take(self) -> dict[str, dict[str, int]]:
        """Bytes by phase since the last call: the peak, what is left at the end, and the peak reserved."""
        rows, self._rows = self._rows, {}
        return rows


def since_start(device: torch.device, name: str) -> dict[str, dict[str, int]]:
    """One phase from the start of the process until now."""
    if device.type != "cuda":
        return {}
    return {name: _books(device)}


def add_aside(nbytes: int) -> None:
    """Device memory in use that torch's allocator does not know of: it counts as allocated from now on."""
    _ASIDE.append(nbytes)


def add_pinned(nbytes: int) -> None:
    """Host memory that is pinned without torch's allocator."""
    _PINNED.append(nbytes)


def _books(device: torch.device) -> dict[str, int]:
    """Bytes allocated (the peak since it was reset, and now) and the most reserved."""
    stats, aside = torch.cuda.memory_stats(device), sum(_ASIDE)
    names = {"peak": "allocated_bytes.all.peak", "end": "allocated_bytes.all.current"}
    names["peak_reserved"] = "reserved_bytes.all.peak"
    return {name: stats[key] + aside for name, key in names.items()}


def measure(device: torch.device, tracked: Tracked, phases: dict[str, dict[str, int]]) -> dict[str, Any]:
    """This rank's memory at the end of a step, for its row of the metrics; GiB, and bytes by category and phase."""
    categories = tracked.now()
    status = host_memory()
    found: dict[str, Any] = {
        "rss_anon_gib": _gib(status["RssAnon"]),
        "rss_peak_gib": _gib(status["VmHWM"]),
        "categories": categories,
        "tracked": sum(categories.values()),
    }
    if device.type != "cuda":
        return found
    allocated, aside = _books(device)["end"], sum(_ASIDE)
    found |= {
        "allocated_gib": _gib(allocated),
        "reserved_gib": _gib(torch.cuda.memory_reserved(device) + aside),
        "peak_gib": _gib(max((row["peak"] for row in phases.values()), default=0)),
        "peak_reserved_gib": _gib(max((row["peak_reserved"] for row in phases.values()), default=0)),
        "phases": phases,
        "unexplained": allocated - found["tracked"],
        "pinned_gib": _gib(pinned_bytes()),
    }
    if (process := process_bytes(device)) is not None:
        found["process_gib"] = _gib(process)
    return found


def host_memory() -> dict[str, int]:
    """Bytes of this process's RssAnon and VmHWM, from /proc/self/status."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "VmHWM"):
            found[name] = int(value.split()[0]) * 1024
    return found


def pinned_bytes() -> int:
    """Host memory that torch's own allocator has pinned, and what was pinned beside it."""
    return int(torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)) + sum(_PINNED)


def process_bytes(device: torch.device) -> int | None:
    """What the driver says this process has on its GPU, CUDA context and NCCL included; None without pynvml or where a
    container hides it. Asked once a step: 0.1 ms."""
    try:
        if not _NVML:
            pynvml = importlib.import_module("pynvml")
            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            _NVML.update(module=pynvml, handle=pynvml.nvmlDeviceGetHandleByUUID(uuid.encode()))
        running = _NVML["module"].nvmlDeviceGetComputeRunningProcesses(_NVML["handle"])
        return next((process.usedGpuMemory for process in running if process.pid == os.getpid()), None)
    except Exception:  # no library, or a driver that will not tell: the figure is left out
        return None


def _gib(nbytes: float) -> float:
    return round(nbytes / GIB, 3)


class Snapshot:
    """PyTorch's record of every allocation between two steps, when it is asked for; on a CPU it does nothing."""

    def __init__(self, steps: tuple[int, int] | None, log: Path):
        self._steps = steps if torch.cuda.is_available() else None
        self._path = log.with_name(log.name.replace("rank-", "snapshot-")).with_suffix(".pickle")

    def before(self, step: int) -> None:
        if self._steps and step == self._steps[0]:
            torch.cuda.memory._record_memory_history(max_entries=200_000)

    def after(self, step: int) -> None:
        if self._steps and step == self._steps[1]:
            torch.cuda.memory._dump_snapshot(str(self._path))
            torch.cuda.memory._record_memory_history(enabled=None)
