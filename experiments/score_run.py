#!/usr/bin/env python3
"""Score a finished run of any method on a task's test rows, or the base alone with k examples in its prompt.

Knows how each method's checkpoint is put into a plain transformers model, one process, and three scores: loss a token
on the completions, ROUGE-L and exact match of greedy completions, and accuracy as the likeliest of the answers.

    python experiments/score_run.py --run runs/paper/runs/NAME --task '{"data": ..., "metric": ...}' --out score.json
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))

import torch
import torch.nn.functional as F
from evaluate import rouge_l
from safetensors.torch import load_file
from torch import Tensor, nn

from lora_scale.adapters import baselines, lora, peft
from lora_scale.parallel import checkpoint, recompute
from lora_scale.spec.baselines import prefix_tokens
from lora_scale.spec.config import RunConfig
from lora_scale.storage import checkpoints, runlog

BATCH = 32


def load_run(run: Path, device: str) -> tuple[nn.Module, RunConfig]:
    """The base with what the run's newest checkpoint trained, in the run's precision, ready to score."""
    from transformers import AutoModelForCausalLM

    cfg = RunConfig.model_validate(runlog.read_resolved_config(run))
    dtype = torch.bfloat16 if cfg.precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(cfg.model.path, dtype=dtype)
    if cfg.method == "lora":
        lora.adapt(model, cfg.lora, cfg.seed)
    elif cfg.method == "full":
        model.requires_grad_(True)
    else:
        baselines.insert(model, cfg, recompute.decoder_layers(model))
    _, newest = checkpoints.list_checkpoints(run / runlog.CHECKPOINTS)[-1]
    stored = load_file(newest / checkpoint.WEIGHTS[cfg.method])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(stored.pop(peft.key(name) if cfg.method == "lora" else name))
    assert not stored, f"{newest} has more than the model trains: {list(stored)[:3]}"
    return model.to(device).eval(), cfg


class Scorer:
    """A model, its tokenizer, and the placeholders that its method puts before every document."""

    def __init__(self, model: nn.Module, tokenizer: Any, prefix: int, device: str):
        self.model, self.tokenizer, self.prefix, self.device = model, tokenizer, prefix, device
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def ids(self, text: str, special: bool = True) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]

    @torch.inference_mode()
    def losses(self, pairs: Sequence[tuple[str, str]], ended: bool = True) -> list[tuple[float, int]]:
        """(summed loss, tokens) of each completion after its prompt; `ended`: with the end-of-text token."""
        end = [self.tokenizer.eos_token_id] if ended else []
        rows = [(self.ids(prompt), self.ids(completion, special=False) + end) for prompt, completion in pairs]
        found: list[tuple[float, int]] = [(0.0, 0)] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            batch = [[self.pad] * self.prefix + rows[i][0] + rows[i][1] for i in chosen]
            width = max(map(len, batch))
            ids = torch.tensor([row + [self.pad] * (width - len(row)) for row in batch], device=self.device)
            positions = torch.arange(width, device=self.device).expand_as(ids)  # padding comes last: it disturbs nobody
            logits = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits
            for line, i in enumerate(chosen):
                n = len(rows[i][1])
                first = len(batch[line]) - n
                target = ids[line, first : first + n]
                loss = F.cross_entropy(logits[line, first - 1 : first + n - 1].float(), target, reduction="sum")
                found[i] = (loss.item(), n)
        return found

    @torch.inference_mode()
    def completions(self, prompts: Sequence[str], new_tokens: int) -> list[str]:
        """The first line of each greedy completion; prompts stand at the right, so that all end together."""
        lines = [""] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            batch = [[self.pad] * self.prefix + self.ids(prompts[i]) for i in chosen]
            width = max(map(len, batch))
            ids = torch.tensor([[self.pad] * (width - len(row)) + row for row in batch], device=self.device)
            mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=self.device)
            tokens: Tensor = self.model.generate(  # type: ignore[operator]
                input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=self.pad
            )
            texts = self.tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                lines[i] = text.strip().split("\n")[0].strip()
        return lines


def read_rows(path: Path, count: int | None = None) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][:count]


def score(scorer: Scorer, task: dict[str, Any], shown: str = "") -> dict[str, Any]:
    """The task's scores on its test rows; `shown` stands before every prompt."""
    rows = read_rows(Path(task["data"]) / "test.jsonl", task["test_rows"])
    pairs = [(shown + row["prompt"], row["completion"]) for row in rows]
    losses = scorer.losses(pairs)
    result: dict[str, Any] = {"test_rows": len(rows)}
    result["test_nll"] = sum(loss for loss, _ in losses) / sum(n for _, n in losses)
    if task["metric"] == "accuracy":
        answers = task["answers"]
        each = [scorer.losses([(prompt, f" {answer}") for prompt, _ in pairs], ended=False) for answer in answers]
        guesses = [answers[min(range(len(answers)), key=lambda a: each[a][i][0])] for i in range(len(rows))]
        right = [guess == row["completion"].strip() for guess, row in zip(guesses, rows, strict=True)]
        return result | {"accuracy": sum(right) / len(right)}
    texts = scorer.completions([prompt for prompt, _ in pairs], task["new_tokens"])
    measure = rouge_l()
    references = [row.get("references") or [row["completion"].strip()] for row in rows]
    best = [max(measure(reference, text) for reference in those) for those, text in zip(references, texts, strict=True)]
    exact = [text in those for those, text in zip(references, texts, strict=True)]
    return result | {"rouge_l": sum(best) / len(best), "exact_match": sum(exact) / len(exact)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, help="run directory of a finished run")
    parser.add_argument("--base", help="score this base alone instead")
    parser.add_argument("--shots", type=int, default=0, help="training rows shown before each prompt, with --base")
    parser.add_argument("--task", type=json.loads, required=True)
    parser.add_argument("--no-test", action="store_true", help="validation loss only: what tuning may look at")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is a folder; nothing is to be fetched
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    shown = ""
    if args.run:
        rows = runlog.read_metrics(args.run)
        result["val_loss"] = next((row["val_loss"] for row in reversed(rows) if row.get("val_loss") is not None), None)
        result["trainable"] = runlog.read_manifest(args.run)["parameters"]["trainable"]
    if not args.no_test:
        if args.run:
            model, cfg = load_run(args.run, device)
            path, prefix = cfg.model.path, prefix_tokens(cfg)
        else:
            path, prefix = args.base, 0
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).to(device).eval()
            examples = read_rows(Path(args.task["data"]) / "train.jsonl", args.shots)
            shown = "".join(f"{row['prompt']}{row['completion']}\n\n" for row in examples)
            result["trainable"] = 0
        result |= score(Scorer(model, AutoTokenizer.from_pretrained(path), prefix, device), args.task, shown)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
