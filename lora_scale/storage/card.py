"""The README.md of what we hand over: what it is, from what, with which result. Text only.

Names no path, user or machine: a file of the user's is called by the last part of its name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from lora_scale.storage.hub import is_name


@dataclass(frozen=True, slots=True)
class Training:
    """What a run directory says of the training, as far as it is there."""

    config: Mapping[str, Any]  # resolved
    manifest: Mapping[str, Any]
    metrics: Sequence[Mapping[str, Any]]


def adapter_card(
    base: str,
    fingerprint: str | None,
    adapter: Mapping[str, Any],
    step: int | None = None,
    training: Training | None = None,
    more: Mapping[str, Sequence[tuple[str, object]]] | None = None,
) -> str:
    """Of an adapter; `adapter` is its adapter_config.json, `more` has tables by their headings."""
    head = [*_front_matter(base, "peft", ["lora", "lora-scale"]), f"# LoRA adapter for {base}", ""]
    rows = [
        ("base model", base),
        ("its fingerprint", fingerprint or "not known"),
        ("r, lora_alpha, dropout", f"{adapter['r']}, {adapter['lora_alpha']}, {adapter.get('lora_dropout') or 0}"),
        ("adapted layers", _short(adapter.get("target_modules"))),
    ]
    for name in ("rank_pattern", "alpha_pattern", "use_rslora"):
        if adapter.get(name):
            rows.append((name, _short(adapter[name])))
    text = [*head, *_table(rows)]
    if training:
        text += ["## Training", "", *_table(_training(training, step)), *_results(training.metrics, step)]
    for heading, told in (more or {}).items():
        text += [f"## {heading}", "", *_table(told)]
    return "\n".join(text)


def merged_card(base: str, adapters: Sequence[str], task: Mapping[str, Any]) -> str:
    """Of a merged model."""
    title = " + ".join([base, *adapters])
    weights = [part["weight"] for part in task["adapters"]]
    rows = [("base model", base), ("its fingerprint", task["base"])]
    rows += [(f"adapter {name}, weight", f"{weight:g}") for name, weight in zip(adapters, weights, strict=True)]
    head = [*_front_matter(base, "transformers", ["lora-scale"]), f"# {title}", ""]
    told = "The updates are added to the base's weights: no PEFT is needed to load this folder. Made by lora-scale."
    return "\n".join([*head, told, "", *_table(rows)])


def _front_matter(base: str, library: str, tags: Sequence[str]) -> list[str]:
    """The hub's own fields; it refuses a base_model that is no name on it."""
    named = [f"base_model: {base}"] if is_name(base) else []
    told = [f"library_name: {library}", "pipeline_tag: text-generation", f"tags: [{', '.join(tags)}]"]
    return ["---", *named, *told, "---", ""]


def _table(rows: Sequence[tuple[str, object]]) -> list[str]:
    return ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]


def _training(training: Training, step: int | None) -> list[tuple[str, object]]:
    train, data = training.config["train"], training.config["data"]
    counted = training.manifest.get("data") or {}
    tokens = sum(row.get("tokens", 0) for row in training.metrics if step is None or row["step"] <= step)
    rows: list[tuple[str, object]] = [
        ("data", _file(data["train"])),
        ("validation", _file(data["validation"]) if isinstance(data["validation"], str) else data["validation"]),
    ]
    rows += [(f"data: {name}", value) for name, value in counted.items() if isinstance(value, int | float)]
    rows += [
        ("steps", step),
        ("tokens trained", f"{tokens:,}"),
        ("blocks a step, tokens a block", f"{train['global_batch_size']}, {data['seq_len']}"),
        ("optimizer", f"AdamW, lr {train['lr']:g}, {train['schedule']}, {train['warmup_steps']} steps of warm-up"),
        ("precision", training.config["precision"]),
        ("seed", training.config["seed"]),
        ("software", ", ".join(f"{k} {v}" for k, v in (training.manifest.get("versions") or {}).items())),
    ]
    return rows


def _results(metrics: Sequence[Mapping[str, Any]], step: int | None) -> list[str]:
    rows = [row for row in metrics if row.get("val_loss") is not None and (step is None or row["step"] <= step)]
    if not rows:
        return []
    lines = [f"| {row['step']:,} | {row['val_loss']:.4f} |" for row in rows]
    return ["## Results", "", "| step | validation loss |", "|--:|--:|", *lines, ""]


def _file(value: object) -> str:
    return PurePath(str(value)).name


def _short(value: object) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 200 else text[:200] + "..."
