#!/usr/bin/env python3
"""Losses in fp32 of a checkpoint of any size: what the losses of bf16 runs are held to.

    lora-scale bench --work W --out losses.json --keep --only 100b-tp2-still --only 100b-peft-zero3-still
    torchrun --nproc_per_node 2 scripts/fp32_losses.py W/models/100b-all --rows W/rows-4096-in-order.jsonl \\
        --steps 4 --beside losses.json --out docs/benchmarks/NAME.json

transformers' own model in fp32, TF32 off; a module's weights are read from the checkpoint when it is called and dropped
afterwards, so memory is one matrix and the activations. Several processes share the rows. The runs of `--beside` do not
learn (lr 1e-12, B = 0 at the start): the losses of all their steps are of the checkpoint's weights. A run is judged by
the ratio rule: its errors' root mean square is at most twice that of a plain bf16 run, a peer's.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from lora_scale.storage import provenance
from lora_scale.storage.durable import write_text_atomically
from lora_scale.storage.folder import ModelFolder, open_folder, sources
from lora_scale.storage.weights import Reader

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def streamed(folder: ModelFolder, device: torch.device) -> nn.Module:
    """The model in fp32, its weights on meta but while their module computes."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder.path)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    tied, reader = dict(getattr(model, "all_tied_weights_keys", None) or {}), Reader()

    def fill(path: str, module: nn.Module, _: object) -> None:
        for name, p in list(module.named_parameters(recurse=False)):
            (entry,) = sources(folder, f"{path}.{name}", tuple(p.shape), model.base_model_prefix, tied)
            stored = torch.empty(entry.nbytes, dtype=torch.uint8)
            reader.read_into(entry.whole(), memoryview(stored.numpy()))
            weight = stored.to(device).view(DTYPES[entry.dtype]).view(entry.shape).float()
            setattr(module, name, nn.Parameter(weight, requires_grad=False))

    def drop(module: nn.Module, *_: object) -> None:
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=False))

    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
        if any(True for _ in module.parameters(recurse=False)):
            module.register_forward_pre_hook(partial(fill, path))
            module.register_forward_hook(drop)
    return model


@torch.no_grad()
def losses(folder: ModelFolder, rows: Sequence[Sequence[int]], device: torch.device) -> list[float]:
    """The mean loss of a row's tokens, for each of `rows`, which have one length. They pass through a module together;
    the output layer takes one after the other."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = streamed(folder, device)
    ids = torch.tensor(rows, device=device)
    head = model.get_output_embeddings()
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    return [float(F.cross_entropy(head(s[:-1]).float(), row[1:])) for s, row in zip(states, ids, strict=True)]


def shared(folder: ModelFolder, rows: Sequence[Sequence[int]]) -> list[float]:
    """`losses` of all rows, each taken by one of torchrun's processes; the same on all of them."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    mine = losses(folder, rows[rank::world], torch.device(device))
    if world == 1:
        return mine
    dist.init_process_group("gloo")
    parts: list[list[float]] = [[] for _ in range(world)]
    dist.all_gather_object(parts, mine)
    dist.destroy_process_group()
    return [parts[number % world][number // world] for number in range(len(rows))]


def judged(reference: Sequence[float], runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each run's errors against the reference, and their root mean square beside that of the plainest peer."""
    found = []
    for run in runs:
        errors = [a - b for a, b in zip(run["losses"], reference, strict=False)]
        rms = math.sqrt(sum(e * e for e in errors) / len(errors))
        found.append({"name": run["name"], "who": run["who"], "errors": errors, "rms": rms})
    plain = min((one["rms"] for one in found if one["who"] != "lora_scale"), default=None)
    return [one | {"over_plain": one["rms"] / plain if plain else None} for one in found]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """As Markdown. The best peer is what is plain."""
    lines = ["| run | RMS error of a step's loss | over the best peer's |", "| --- | ---: | ---: |"]
    over = (f"{row['over_plain']:.2f}" if row["over_plain"] is not None else "" for row in rows)
    return "\n".join(
        [*lines, *(f"| {row['name']} | {row['rms']:.2e} | {o} |" for row, o in zip(rows, over, strict=True))]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a checkpoint's folder")
    parser.add_argument("--rows", type=Path, required=True, help="JSONL of {input_ids} of one length, in order of use")
    parser.add_argument("--blocks", type=int, default=2, help="rows of a step (default: 2)")
    parser.add_argument("--steps", type=int, default=4, help="default: 4")
    parser.add_argument(
        "--beside", type=Path, nargs="+", required=True, help="records of `lora-scale bench` with runs to judge"
    )
    parser.add_argument("--out", type=Path, required=True, help="the record, .json")
    args = parser.parse_args()
    commit, began = provenance.commit_of_record("fp32_losses.py"), time.perf_counter()
    with args.rows.open() as file:
        rows = [json.loads(line)["input_ids"] for line, _ in zip(file, range(args.steps * args.blocks), strict=False)]
    of_rows = shared(open_folder(args.model), rows)
    reference = [sum(of_rows[at : at + args.blocks]) / args.blocks for at in range(0, len(of_rows), args.blocks)]
    rows_beside = [row for path in args.beside for row in json.loads(path.read_text())["rows"]]
    runs = [row for row in rows_beside if "failed" not in row]
    found = judged(reference, runs)
    if not int(os.environ.get("RANK", 0)):
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        record = provenance.head("losses beside fp32", "scripts/fp32_losses.py", commit, device)
        record |= {
            "kind": "fp32 losses",
            "seconds": round(time.perf_counter() - began, 1),
            "fp32": reference,
            "runs": found,
        }
        write_text_atomically(args.out, json.dumps(record, indent=1) + "\n")
        print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
