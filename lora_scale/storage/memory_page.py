"""The report's sections on memory: where it went, predicted beside measured, rank by rank, full fine-tuning beside.

Reads the records of `parallel.memory` and the plan in the manifest. A figure that no record holds is called missing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_scale.spec.wording import CATEGORIES, GIB, JOBS, STATES, binary
from lora_scale.storage import figures
from lora_scale.storage.page import Block, Picture, Text, table

MISSING = "not recorded"
Rows = Sequence[dict[str, Any]]
MEASURED = {  # key of a row's memory: its name here; the largest over the run counts
    "peak_gib": "peak allocated",
    "allocated_gib": "allocated between steps",
    "peak_reserved_gib": "peak reserved by the allocator",
    "reserved_gib": "reserved by the allocator",
    "process_gib": "on the GPU by the driver's count",
    "rss_anon_gib": "host memory, anonymous",
    "rss_peak_gib": "host memory, peak resident",
    "pinned_gib": "host memory, pinned",
}
MOMENTS = {
    "loss": "predicted: at the loss",
    "backward": "predicted: backward, last layer kept",
    "recompute": "predicted: backward, last layer recomputed",
    "step": "predicted: optimizer's step",
}
PASSING = "in passing: activations, gathered, workspaces"


def memory_of(rows: Rows) -> Rows:
    """What each row says of memory, its step beside it."""
    return [{"step": row["step"], **row["memory"]} for row in rows if row.get("memory")]


def largest(rows: Rows, key: str) -> float | None:
    values = [row[key] for row in rows if isinstance(row.get(key), int | float)]
    return max(values) if values else None


def where_it_went(rows: Rows, manifest: Mapping[str, Any]) -> list[Block]:
    """The answer, one step as a picture, and the tables it is made from."""
    plan, measured = manifest.get("plan") or {}, memory_of(rows)
    blocks: list[Block] = [Text(_answer(plan, measured))]
    if bars := _bars(plan, measured):
        peaks = _marks(plan, measured, bars)
        title = "One step, GiB" if peaks else "One step, GiB: plan for GPUs, and what our tensors hold"
        blocks.append(Picture("memory", "Memory over one step by category", figures.stacks(title, "GiB", bars, peaks)))
    blocks += [*_predicted_beside_measured(plan, measured), *_measured(measured, manifest)]
    return blocks


def _answer(plan: Mapping[str, Any], measured: Rows) -> str:
    peak, run = largest(measured, "peak_gib"), plan.get("this_run")
    if not run:
        return f"Computed before the run: {plan.get('unknown', MISSING)}."
    moment = dict(run["moments"][run["peak_moment"]])
    total = run["allocated"] - (moment.pop("libraries") if peak is None else 0)  # those of CUDA
    parts = sorted(((moment.get(key, 0), label) for key, label in CATEGORIES.items()), reverse=True)[:3]
    named = ", ".join(f"{label} {binary(nbytes)}" for nbytes, label in parts if nbytes)
    said = f"The plan puts the fullest moment at {binary(total)} a rank, of which: {named}."
    if peak is None:
        return said
    planned = run["allocated"] / GIB
    error = f"{planned / peak - 1:+.1%}"
    return f"**The first rank's allocator peaked at {peak:.1f} GiB; planned were {planned:.1f} ({error}).** {said}"


def _bars(plan: Mapping[str, Any], measured: Rows) -> dict[str, dict[str, float]]:
    """Predicted moments by category; then what was measured by phase, as far as tensors can be told apart."""
    bars: dict[str, dict[str, float]] = {}
    last = measured[-1] if measured else {}
    for name, moment in (plan.get("this_run") or {}).get("moments", {}).items():
        shown = {key: label for key, label in CATEGORIES.items() if key != "libraries" or last.get("phases")}
        bars[MOMENTS[name]] = {label: moment[key] / GIB for key, label in shown.items()}
    if held := last.get("categories"):
        known = {CATEGORIES.get(key, key): nbytes / GIB for key, nbytes in held.items()}
        for phase, figures_of in (last.get("phases") or {}).items():
            passing = (figures_of["peak"] - last["tracked"]) / GIB
            bars[f"measured: {phase}"] = known | {PASSING: max(0.0, passing)}
        bars["measured: between steps"] = known | {"unexplained": max(0, last.get("unexplained", 0)) / GIB}
    return bars


def _marks(plan: Mapping[str, Any], measured: Rows, bars: Mapping[str, Any]) -> dict[str, float]:
    """The measured peak, on the predicted bar that is the longest."""
    peak, run = largest(measured, "peak_gib"), plan.get("this_run")
    return {MOMENTS[run["peak_moment"]]: peak} if run and peak and MOMENTS[run["peak_moment"]] in bars else {}


def _predicted_beside_measured(plan: Mapping[str, Any], measured: Rows) -> list[Block]:
    run, lines = plan.get("this_run"), []
    if not run or not measured:
        return []
    held = measured[-1].get("categories") or {}
    for key, label in STATES.items():
        if run["model_states"][key] or held.get(key):
            lines.append(_compared(label, run["model_states"][key], held.get(key)))
    peak, reserved = largest(measured, "peak_gib"), largest(measured, "peak_reserved_gib")
    if peak is not None:
        states = run["model_states"]["total"]
        lines.append(_compared("above the states, at the peak", run["allocated"] - states, peak * GIB - states))
        lines.append(_compared("**peak allocated**", run["allocated"], peak * GIB))
    if reserved is not None:
        lines.append(_compared("peak reserved", run["allocated"] + run["waste"], reserved * GIB))
    if peak is not None and (host := largest(measured, "rss_peak_gib")) is not None:
        lines.append(_compared("host memory, peak resident", run["host"], host * GIB))
    note = "The plan is of the rank that holds most; measured is the first rank, after its last step."
    return [table(["a rank", "predicted", "measured", "error"], lines), Text(note)]


def _compared(label: str, predicted: float, measured: float | None) -> list[str]:
    if measured is None:
        return [label, binary(predicted), MISSING, ""]
    error = f"{predicted / measured - 1:+.1%}" if measured else ""
    return [label, binary(predicted), binary(measured), error]


def _measured(measured: Rows, manifest: Mapping[str, Any]) -> list[Block]:
    lines = [
        [label, f"{value:,.2f} GiB"] for key, label in MEASURED.items() if (value := largest(measured, key)) is not None
    ]
    blocks: list[Block] = [table(["the largest over the run, first rank", ""], lines)] if lines else []
    if not lines:
        blocks.append(Text(f"Measured: {MISSING}."))
    if largest(measured, "peak_gib") is None:
        had_none = (manifest.get("hardware") or {}).get("device") == "cpu"
        blocks.append(Text(f"GPU memory: {MISSING}{' (the run had no GPU)' if had_none else ''}."))
    if unexplained := largest(measured, "unexplained"):
        blocks.append(Text(f"Unexplained between steps: {binary(unexplained)} that no tensor of ours accounts for."))
    return blocks


def by_rank(ranks: Mapping[int, Rows]) -> list[Block]:
    """The largest figures of every rank, and how far the ranks lie apart."""
    keys = {"peak_gib": "peak allocated", "peak_reserved_gib": "peak reserved", "rss_peak_gib": "host, peak resident"}
    shown = {
        key: label for key, label in keys.items() if any(largest(rows, key) is not None for rows in ranks.values())
    }
    lines = []
    for rank, rows in ranks.items():
        values = [largest(rows, key) for key in shown]
        tracked = largest(rows, "tracked")
        cells = [MISSING if value is None else f"{value:,.2f} GiB" for value in values]
        lines.append([f"{rank}", *cells, MISSING if tracked is None else binary(tracked)])
    if not lines:
        return [Text(f"Memory by rank: {MISSING}.")]
    spread = []
    for key, label in shown.items():
        found = [value for rows in ranks.values() if (value := largest(rows, key)) is not None]
        spread.append(f"{label} {max(found) - min(found):.2f} GiB")
    text = f"Largest minus smallest over {len(lines)} ranks: {', '.join(spread)}." if len(lines) > 1 else "One rank."
    return [Text(text), table(["rank", *shown.values(), "tracked tensors"], lines)]


def beside_full(plan: Mapping[str, Any]) -> list[Block]:
    """LoRA and full fine-tuning of the same job, both computed."""
    jobs = [name for name in JOBS if name in plan]
    if not jobs:
        return [Text(f"Computed before the run: {plan.get('unknown', MISSING)}.")]
    moments = [plan[job]["moments"][plan[job]["peak_moment"]] for job in jobs]
    lines = []
    for key, label in CATEGORIES.items():
        if any(moment[key] for moment in moments):
            lines.append([label, *(binary(moment[key]) if moment[key] else "" for moment in moments)])
        if key == list(STATES)[-1]:
            lines.append(["**model states, exact**", *(binary(plan[job]["model_states"]["total"]) for job in jobs)])
    lines.append(["**peak allocated**", *(binary(plan[job]["allocated"]) for job in jobs)])
    lines.append(["training checkpoint", *(binary(plan[job]["checkpoint"]) for job in jobs)])
    blocks: list[Block] = [Text("Computed before the run, a rank, at the fullest moment of either:")]
    blocks.append(table(["", *(JOBS[job] for job in jobs)], lines))
    if len(jobs) == 2:
        states, peaks = ([plan[job][key] for job in jobs] for key in ("model_states", "allocated"))
        ratio = states[1]["total"] / states[0]["total"]
        blocks.append(
            Text(
                f"Full fine-tuning takes {ratio:.1f} times the model states, {peaks[1] / peaks[0]:.1f} times the peak."
            )
        )
    return blocks
