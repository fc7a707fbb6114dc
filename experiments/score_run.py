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
from collections.abc import Iterator, Sequence
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
from lora_scale.adapters.lean import make_lean
from lora_scale.parallel import checkpoint, recompute
from lora_scale.parallel.vocabulary import IGNORED
from lora_scale.spec.baselines import prefix_tokens
from lora_scale.spec.config import RunConfig
from lora_scale.storage import checkpoints, runlog

ROWS, TOKENS = 256, 16_384  # of a batch at most; tokens with their padding


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
    if cfg.kernels == "auto":
        make_lean(model)  # the arithmetic that the run trained with
    return model.to(device).eval(), cfg


def load_base(path: str, device: str) -> nn.Module:
    """The base alone, in the arithmetic of a run's."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    make_lean(model)
    return model.to(device).eval()


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
        prompts = [[self.pad] * self.prefix + self.ids(prompt) for prompt, _ in pairs]
        targets = [self.ids(completion, special=False) + end for _, completion in pairs]
        found: list[tuple[float, int]] = [(0.0, 0)] * len(pairs)
        for chosen in _batches([len(a) + len(b) for a, b in zip(prompts, targets, strict=True)]):
            batch = [prompts[i] + targets[i] for i in chosen]
            width, first = max(map(len, batch)), min(len(prompts[i]) for i in chosen)
            ids = torch.tensor([row + [self.pad] * (width - len(row)) for row in batch], device=self.device)
            labels = [[IGNORED] * len(prompts[i]) + targets[i] for i in chosen]
            aim = torch.tensor([row + [IGNORED] * (width - len(row)) for row in labels], device=self.device)[:, first:]
            positions = torch.arange(width, device=self.device)  # padding comes last: it disturbs nobody
            logits = self.model(
                input_ids=ids,
                position_ids=positions.expand_as(ids),
                use_cache=False,
                logits_to_keep=positions[first - 1 : -1],
            ).logits
            each = F.cross_entropy(logits.float().flatten(0, 1), aim.flatten(), ignore_index=IGNORED, reduction="none")
            for i, loss in zip(chosen, each.view_as(aim).sum(1).tolist(), strict=True):
                found[i] = (loss, len(targets[i]))
        return found

    @torch.inference_mode()
    def completions(self, prompts: Sequence[str], new_tokens: int) -> list[str]:
        """The first line of each greedy completion; prompts stand at the right, so that all end together."""
        lines = [""] * len(prompts)
        rows = [[self.pad] * self.prefix + self.ids(prompt) for prompt in prompts]
        for chosen in _batches([len(row) + new_tokens for row in rows], tokens=4 * TOKENS):
            width = max(len(rows[i]) for i in chosen)
            gaps = [width - len(rows[i]) for i in chosen]
            ids = [[self.pad] * gap + rows[i] for gap, i in zip(gaps, chosen, strict=True)]
            mask = [[0] * gap + [1] * (width - gap) for gap in gaps]
            tokens: Tensor = self.model.generate(  # type: ignore[operator]
                input_ids=torch.tensor(ids, device=self.device),
                attention_mask=torch.tensor(mask, device=self.device),
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,  # a model that was trained has it off
                pad_token_id=self.pad,
                eos_token_id=self.tokenizer.eos_token_id,
            )
            texts = self.tokenizer.batch_decode(tokens[:, width:], skip_special_tokens=True)
            for i, text in zip(chosen, texts, strict=True):
                lines[i] = text.strip().split("\n")[0].strip()
        return lines


def _batches(lengths: Sequence[int], tokens: int = TOKENS) -> Iterator[list[int]]:
    """Numbers of rows of like length, the longest first, so many together as a batch may hold."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) == ROWS or (len(batch) + 1) * lengths[batch[0]] > tokens):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


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


def facts(run: Path) -> dict[str, Any]:
    """What the run's own records say of it."""
    rows = runlog.read_metrics(run)
    validated = [row["val_loss"] for row in rows if row.get("val_loss") is not None]
    return {
        "trainable": runlog.read_manifest(run)["parameters"]["trainable"],
        "steps": rows[-1]["step"],
        "val_loss_before": validated[0] if validated else None,
        "val_loss": validated[-1] if validated else None,
    }


def shown_examples(task: dict[str, Any], shots: int) -> str:
    """The first `shots` training rows as they stand before a prompt."""
    examples = read_rows(Path(task["data"]) / "train.jsonl", shots)
    return "".join(f"{row['prompt']}{row['completion']}\n\n" for row in examples)


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
    from transformers import AutoTokenizer

    result: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    result |= facts(args.run) if args.run else {"trainable": 0}
    if not args.no_test:
        if args.run:
            model, cfg = load_run(args.run, device)
            path, prefix, shown = cfg.model.path, prefix_tokens(cfg), ""
        else:
            path, prefix, shown = args.base, 0, shown_examples(args.task, args.shots)
            model = load_base(path, device)
        result |= score(Scorer(model, AutoTokenizer.from_pretrained(path), prefix, device), args.task, shown)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
