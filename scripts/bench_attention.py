#!/usr/bin/env python3
"""Attention of packed rows, forward and backward, in ms: with a mask, and by documents, each kernel that is here.

    python scripts/bench_attention.py --out docs/benchmarks/NAME.json

A row of 4,096 tokens in 1 to 16 documents of equal length; bf16, heads as --heads and --key-heads say, 128 features.
Median over the counted passes of the seconds until the device is idle. `causal` reads across documents: it is what a
row that is one document costs. A tree with uncommitted changes is refused with --out.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from lora_scale.parallel import documents, flash3
from lora_scale.storage import provenance

FEATURES, WARM_UP = 128, 3


def milliseconds(attend: Callable[[], Tensor], leaves: list[Tensor], passes: int) -> float:
    times = []
    for number in range(WARM_UP + passes):
        began = time.perf_counter()
        out = attend()
        torch.autograd.grad(out, leaves, torch.ones_like(out))
        if out.is_cuda:
            torch.cuda.synchronize()
        if number >= WARM_UP:
            times.append(1e3 * (time.perf_counter() - began))
    return round(statistics.median(times), 3)


def row(args: argparse.Namespace, count: int, device: torch.device) -> dict[str, Any]:
    """`count` documents in a row."""
    place = np.tile(np.arange(args.tokens // count), count)[None]
    number = torch.as_tensor((place == 0).cumsum(1), device=device)
    mask = ((number[:, :, None] == number[:, None]).tril())[:, None]
    draw = torch.Generator(device).manual_seed(0)
    sizes = [(1, heads, args.tokens, FEATURES) for heads in (args.heads, args.key_heads, args.key_heads)]
    leaves = [torch.randn(s, device=device, dtype=torch.bfloat16, generator=draw).requires_grad_() for s in sizes]
    documents.tell(place, device)
    ways = {
        "causal": lambda: F.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True).transpose(1, 2),
        "masked": lambda: F.scaled_dot_product_attention(*leaves, attn_mask=mask, enable_gqa=True).transpose(1, 2),
        "documents, torch": lambda: documents.attention(torch.nn.Module(), *leaves, None)[0],
    }
    kernels = flash3.found
    flash3.found = lambda _: None  # type: ignore[assignment]
    found: dict[str, Any] = {"documents": count}
    found |= {way: milliseconds(attend, leaves, args.passes) for way, attend in ways.items()}
    flash3.found = kernels
    if flash3.found(device):
        found["documents, flash3"] = milliseconds(ways["documents, torch"], leaves, args.passes)
    return found


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    ways = [way for way in rows[-1] if way != "documents"]
    lines = [f"| documents | {' | '.join(ways)} |", f"|--:|{'--:|' * len(ways)}"]
    return lines + [f"| {r['documents']} | {' | '.join(f'{r[way]:.2f}' for way in ways)} |" for r in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--passes", type=int, default=20)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    commit = provenance.commit_of_record("bench_attention", refuse=args.out is not None)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    rows = [row(args, count, device) for count in (1, 2, 4, 8, 16)]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    what = f"attention of packed rows, {args.tokens} tokens, {args.heads}/{args.key_heads} heads of {FEATURES}, ms"
    record = {"kind": "attention"} | provenance.head(what, sys.argv[0], commit, name) | {"rows": rows}
    print("\n".join(table(rows)))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
