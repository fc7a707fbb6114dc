#!/usr/bin/env python3
"""ROUGE-L of greedy completions on held-out rows: the base, the base with the adapter, and a baseline without a model.

Loads the exported adapter with PEFT in a process of its own, without lora_scale: it shows what another user of the
adapter gets. Only the record's origin (commit, versions) is lora_scale's. Knows the columns `prompt` and `completion`.

    python scripts/evaluate.py --adapter exports/smollm2-synopsis                 # 50 rows
    python scripts/evaluate.py --adapter ... --limit 0 --batch-size 256 --out r.json   # the whole test set
"""

import argparse
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

LEAD_WORDS = 10
SHOWN_CHARACTERS = 400


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m-instruct"), help="the base's folder")
    parser.add_argument("--adapter", type=Path, required=True, help="a PEFT adapter's folder")
    parser.add_argument("--data", type=Path, default=Path("data/synopsis/test.jsonl"))
    parser.add_argument("--limit", type=int, default=50, help="use the first so many rows; 0: all")
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, help="write a JSON record there")
    return parser.parse_args()


def read_rows(path: Path, limit: int) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return rows[:limit] if limit else rows


def load(model: Path, adapter: Path, device: str, dtype: str) -> tuple[Any, Any]:
    """The PEFT model and the tokenizer; a key that PEFT misses in the adapter is an error."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).to(device)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        warnings.filterwarnings("ignore", message=".*is deprecated and will be removed in v6", category=FutureWarning)
        return PeftModel.from_pretrained(base, adapter).eval(), tokenizer


def completions(
    model: Any, tokenizer: Any, prompts: list[str], batch_size: int, max_new_tokens: int, label: str
) -> list[str]:
    """The first line of each greedy completion. Prompts of like length share a batch."""
    import torch
    from transformers import StoppingCriteriaList

    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    lines = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True).to(model.device)
        start_of_new = batch["input_ids"].shape[1]

        def has_first_line(ids: Any, scores: Any, skip: int = start_of_new, **_: Any) -> Any:
            texts = tokenizer.batch_decode(ids[:, skip:], skip_special_tokens=True)
            return torch.tensor(["\n" in text.lstrip() for text in texts], device=ids.device)

        stop = StoppingCriteriaList([has_first_line])
        with torch.inference_mode():
            tokens = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False, stopping_criteria=stop)
        new_tokens = tokens[:, start_of_new:]
        for i, text in zip(chosen, tokenizer.batch_decode(new_tokens, skip_special_tokens=True), strict=True):
            lines[i] = text.strip().split("\n")[0].strip()
        if sys.stdout.isatty():
            print(f"\r{label}: {start + len(chosen)} of {len(prompts)} rows ", end="", flush=True)
    if sys.stdout.isatty():
        print("\r\033[K", end="")
    return lines


def lead_words(prompt: str) -> str:
    """The first words of the description: what copying scores."""
    return " ".join(prompt.partition("Description: ")[2].split()[:LEAD_WORDS])


def summary(scores: list[float]) -> dict[str, float]:
    spread = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else 0.0
    return {"mean": statistics.fmean(scores), "standard_error": spread}


def rouge_l() -> Callable[[str, str], float]:
    """F1 of the longest common subsequence of words, unstemmed."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    return lambda reference, text: scorer.score(reference, text)["rougeL"].fmeasure


def record_of(args: argparse.Namespace, results: dict[str, Any]) -> dict[str, Any]:
    """What is needed to repeat the measurement, and the results."""
    import torch

    from lora_scale.storage import provenance

    commit = provenance.commit()
    if commit is None or "+" in commit:
        raise SystemExit("evaluate: --out needs a git checkout without uncommitted changes; a record names its commit")
    on_gpu = torch.device(args.device).type == "cuda"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit,
        "versions": provenance.versions(),
        "hardware": torch.cuda.get_device_name(args.device) if on_gpu else platform.processor() or platform.machine(),
        **results,
    }


def show(rows: list[dict[str, str]], outputs: dict[str, list[str]], scores: dict[str, list[float]]) -> None:
    """The table, and the example where the adapter helps as much as it does in the middle (no best case)."""
    print(f"\nROUGE-L on {len(rows)} held-out rows (mean, standard error)")
    for name, values in scores.items():
        result = summary(values)
        print(f"  {name:<24}{result['mean']:.3f} +- {result['standard_error']:.3f}")
    gains = [after - before for before, after in zip(scores["base"], scores["base + adapter"], strict=True)]
    middle = sorted(range(len(rows)), key=lambda i: gains[i])[len(rows) // 2]
    prompt = rows[middle]["prompt"]
    print("\nThe row with the median gain:")
    print("  " + prompt[:SHOWN_CHARACTERS].replace("\n", "\n  ") + (" [...]" if len(prompt) > SHOWN_CHARACTERS else ""))
    print(f"  before     {outputs['base'][middle]}")
    print(f"  after      {outputs['base + adapter'][middle]}")
    print(f"  reference  {rows[middle]['completion'].strip()}")


def main() -> int:
    args = arguments()
    import torch

    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = read_rows(args.data, args.limit)
    prompts = [row["prompt"] for row in rows]
    model, tokenizer = load(args.model, args.adapter, args.device, args.dtype)
    began = time.monotonic()
    sizes = (args.batch_size, args.max_new_tokens)
    adapted = completions(model, tokenizer, prompts, *sizes, "with the adapter")
    with model.disable_adapter():
        base = completions(model, tokenizer, prompts, *sizes, "base")
    seconds = time.monotonic() - began
    lead = f"first {LEAD_WORDS} words"
    outputs = {"base": base, "base + adapter": adapted, lead: [lead_words(prompt) for prompt in prompts]}
    score = rouge_l()
    scores = {
        name: [score(row["completion"], text) for row, text in zip(rows, texts, strict=True)]
        for name, texts in outputs.items()
    }
    show(rows, outputs, scores)
    if args.out:
        results = {
            "rows": len(rows),
            "data": str(args.data),
            "rouge_l": {name: summary(values) for name, values in scores.items()},
            "seconds": round(seconds, 1),
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(record_of(args, results), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
