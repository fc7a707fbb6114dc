#!/usr/bin/env python3
"""Products of a model's layers, one after the other, by torch's choice of a kernel and by tiles that cuBLASLt proposes.

    python scripts/bench_products.py --out docs/benchmarks/NAME.json [--shape llama-100.7b] [--tokens 4096 16384]

Each for --seconds, in turns, --rounds times: what is measured is a GPU at its power limit. Weights and inputs are
Gaussian, bf16. Clock at the end of each turn; power is the mean by the driver's counter of energy, which moves every
0.1 s. Without a GPU: a dry run in small, whose figures say nothing. A tree with uncommitted changes is refused with
--out.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from lora_scale.adapters import products
from lora_scale.spec import named
from lora_scale.spec.shapes import architecture
from lora_scale.storage import provenance

WAYS = {"torch's choice": (), "256 x 128": (24,), "128 x 256": (23,)}  # tiles, of which the first is taken
BATCH = 10  # products that are begun before the clock is looked at
SMALL = 64  # without a GPU every size is so many times smaller


class Gpu:
    """The driver's counters of the GPU in use; zeros without one."""

    def __init__(self) -> None:
        self._handle: Any = None
        if torch.cuda.is_available():
            import pynvml

            pynvml.nvmlInit()
            first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]  # a number
            self._nvml, self._handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(int(first))

    def joules(self) -> float:
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3 if self._handle else 0.0

    def mhz(self) -> int:
        return self._nvml.nvmlDeviceGetClockInfo(self._handle, self._nvml.NVML_CLOCK_SM) if self._handle else 0


def turn(multiply: Callable[[], object], seconds: float, gpu: Gpu) -> tuple[float, int, float]:
    """Milliseconds of a product, the clock in MHz, watts."""
    multiply()
    _wait()
    began, energy, count = time.perf_counter(), gpu.joules(), 0
    while time.perf_counter() - began < seconds or not count:
        for _ in range(BATCH):
            multiply()
        count += BATCH
        if count % (4 * BATCH) == 0:  # the queue stays short, and never runs dry
            _wait()
    mhz = gpu.mhz()
    _wait()
    took = time.perf_counter() - began
    return 1e3 * took / count, mhz, (gpu.joules() - energy) / took


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def problems(shape: str, tokens: list[int]) -> Iterator[tuple[str, int, int, int, bool]]:
    """What is multiplied, tokens, outputs and inputs of the layer, and whether forward."""
    model = architecture(named.shape(shape))
    names = {"q_proj": "q", "o_proj": "the output layer", "gate_proj": "gate or up", "down_proj": "down"}
    sizes = {p.module.rpartition(".")[2]: p.shape for p in model.parameters if p.kind == "linear"}
    for count in tokens:
        for leaf, name in names.items():
            outs, ins = sizes[leaf]
            for forward in (True, False):
                yield name, count, outs, ins, forward


def rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scale, gpu = 1 if device == "cuda" else SMALL, Gpu()
    found = []
    products.choose_kernels()
    for name, tokens, outs, ins, forward in problems(args.shape, args.tokens):
        m, n, k = tokens // scale, (outs if forward else ins) // scale, (ins if forward else outs) // scale
        a = torch.randn(m, k, device=device, dtype=torch.bfloat16)
        weight = torch.randn(outs // scale, ins // scale, device=device, dtype=torch.bfloat16) * 0.02
        b, out = weight.t() if forward else weight, a.new_empty(m, n)
        turns: dict[str, list[tuple[float, int, float]]] = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way, tiles in WAYS.items():
                products.TILES = tiles
                products._kernel.cache_clear()
                if tiles and device == "cuda" and products._kernel(m, n, k, forward, 0) is None:
                    continue  # not proposed
                turns[way].append(turn(_product(a, b, out, tiles), args.seconds, gpu))
        for way, its in turns.items():
            if its:
                ms, what = statistics.mean(t for t, *_ in its), f"{name}, {m:,} tokens, "
                what += f"{'forward' if forward else 'backward'}: {way}"
                row = {"what": what, "ms": round(ms, 4), "tflops": round(2 * m * n * k / ms / 1e9, 1)}
                found.append(row | {"mhz": [mhz for _, mhz, _ in its], "watts": [round(w) for *_, w in its]})
                print(f"{what:60} {row['ms']:9.4f} ms {row['tflops']:7.1f} TFLOP/s", flush=True)
    return found


def _product(a: Tensor, b: Tensor, out: Tensor, tiles: tuple[int, ...]) -> Callable[[], object]:
    if tiles:
        return lambda: products.mm(a, b, out)
    return lambda: torch.mm(a, b, out=out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-100.7b", help="a named shape of Llama's kind")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--seconds", type=float, default=0.3, help="of a turn")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    commit = provenance.commit_of_record("bench_products", refuse=args.out is not None)
    what = f"products of {args.shape} on one GPU, {args.seconds} s each, in turns, means of {args.rounds} rounds"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    found = rows(args)
    record = {"kind": "products"} | provenance.head(what, sys.argv[0], commit, name) | {"rows": found}
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
