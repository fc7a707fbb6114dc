#!/usr/bin/env python3
"""Table 1 in kind: how long one forward pass takes with Adapter-H, Adapter-L, with a merged LoRA, and without any.

Knows a named shape with random weights (latency does not depend on their values) and our own adapter modules. Prints
one JSON line for each setting: the median and the quartiles over the passes that are counted, in milliseconds. Methods
take turns, forwards and backwards, so that a drift of the machine meets all of them.

    python experiments/latency.py --shape gpt2-medium --setting 1x128 --setting 16x256 --setting 32x512
    python experiments/latency.py --graphs      each pass as one CUDA graph: without the processor that starts kernels

The paper's Table 1 has GPT-2 medium on another GPU: fine-tuning or LoRA 19.8 ms, Adapter-L 23.9, Adapter-H 25.8 at
batch 1, sequence 128.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from lora_scale.adapters import baselines, lora
from lora_scale.parallel import recompute
from lora_scale.spec.config import RunConfig
from lora_scale.spec.named import shape
from lora_scale.storage import provenance

METHODS = {"base": None, "merged LoRA": "lora", "adapter-l": "adapter-l", "adapter-h": "adapter-h"}
ROUNDS = 4


def build(name: str, method: str | None, bottleneck: int, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """The shape with random weights and the method's modules, ready for inference."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(shape(name))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype)
    if method:
        own: dict[str, Any] = {"baseline": {"bottleneck": bottleneck}}
        if method == "lora":
            own = {"lora": {"target_modules": ["all-linear"]}}
        tree = {"model": {"path": name}, "data": {"train": "-"}, "run_dir": "-", "train": {"max_steps": 1}}
        cfg = RunConfig.model_validate({**tree, "method": method, **own})
        if method == "lora":
            merge(model, cfg)
        else:
            baselines.insert(model, cfg, recompute.decoder_layers(model))
    return model.to(device, dtype).eval()


@torch.no_grad()
def merge(model: torch.nn.Module, cfg: RunConfig) -> None:
    """Add a random update to each adapted layer's weight, and take LoRA's modules away again."""
    for name, layer in lora.adapt(model, cfg.lora, cfg.seed).items():
        weight = layer.base_layer.weight
        update = layer.scaling * layer.lora_B.normal_(std=0.01) @ layer.lora_A  # (out, in)
        weight += (update if isinstance(layer.base_layer, torch.nn.Linear) else update.T).to(weight)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)


def forward(model: torch.nn.Module, batch: int, tokens: int, device: str, graph: bool) -> Callable[[], Any]:
    """A pass over random tokens, if asked as a CUDA graph."""
    ids = torch.randint(model.config.vocab_size, (batch, tokens), device=device)

    def run() -> Any:
        return model(input_ids=ids, use_cache=False, logits_to_keep=1)

    if not graph:
        return run
    side = torch.cuda.Stream()  # what a first pass sets up may not be captured
    with torch.cuda.stream(side):
        run()
    side.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        run()
    return captured.replay


def milliseconds(run: Callable[[], Any], device: str, passes: int, warm_up: int) -> list[float]:
    """Of each counted pass, the device waited for."""
    found = []
    for number in range(warm_up + passes):
        _wait(device)
        began = time.perf_counter()
        run()
        _wait(device)
        if number >= warm_up:
            found.append(1e3 * (time.perf_counter() - began))
    return found


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="gpt2-medium")
    parser.add_argument("--setting", action="append", help="BATCHxTOKENS; may be repeated. Default: 1x128 and 16x256")
    parser.add_argument("--bottleneck", type=int, default=64)
    parser.add_argument("--passes", type=int, default=100, help="the paper averages 100 trials")
    parser.add_argument("--warm-up", type=int, default=10, help="passes before each method's turn")
    parser.add_argument("--graphs", action="store_true", help="time CUDA graphs of the passes")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if args.graphs and device != "cuda":
        raise SystemExit("latency: --graphs needs a GPU")
    models = {label: build(args.shape, method, args.bottleneck, device, dtype) for label, method in METHODS.items()}
    for setting in args.setting or ["1x128", "16x256"]:
        batch, tokens = map(int, setting.split("x"))
        passes = {label: forward(model, batch, tokens, device, args.graphs) for label, model in models.items()}
        times: dict[str, list[float]] = {label: [] for label in models}
        for turn in range(ROUNDS):
            for label in list(models)[:: 1 if turn % 2 == 0 else -1]:
                times[label] += milliseconds(passes[label], device, -(-args.passes // ROUNDS), args.warm_up)
        for label, each in times.items():
            quartiles = statistics.quantiles(each, n=4)
            row: dict[str, Any] = {"method": label, "shape": args.shape, "batch": batch, "tokens": tokens}
            row |= {"passes": len(each), "rounds": ROUNDS, "graph": args.graphs}
            row |= {
                "median_ms": round(statistics.median(each), 3),
                "quartiles_ms": [round(quartiles[0], 3), round(quartiles[2], 3)],
            }
            row |= {
                "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
                "commit": provenance.commit(),
            }
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
