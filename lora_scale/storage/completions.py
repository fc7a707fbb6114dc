"""The result of generation on disk: a JSONL file an adapter, and how well they did. Knows rows and scores, no model."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_scale.storage import durable
from lora_scale.storage.prompts import Prompt
from lora_scale.storage.scores import Scorer

METRICS = "metrics.json"


def write(path: Path, prompts: Sequence[Prompt], found: Sequence[Mapping[str, Any]], scorer: Scorer | None) -> None:
    """One row a prompt, in their order: line, prompt, completion, tokens, finish; reference and scores where the row
    has a reference."""
    lines = []
    for prompt, one in zip(prompts, found, strict=True):
        row = {"line": prompt.line, "prompt": prompt.text, "completion": one["text"]}
        row |= {"tokens": len(one["ids"]), "finish": one["finish"]}
        if prompt.reference is not None:
            row["reference"] = prompt.reference
            if scorer:
                row["scores"] = scorer.row(one["text"], prompt.reference)
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    durable.write_text_atomically(path, "".join(lines))


def summarise(folder: Path, names: Sequence[str], scorer: Scorer | None) -> list[str]:
    """Write metrics.json from the scored rows of `names`; a line for the screen each. Nothing without a scorer."""
    if scorer is None:
        return []
    found, lines = {}, []
    for name in names:
        rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        scored = [row for row in rows if "scores" in row]
        pairs = [(row["completion"], row["reference"]) for row in scored]
        found[name] = one = scorer.corpus([row["scores"] for row in scored], pairs)
        means = ", ".join(
            f"{key} {one[key]['mean']:.3f} +- {one[key]['standard_error']:.3f}" for key in ("rougeL", "exact_match")
        )
        lines.append(f"scores   {name}: {means}, BLEU {one['bleu']:.1f} ({one['rows']:,} rows)")
    durable.write_text_atomically(folder / METRICS, durable.as_json(found))
    return lines
