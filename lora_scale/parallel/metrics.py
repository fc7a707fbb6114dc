"""What a step did and cost on this rank: one row of metrics.jsonl; memory by the allocator's statistics and the
kernel's own counts."""

from pathlib import Path
from typing import Any

import torch

from lora_scale.parallel.engine import StepResult
from lora_scale.parallel.setup import Job
from lora_scale.spec import cost
from lora_scale.storage.steps import Step

GIB = 1 << 30


def row(number: int, result: StepResult, lr: float, step: Step, seconds: float, job: Job) -> dict[str, Any]:
    """Tokens are the step's over all ranks, padding not counted; `sources` says where from, if there are several."""
    tokens = step.tokens
    rate = tokens / seconds
    per_gpu = rate / job.world.size
    found = {
        "step": number,
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "tokens": tokens,
        "seconds": round(seconds, 6),
        "tokens_per_second": round(rate, 2),
        "tokens_per_second_per_gpu": round(per_gpu, 2),
        "tflops_4n": round(cost.tflops(job.work.flops_per_token, per_gpu), 4),
        "phase_seconds": {phase: round(value, 6) for phase, value in result.seconds.items()},
        "memory": memory(job.world.device),
    }
    if len(step.sources) > 1:
        found["sources"] = {name: {"rows": rows, "tokens": n} for name, (rows, n) in step.sources.items()}
    if job.work.peak_tflops is not None:
        found["mfu"] = round(cost.mfu(job.work.with_attention, per_gpu, job.work.peak_tflops), 4)
    return found


def reset_peak(device: torch.device) -> None:
    """Peaks count from here: those of loading are the manifest's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def memory(device: torch.device) -> dict[str, float]:
    """GiB on this rank: the CUDA allocator's allocated, reserved and their peaks (GPU), anonymous host memory and its
    peak RSS."""
    status = host_memory()
    found = {"rss_anon_gib": status["RssAnon"] / GIB, "rss_peak_gib": status["VmHWM"] / GIB}
    if device.type == "cuda":
        found |= {
            "allocated_gib": torch.cuda.memory_allocated(device) / GIB,
            "reserved_gib": torch.cuda.memory_reserved(device) / GIB,
            "peak_gib": torch.cuda.max_memory_allocated(device) / GIB,
            "peak_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        }
    return {name: round(value, 3) for name, value in found.items()}


def host_memory() -> dict[str, int]:
    """Bytes of this process's RssAnon and VmHWM, from /proc/self/status."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "VmHWM"):
            found[name] = int(value.split()[0]) * 1024
    return found


def bytes_read() -> int:
    """Bytes this process has read through system calls so far (/proc/self/io rchar): counted outside our own code."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise AssertionError("/proc/self/io has no rchar")
