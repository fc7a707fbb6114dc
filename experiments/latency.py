#!/usr/bin/env python3
"""Table 1 in kind: how long one forward pass takes with Adapter-H, Adapter-L, and without (which is merged LoRA).

Knows a named shape with random weights (latency does not depend on their values) and our own adapter modules. Prints
one JSON line for each setting: the median and the quartiles over the passes that are counted, in milliseconds.

    python experiments/latency.py --shape gpt2-medium --setting 1x128 --setting 16x256 --setting 32x512

The paper's Table 1 has GPT-2 medium on another GPU: fine-tuning or LoRA 19.8 ms, Adapter-L 23.9, Adapter-H 25.8 at
batch 1, sequence 128.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from lora_scale.adapters import baselines
from lora_scale.parallel import recompute
from lora_scale.spec.config import RunConfig
from lora_scale.spec.named import shape
from lora_scale.storage import provenance

METHODS = {"base or merged LoRA": None, "adapter-l": "adapter-l", "adapter-h": "adapter-h"}


def build(name: str, method: str | None, bottleneck: int, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """The shape with random weights and the method's modules, ready for inference."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(shape(name))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype)
    if method:
        tree = {"model": {"path": name}, "data": {"train": "-"}, "run_dir": "-", "train": {"max_steps": 1}}
        cfg = RunConfig.model_validate({**tree, "method": method, "baseline": {"bottleneck": bottleneck}})
        baselines.insert(model, cfg, recompute.decoder_layers(model))
    return model.to(device, dtype).eval()


@torch.inference_mode()
def milliseconds(
    model: torch.nn.Module, batch: int, tokens: int, device: str, passes: int, warm_up: int
) -> list[float]:
    """Of each counted pass, the device waited for."""
    ids = torch.randint(model.config.vocab_size, (batch, tokens), device=device)
    found = []
    for number in range(warm_up + passes):
        _wait(device)
        began = time.perf_counter()
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        _wait(device)
        if number >= warm_up:
            found.append(1e3 * (time.perf_counter() - began))
    return found


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="gpt2-medium")
    parser.add_argument("--setting", action="append", help="BATCHxTOKENS; may be repeated. Default: 1x128 and 16x256")
    parser.add_argument("--bottleneck", type=int, default=64)
    parser.add_argument("--passes", type=int, default=100, help="the paper averages 100 trials")
    parser.add_argument("--warm-up", type=int, default=10)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for label, method in METHODS.items():
        model = build(args.shape, method, args.bottleneck, device, dtype)
        for setting in args.setting or ["1x128", "16x256"]:
            batch, tokens = map(int, setting.split("x"))
            times = milliseconds(model, batch, tokens, device, args.passes, args.warm_up)
            quartiles = statistics.quantiles(times, n=4)
            row = {"method": label, "shape": args.shape, "batch": batch, "tokens": tokens, "passes": len(times)}
            row |= {
                "median_ms": round(statistics.median(times), 3),
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
