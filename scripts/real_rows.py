#!/usr/bin/env python3
"""Real rows under tensor parallelism: do a run in fp32 and one in bf16 on one GPU, and one in bf16 on two, have the
same validation curve?

    python scripts/real_rows.py --tokenizer models/smollm2-135m-instruct --out docs/benchmarks/NAME.json      two GPUs
    ... --features 64 --layers 2 --steps 4 --out ...                    the same small, on CPU ranks; a minute

A random Llama with 8 heads, 4 for keys and values (SmolLM2's 9 do not divide by 2); the synopsis sample of the tests.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from lora_scale.storage import provenance  # noqa: E402
from lora_scale.storage.durable import write_text_atomically  # noqa: E402
from lora_scale.storage.runlog import read_manifest, read_metrics  # noqa: E402

RUNS: dict[str, list[str]] = {  # the first is what the others are held to
    "fp32": ["--ranks", "1", "precision=fp32"],
    "bf16": ["--ranks", "1"],
    "bf16, tensor parallel 2": ["--ranks", "2", "parallel.tensor_parallel_size=2", "parallel.zero_stage=0"],
}
CONFIG = """\
model: {{path: model}}
data: {{train: {data}/synopsis-train.jsonl, validation: {data}/synopsis-test.jsonl, seq_len: 512}}
run_dir: run
precision: bf16
lora: {{r: 64, lora_alpha: 128, target_modules: [all-linear]}}
train: {{max_steps: {steps}, global_batch_size: 8, micro_batch_size: 4, lr: 3.0e-4, warmup_steps: {warm_up}}}
eval: {{every: {every}, max_blocks: 16}}
save: {{last: false}}
"""


def write_model(folder: Path, tokenizer: Path, features: int, layers: int) -> None:
    """Random weights in bf16, with the tokenizer of another folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    sizes = {"hidden_size": features, "intermediate_size": features * 11 // 4, "num_hidden_layers": layers}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    config = LlamaConfig(
        vocab_size=49152, max_position_embeddings=2048, tie_word_embeddings=False, **heads, **sizes, **ends
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for file in tokenizer.iterdir():
        if "token" in file.name or file.suffix == ".jinja" or file.name in ("vocab.json", "merges.txt"):
            shutil.copy(file, folder)


def run(number: int, name: str, folder: Path) -> dict[str, Any]:
    """One run; its row of the record."""
    command = [sys.executable, "-m", "lora_scale", "train", "config.yaml", f"run_dir=run-{number}", *RUNS[name]]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    rows = list(read_metrics(folder / f"run-{number}"))
    losses = [row["loss"] for row in rows if "loss" in row]
    return {"name": name, "losses": losses, "validation": {r["step"]: r["val_loss"] for r in rows if "val_loss" in r}}


def table(runs: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    first = runs[0]
    head = " | ".join(f"validation at {step}" for step in first["validation"])
    lines = [f"| run | {head} | RMS of training losses against {first['name']} |"]
    lines.append("|---|" + "--:|" * (len(first["validation"]) + 1))
    for one in runs:
        errors = [a - b for a, b in zip(one["losses"], first["losses"], strict=True)]
        rms = f"{math.sqrt(sum(e * e for e in errors) / len(errors)):.1e}" if one is not first else ""
        curve = " | ".join(f"{loss:.5f}" for loss in one["validation"].values())
        lines.append(f"| {one['name']} | {curve} | {rms} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with SmolLM2's tokenizer")
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--out", type=Path, required=True, help="the record, .json")
    args = parser.parse_args()
    commit = provenance.commit_of_record("real_rows.py")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_model(folder / "model", args.tokenizer, args.features, args.layers)
        every, warm_up = max(1, args.steps // 4), min(10, args.steps - 1)
        text = CONFIG.format(data=ROOT / "tests" / "data", steps=args.steps, every=every, warm_up=warm_up)
        (folder / "config.yaml").write_text(text)
        runs = [run(number, name, folder) for number, name in enumerate(RUNS)]
        device = read_manifest(folder / "run-0")["hardware"]["device"]
    what = (
        f"a random Llama of {args.layers} layers, {args.features} features, 8 heads; LoRA r = 64 on all linear layers"
    )
    record = provenance.head(what, "scripts/real_rows.py", commit, device or "") | {"kind": "real rows", "runs": runs}
    write_text_atomically(args.out, json.dumps(record, indent=1) + "\n")
    print("\n".join(table(runs)))


if __name__ == "__main__":
    main()
