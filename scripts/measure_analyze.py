#!/usr/bin/env python3
"""How long `lora-scale analyze` takes, and how much memory, on a base of 100B shape: a few layers of it, measured.

    python scripts/measure_analyze.py [--layers 1] [--r 8] [--shape llama-100.7b]

Writes the q and v projections of so many layers with random weights (0.23 GB a layer at 100.7B) and an adapter for
them, runs the command as a user would, and prints one JSON line. Every module is a step of its own, so seconds grow
with their number and peak memory does not: two values of --layers show that. Nothing is extrapolated here.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from lora_scale.adapters import peft
from lora_scale.spec.named import shape
from lora_scale.spec.shapes import architecture
from lora_scale.storage import provenance
from lora_scale.storage.weights import write_safetensors

TARGETS = ("q_proj", "v_proj")


def write(folder: Path, name: str, layers: int, r: int) -> int:
    """A base folder of these projections alone, and an adapter; how many modules."""
    config = dict(shape(name))
    ends = tuple(f".self_attn.{target}.weight" for target in TARGETS)
    chosen = [p for p in architecture(config).parameters if p.name.endswith(ends)][: layers * len(TARGETS)]
    generator = torch.Generator().manual_seed(0)
    base = folder / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(config))
    weights = (torch.randn(p.shape, generator=generator).mul_(0.02).bfloat16() for p in chosen)
    specs = [(p.name, "BF16", p.shape) for p in chosen]
    write_safetensors(base / "model.safetensors", specs, (w.view(torch.uint8).numpy().data for w in weights))
    factors = {}
    for p in chosen:
        factors[f"{p.module}.lora_A"] = torch.randn(r, p.shape[1], generator=generator)
        factors[f"{p.module}.lora_B"] = torch.randn(p.shape[0], r, generator=generator) * 1e-3
    adapter = folder / "adapter"
    adapter.mkdir()
    peft.write_adapter(adapter, factors, {"peft_type": "LORA", "r": r, "lora_alpha": 2 * r, "bias": "none"})
    return len(chosen)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--shape", default="llama-100.7b")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        modules = write(folder, args.shape, args.layers, args.r)
        command = [sys.executable, "-m", "lora_scale", "analyze", str(folder / "adapter")]
        begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*command, "--base", str(folder / "base"), "--out", str(folder / "page.html")], check=True)
        seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        found = json.loads((folder / "page.json").read_text())
    errors = [c["error"] for row in found["modules"] for c in row["correlations"].values()]
    print(
        json.dumps(
            {
                "shape": args.shape,
                "modules": modules,
                "r": args.r,
                "seconds": round(seconds, 1),
                "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
                "peak_rss_gib": round(after.ru_maxrss / 2**20, 2),
                "largest_error": max(errors),
                "commit": provenance.commit(),
                "machine": platform.processor() or platform.machine(),
                "threads": torch.get_num_threads(),
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
