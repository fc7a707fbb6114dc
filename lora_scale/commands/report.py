"""`lora-scale report`: a run directory as one HTML page, and as Markdown with pictures beside it. Reads records only.

Nothing here is computed anew but sums, medians and shares: a figure that no record holds is said to be missing.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click

from lora_scale.spec.errors import UsageError
from lora_scale.spec.wording import binary, decimal
from lora_scale.storage import checkpoints, figures, page, runlog
from lora_scale.storage.durable import write_text_atomically
from lora_scale.storage.memory_page import MISSING, beside_full, by_rank, largest, memory_of, where_it_went
from lora_scale.storage.page import Block, Bullets, Picture, Text, table

WARM_UP = 3  # steps left out of medians of speed: compilation, caches, the first allocation of everything
Rows = Sequence[dict[str, Any]]
SPEEDS = {
    "tokens_per_second": "tokens/s",
    "tokens_per_second_per_gpu": "tokens/s a GPU (or rank)",
    "tflops_4n": "model TFLOP/s a GPU (4N, or 6N of full fine-tuning)",
    "mfu": "MFU, attention counted",
    "seconds": "seconds a step",
}


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The page's file, .html. Default: RUN/report.html.")
def command(run: Path, out: Path | None) -> None:
    """Write what RUN's records say as one HTML page, and as Markdown beside it, which is printed.

    \b
    lora-scale report runs/first
    lora-scale report runs/first --out first.html

    RUN is the run_dir of a training run, finished or not. The page holds its pictures and opens offline.

    Exit codes: 0 written, 2 RUN is no run directory or a record in it is damaged.
    """
    rows, manifest = runlog.read_metrics(run), runlog.read_manifest(run)
    config, ranks = runlog.read_resolved_config(run), runlog.read_memory(run)
    path = out or run / "report.html"
    if not path.parent.is_dir():
        raise UsageError(f"--out is {path}, but {path.parent} is no folder; make it first")
    title, summary = f"Run {run.resolve().name}", _summary(rows, manifest, config)
    sections: dict[str, list[Block]] = {
        "Warnings": _warnings(run, rows, manifest, config),
        "Where the memory went": where_it_went(rows, manifest),
        "Memory, rank by rank": by_rank(ranks),
        "LoRA beside full fine-tuning": beside_full(manifest.get("plan") or {}),
        "Loss": _loss(rows),
        "Speed": _speed(rows),
        "Checkpoints": _checkpoints(run, rows),
        "What ran": _what_ran(manifest),
        "Data and loading": [*_data(manifest), *_sources(rows, manifest)],
    }
    text = page.markdown(title, summary, sections, path.stem)
    for block in (block for blocks in sections.values() for block in blocks):
        if isinstance(block, Picture):
            write_text_atomically(path.with_name(f"{path.stem}-{block.name}.svg"), block.svg)
    write_text_atomically(path.with_suffix(".md"), text)
    write_text_atomically(path.with_suffix(".html"), page.as_html(title, summary, sections))
    click.echo(text, nl=False)
    click.echo(f"written: {path.with_suffix('.html')} and {path.with_suffix('.md')}", err=True)


def _summary(rows: Rows, manifest: dict[str, Any], config: dict[str, Any]) -> str:
    """One paragraph: how far, how well, how fast, how large."""
    steps, losses, validation = _steps(rows), _column(rows, "loss"), _column(rows, "val_loss")
    parts = [
        f"{steps[-1]['step']} optimizer steps of {config.get('model', {}).get('path')}" if steps else "No step yet"
    ]
    parts[0] += f" ({config.get('method')}, {_layout(config.get('parallel', {}))}, {config.get('precision')})"
    if losses:
        parts.append(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    if validation:
        parts.append(f"validation loss {validation[0]:.4f} -> {validation[-1]:.4f}")
    if speeds := _column(steps[WARM_UP:] or steps, "tokens_per_second"):
        parts.append(f"{median(speeds):,.0f} tokens/s on {_count(manifest.get('ranks'), 'rank')}")
    if (peak := largest(memory_of(rows), "peak_gib")) is not None:
        parts.append(f"peak {peak:.1f} GiB allocated on the first GPU")
    return "; ".join(parts) + "."


def _layout(parallel: dict[str, Any]) -> str:
    """As the config has it."""
    ways, stage = parallel.get("tensor_parallel_size", 1), parallel.get("zero_stage")
    return f"ZeRO-{stage}" if ways == 1 else f"tensor parallel {ways}{f', ZeRO-{stage}' if stage else ''}"


def _what_ran(manifest: dict[str, Any]) -> list[Block]:
    command, hardware, versions = (manifest.get(key) for key in ("command", "hardware", "versions"))
    shown = " ".join(command) if isinstance(command, list) else command
    lines = [
        ["command", f"`{shown}`" if shown else MISSING],
        ["commit", manifest.get("commit") or f"{MISSING} (an installed package has none)"],
        ["started", manifest.get("started") or MISSING],
        ["ranks", manifest.get("ranks", MISSING)],
        ["hardware", _pairs(hardware)],
        ["versions", _pairs(versions)],
        ["attention", manifest.get("attention") or MISSING],
        ["base", manifest.get("base_fingerprint") or MISSING],
        ["config", f"sha256 {manifest['config_sha256']}" if manifest.get("config_sha256") else MISSING],
    ]
    if manifest.get("resumed_step"):
        lines.append(["resumed after step", manifest["resumed_step"]])
    parameters = manifest.get("parameters") or {}
    total, trainable = parameters.get("total"), parameters.get("trainable")
    lines.append(["parameters", f"{total:,}" if total else MISSING])
    share = f" ({trainable / total:.3%})" if total and trainable else ""
    lines.append(["trained", f"{trainable:,}{share}" if trainable else MISSING])
    return [table(["", ""], lines)]


def _loss(rows: Rows) -> list[Block]:
    lines = []
    for key, label in {"loss": "loss", "val_loss": "validation loss", "grad_norm": "gradient norm", "lr": "lr"}.items():
        if values := _column(rows, key):
            shown = (values[0], values[-1], median(values), min(values), max(values))
            lines.append([label, *(f"{value:.5g}" for value in shown)])
    blocks: list[Block] = []
    if curves := _curves(rows, {"training": "loss", "validation": "val_loss"}):
        blocks.append(Picture("loss", "Loss by step", figures.curves("Loss, nats a token", "optimizer step", curves)))
    blocks.append(
        table(["", "first", "last", "median", "least", "most"], lines) if lines else Text(f"Loss: {MISSING}.")
    )
    if not _column(rows, "val_loss"):
        blocks.append(Text(f"Validation loss: {MISSING}."))
    return blocks


def _speed(rows: Rows) -> list[Block]:
    steps = _steps(rows)
    counted = steps[WARM_UP:] or steps
    lines = []
    for key, label in SPEEDS.items():
        if values := _column(counted, key):
            lines.append([label, f"{median(values):,.4g}", f"{min(values):,.4g}", f"{max(values):,.4g}"])
    phases = {name: None for row in counted for name in row.get("phase_seconds") or {}}
    for name in phases:
        values = [row["phase_seconds"][name] for row in counted if name in (row.get("phase_seconds") or {})]
        lines.append([f"seconds in {name}", f"{median(values):,.4g}", f"{min(values):,.4g}", f"{max(values):,.4g}"])
    if not lines:
        return [Text(f"Speed: {MISSING}.")]
    left_out = f", the first {WARM_UP} left out" if len(steps) > WARM_UP else ""
    blocks: list[Block] = [Text(f"{len(counted)} steps{left_out}.")]
    if curves := _curves(steps, {"tokens/s": "tokens_per_second"}):
        blocks.append(
            Picture("speed", "Tokens/s by step", figures.curves("Tokens/s, all ranks", "optimizer step", curves))
        )
    return [*blocks, table(["", "median", "least", "most"], lines)]


def _checkpoints(run: Path, rows: Rows) -> list[Block]:
    seconds = {row["step"]: row["save_seconds"] for row in rows if "save_seconds" in row}
    lines = []
    for step, path in checkpoints.list_checkpoints(run / runlog.CHECKPOINTS):
        sizes = {file.name: file.stat().st_size for file in sorted(path.iterdir())}
        tensors = ", ".join(f"{name} {binary(size)}" for name, size in sizes.items() if name.endswith(".safetensors"))
        took = f"{seconds[step]:.2f} s" if step in seconds else MISSING
        lines.append([step, binary(sum(sizes.values())), took, tensors])
    blocks: list[Block] = [table(["step", "size", "written in", "tensors"], lines) if lines else Text("None.")]
    gone = [
        f"step {step} in {value:.2f} s" for step, value in seconds.items() if step not in {line[0] for line in lines}
    ]
    return blocks + ([Text(f"Written too, and deleted since: {', '.join(gone)}.")] if gone else [])


def _data(manifest: dict[str, Any]) -> list[Block]:
    load, data = manifest.get("load") or {}, manifest.get("data") or {}
    lines = [
        [key.replace("_", " "), f"{value:,}" if isinstance(value, int | float) else value]
        for key, value in data.items()
        if key != "sources"
    ]
    nbytes, seconds = load.get("bytes"), load.get("seconds")
    if nbytes and seconds:
        lines.append(
            ["weights read, first rank", f"{decimal(nbytes)} in {seconds:.1f} s ({nbytes / 1e9 / seconds:.2f} GB/s)"]
        )
    else:
        lines.append(["weights read, first rank", MISSING])
    return [table(["", ""], lines)]


def _sources(rows: Rows, manifest: dict[str, Any]) -> list[Block]:
    """Of a mixture, what each source holds, and what has been seen of it so far."""
    held = (manifest.get("data") or {}).get("sources") or {}
    seen = {name: {"rows": 0, "tokens": 0} for name in held}
    for row in rows:
        for name, counts in (row.get("sources") or {}).items():
            for key, count in counts.items():
                seen[name][key] += count
    total = max(1, sum(sums["tokens"] for sums in seen.values()))
    lines = [
        [
            name,
            f"{held[name]['weight']:g}",
            f"{held[name]['rows']:,}",
            *(f"{sums[key]:,}" for key in ("rows", "tokens")),
            f"{sums['tokens'] / total:.1%}",
        ]
        for name, sums in seen.items()
    ]
    headers = ["source", "weight", "rows", "rows seen", "tokens seen", "of all tokens"]
    return [table(headers, lines)] if lines else []


def _warnings(run: Path, rows: Rows, manifest: dict[str, Any], config: dict[str, Any]) -> list[Block]:
    """What a reader of the figures below must know first."""
    steps, validation, found = _steps(rows), _column(rows, "val_loss"), []
    asked = (config.get("train") or {}).get("max_steps")
    if not steps:
        found.append("no step has been recorded")
    elif asked and not (config.get("train") or {}).get("epochs") and steps[-1]["step"] < asked:
        found.append(f"the records end at step {steps[-1]['step']} of {asked}")
    if bad := [row["step"] for row in steps if row.get("loss") is None]:
        found.append(f"the loss was not finite, or not recorded, at {_count(len(bad), 'step')}, first {bad[0]}")
    if len(validation) > 1 and validation[-1] >= validation[0]:
        found.append(f"validation loss did not fall: {validation[0]:.4f} before, {validation[-1]:.4f} at the end")
    if len(validation) > 2 and validation[-1] > min(validation[1:]):
        found.append(f"the last validation loss, {validation[-1]:.4f}, is above the least, {min(validation):.4f}")
    if cut := (manifest.get("data") or {}).get("truncated_rows"):
        found.append(f"{_count(cut, 'row')} longer than data.seq_len were cut")
    if str(manifest.get("commit")).endswith("+changes"):
        found.append("the program had changes that its commit does not hold")
    for path, what in checkpoints.list_damaged(run / runlog.CHECKPOINTS):
        found.append(f"checkpoint {path.name} is damaged: {what}")
    found += (manifest.get("plan") or {}).get("warnings", [])
    return [Bullets(tuple(found))] if found else [Text("None.")]


def _steps(rows: Rows) -> Rows:
    """Rows of optimizer steps: the one of step 0 holds the evaluation before the first."""
    return [row for row in rows if row["step"] > 0]


def _column(rows: Rows, key: str) -> list[float]:
    return [row[key] for row in rows if isinstance(row.get(key), int | float)]


def _curves(rows: Rows, named: dict[str, str]) -> dict[str, list[tuple[float, float]]]:
    """(step, value) of each key that some row has."""
    found = {n: [(row["step"], row[k]) for row in rows if isinstance(row.get(k), float)] for n, k in named.items()}
    return {name: points for name, points in found.items() if points}


def _pairs(values: Any) -> str:
    return (
        ", ".join(f"{key} {value}" for key, value in values.items()) if isinstance(values, dict) and values else MISSING
    )


def _count(number: Any, noun: str) -> str:
    return f"{MISSING} {noun}s" if number is None else f"{number} {noun}{'' if number == 1 else 's'}"
