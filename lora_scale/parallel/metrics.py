"""What a step did and cost on this rank: one row of metrics.jsonl."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_scale.parallel.engine import StepResult
from lora_scale.parallel.setup import Job
from lora_scale.spec import cost
from lora_scale.storage.steps import Step


def row(
    number: int, result: StepResult, lr: float, step: Step, seconds: float, job: Job, measured: dict[str, Any]
) -> dict[str, Any]:
    """Tokens are the step's over all ranks, padding not counted; `sources` says where from, if there are several;
    `measured` is `parallel.memory.measure`'s."""
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
        "phase_seconds": {phase: round(value, 6) for phase, value in result.seconds().items()},
        "memory": measured,
    }
    if len(step.sources) > 1:
        found["sources"] = {name: {"rows": rows, "tokens": n} for name, (rows, n) in step.sources.items()}
    if job.work.peak_tflops is not None:
        found["mfu"] = round(cost.mfu(job.work.with_attention, per_gpu, job.work.peak_tflops), 4)
    return found


def in_words(found: Mapping[str, Any]) -> str:
    """TFLOP/s, MFU and seconds by phase of a row, for the screen."""
    mfu = f" (MFU {found['mfu']:.1%})" if "mfu" in found else ""
    phases = " ".join(f"{phase} {seconds:.3g}" for phase, seconds in found["phase_seconds"].items())
    return f"{found['tflops_4n']:.3g} TFLOP/s{mfu}; seconds: {phases}"


def bytes_read() -> int:
    """Bytes this process has read through system calls so far (/proc/self/io rchar): counted outside our own code."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("rchar:"):
            return int(line.split()[1])
    raise AssertionError("/proc/self/io has no rchar")
