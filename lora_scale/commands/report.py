"""`lora-scale report`: a run directory as a Markdown page, with a picture of the loss beside it. Reads records only.

Nothing here is computed anew but sums, medians and shares: a figure that no record holds is said to be missing.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click

from lora_scale.spec.errors import UsageError
from lora_scale.spec.wording import CATEGORIES, JOBS, STATES, binary, decimal
from lora_scale.storage import chart, checkpoints, runlog
from lora_scale.storage.durable import write_text_atomically

MISSING = "not recorded"
WARM_UP = 3  # steps left out of medians of speed: compilation, caches, the first allocation of everything
Rows = Sequence[dict[str, Any]]
MEASURED = {  # key of a row's memory: its name here; the largest over the run counts
    "peak_gib": "peak allocated",
    "allocated_gib": "allocated between steps",
    "peak_reserved_gib": "peak reserved by the allocator",
    "reserved_gib": "reserved by the allocator",
    "rss_anon_gib": "host memory, anonymous",
    "rss_peak_gib": "host memory, peak resident",
}
SPEEDS = {
    "tokens_per_second": "tokens/s",
    "tokens_per_second_per_gpu": "tokens/s a GPU (or rank)",
    "tflops_4n": "model TFLOP/s a GPU (4N, or 6N of full fine-tuning)",
    "mfu": "MFU, attention counted",
    "seconds": "seconds a step",
}


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The page's file. Default: RUN/report.md.")
def command(run: Path, out: Path | None) -> None:
    """Write what RUN's records say as a Markdown page, and print it.

    \b
    lora-scale report runs/first
    lora-scale report runs/first --out first.md

    RUN is the run_dir of a training run, finished or not.

    Exit codes: 0 written, 2 RUN is no run directory or a record in it is damaged.
    """
    rows, manifest = runlog.read_metrics(run), runlog.read_manifest(run)
    config = runlog.read_resolved_config(run)
    path = out or run / "report.md"
    if not path.parent.is_dir():
        raise UsageError(f"--out is {path}, but {path.parent} is no folder; make it first")
    picture = path.with_name(f"{path.stem}-loss.svg")
    curves = _curves(rows)
    text = page(run, rows, manifest, config, picture.name if curves else None)
    if curves:
        write_text_atomically(picture, chart.line_chart("Loss, nats a token", "optimizer step", curves))
    write_text_atomically(path, text)
    click.echo(text, nl=False)
    click.echo(f"written: {path}{f' and {picture}' if curves else ''}", err=True)


def page(run: Path, rows: Rows, manifest: dict[str, Any], config: dict[str, Any], picture: str | None) -> str:
    """The whole page."""
    sections: dict[str, list[str]] = {
        "Warnings": _warnings(run, rows, manifest, config),
        "What ran": _what_ran(manifest),
        "Memory": _memory(rows, manifest),
        "Loss": _loss(rows, picture),
        "Speed": _speed(rows),
        "Checkpoints": _checkpoints(run),
        "Data and loading": _data(manifest),
    }
    lines = [f"# Run {run.resolve().name}", "", _summary(rows, manifest, config)]
    for title, body in sections.items():
        lines += ["", f"## {title}", "", *body]
    return "\n".join(lines) + "\n"


def _summary(rows: Rows, manifest: dict[str, Any], config: dict[str, Any]) -> str:
    """One paragraph: how far, how well, how fast, how large."""
    steps, losses, validation = _steps(rows), _column(rows, "loss"), _column(rows, "val_loss")
    parts = [
        f"{steps[-1]['step']} optimizer steps of {config.get('model', {}).get('path')}" if steps else "No step yet"
    ]
    parts[0] += (
        f" ({config.get('method')}, ZeRO-{config.get('parallel', {}).get('zero_stage')}, {config.get('precision')})"
    )
    if losses:
        parts.append(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")
    if validation:
        parts.append(f"validation loss {validation[0]:.4f} -> {validation[-1]:.4f}")
    if speeds := _column(steps[WARM_UP:] or steps, "tokens_per_second"):
        parts.append(f"{median(speeds):,.0f} tokens/s on {_count(manifest.get('ranks'), 'rank')}")
    if peaks := _memory_column(rows, "peak_gib"):
        parts.append(f"peak {max(peaks):.1f} GiB allocated on the first GPU")
    return "; ".join(parts) + "."


def _what_ran(manifest: dict[str, Any]) -> list[str]:
    command, hardware, versions = (manifest.get(key) for key in ("command", "hardware", "versions"))
    shown = " ".join(command) if isinstance(command, list) else command
    lines = [
        ["command", f"`{shown}`" if shown else MISSING],
        ["commit", manifest.get("commit") or f"{MISSING} (an installed package has none)"],
        ["started", manifest.get("started") or MISSING],
        ["ranks", manifest.get("ranks", MISSING)],
        ["hardware", _pairs(hardware)],
        ["versions", _pairs(versions)],
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
    return _table(["", ""], lines)


def _memory(rows: Rows, manifest: dict[str, Any]) -> list[str]:
    """Predicted per rank beside full fine-tuning, then measured on the first rank."""
    plan = manifest.get("plan") or {}
    jobs = [name for name in JOBS if name in plan]
    body = []
    if jobs:
        lines = []
        for key, label in CATEGORIES.items():
            cells = [plan[job]["moments"][plan[job]["peak_moment"]][key] for job in jobs]
            if any(cells):
                lines.append([label, *(binary(cell) if cell else "" for cell in cells)])
            if key == list(STATES)[-1]:
                lines.append(["**model states, exact**", *(binary(plan[job]["model_states"]["total"]) for job in jobs)])
        lines.append(["**peak allocated**", *(binary(plan[job]["allocated"]) for job in jobs)])
        body += ["Computed before the run, a rank:", "", *_table(["", *(JOBS[job] for job in jobs)], lines), ""]
    else:
        body += [f"Computed before the run: {plan.get('unknown', MISSING)}.", ""]
    measured = {label: _memory_column(rows, key) for key, label in MEASURED.items()}
    lines = [[label, f"{max(values):,.2f} GiB"] for label, values in measured.items() if values]
    if lines:
        body += ["Measured on the first rank, the largest over the run:", "", *_table(["", "this run"], lines)]
    else:
        body.append(f"Measured: {MISSING}.")
    if not _memory_column(rows, "peak_gib"):
        body += [
            "",
            f"GPU memory: {MISSING} (the run had no GPU)." if _has_no_gpu(manifest) else f"GPU memory: {MISSING}.",
        ]
    return body


def _loss(rows: Rows, picture: str | None) -> list[str]:
    lines = []
    for key, label in {"loss": "loss", "val_loss": "validation loss", "grad_norm": "gradient norm", "lr": "lr"}.items():
        if values := _column(rows, key):
            figures = (values[0], values[-1], median(values), min(values), max(values))
            lines.append([label, *(f"{value:.5g}" for value in figures)])
    body = _table(["", "first", "last", "median", "least", "most"], lines) if lines else [f"Loss: {MISSING}."]
    if not _column(rows, "val_loss"):
        body += ["", f"Validation loss: {MISSING}."]
    return body + (["", f"![loss by step]({picture})"] if picture else [])


def _speed(rows: Rows) -> list[str]:
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
        return [f"Speed: {MISSING}."]
    left_out = f", the first {WARM_UP} left out" if len(steps) > WARM_UP else ""
    return [f"{len(counted)} steps{left_out}.", "", *_table(["", "median", "least", "most"], lines)]


def _checkpoints(run: Path) -> list[str]:
    lines = []
    for step, path in checkpoints.list_checkpoints(run / runlog.CHECKPOINTS):
        sizes = {file.name: file.stat().st_size for file in sorted(path.iterdir())}
        largest = ", ".join(f"{name} {binary(size)}" for name, size in sizes.items() if name.endswith(".safetensors"))
        lines.append([step, binary(sum(sizes.values())), largest])
    return _table(["step", "size", "tensors"], lines) if lines else ["None."]


def _data(manifest: dict[str, Any]) -> list[str]:
    load, data = manifest.get("load") or {}, manifest.get("data") or {}
    lines = [
        [key.replace("_", " "), f"{value:,}" if isinstance(value, int | float) else value]
        for key, value in data.items()
    ]
    nbytes, seconds = load.get("bytes"), load.get("seconds")
    if nbytes and seconds:
        lines.append(
            ["weights read, first rank", f"{decimal(nbytes)} in {seconds:.1f} s ({nbytes / 1e9 / seconds:.2f} GB/s)"]
        )
    else:
        lines.append(["weights read, first rank", MISSING])
    return _table(["", ""], lines)


def _warnings(run: Path, rows: Rows, manifest: dict[str, Any], config: dict[str, Any]) -> list[str]:
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
    return [f"- {text}" for text in found] or ["None."]


def _steps(rows: Rows) -> Rows:
    """Rows of optimizer steps: the one of step 0 holds the evaluation before the first."""
    return [row for row in rows if row["step"] > 0]


def _column(rows: Rows, key: str) -> list[float]:
    return [row[key] for row in rows if isinstance(row.get(key), int | float)]


def _memory_column(rows: Rows, key: str) -> list[float]:
    return _column([{"step": row["step"], **(row.get("memory") or {})} for row in rows], key)


def _curves(rows: Rows) -> dict[str, list[tuple[float, float]]]:
    named = {"training": "loss", "validation": "val_loss"}
    curves = {n: [(row["step"], row[k]) for row in rows if isinstance(row.get(k), float)] for n, k in named.items()}
    return {name: points for name, points in curves.items() if points}


def _has_no_gpu(manifest: dict[str, Any]) -> bool:
    return (manifest.get("hardware") or {}).get("device") == "cpu"


def _pairs(values: Any) -> str:
    return (
        ", ".join(f"{key} {value}" for key, value in values.items()) if isinstance(values, dict) and values else MISSING
    )


def _count(number: Any, noun: str) -> str:
    return f"{MISSING} {noun}s" if number is None else f"{number} {noun}{'' if number == 1 else 's'}"


def _table(headers: Sequence[str], lines: Sequence[Sequence[Any]]) -> list[str]:
    """A Markdown table; the first column to the left, figures to the right."""
    numeric = len(headers) > 2
    rule = ["---", *("--:" if numeric else "---" for _ in headers[1:])]
    return [_row(cells) for cells in (headers, rule, *lines)]


def _row(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
