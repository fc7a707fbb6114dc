"""What is made of records: lists of runs, gates with what was seen, losses, waterfalls. Computes ratios only."""

from collections.abc import Mapping, Sequence
from typing import Any

from lora_scale.commands.benching.cases import CASES, GATES, MODELS, TINY, WATERFALLS, Case, Condition, Gate
from lora_scale.commands.benching.running import Row, figure, is_ours
from lora_scale.spec.errors import UsageError
from lora_scale.storage import figures

Rows = Mapping[str, Row]
Bars = list[tuple[str, str, float]]  # what changed, case, tokens/s
SHOWN_LOSSES = 4
WORDS = {
    "tokens_per_second": "speed",
    "step_seconds": "step time",
    "peak_gib": "peak memory",
    "tflops_4n": "TFLOP/s",
    "reserved_over_peak": "reserved over peak",
}


def merged(records: Sequence[dict[str, Any]]) -> Rows:
    """The rows by case; of several records with figures of one, the newest count."""
    found: dict[str, Row] = {}
    for row in sorted((row for record in records for row in record["rows"]), key=lambda row: row.get("made", "")):
        if "failed" not in row or row["name"] not in found or "failed" in found[row["name"]]:
            found[row["name"]] = row
    return found


def listing(cases: Mapping[str, Case]) -> str:
    """A line a case, in the order in which they are run."""
    return "\n".join(
        f"{name:36} {case.model:13} {case.gpus} GPU{'s' if case.gpus > 1 else ' '}  {case.who:12} "
        f"{' '.join(case.settings)}{f'  ({case.note})' if case.note else ''}"
        for name, case in cases.items()
    )


def in_short(row: Row) -> str:
    """For the screen, when a case is over."""
    if "failed" in row:
        return f"{row['failed']}{''.join(f'; {line}' for line in row.get('said', [])[-1:])}"
    peak = f", {row['peak_gib']:.1f} GiB" if row["peak_gib"] else ""
    return (
        f"{row['tokens_per_second']:,.0f} tokens/s, {row['tflops_4n']:.0f} TFLOP/s a GPU{peak}, "
        f"{row['seconds_in_all']:.0f} s in all"
    )


def markdown(records: Sequence[dict[str, Any]]) -> str:
    """Gates, runs and losses of the rows of all records together."""
    rows = merged(records)
    return "\n\n".join(part for part in (gates(rows), runs(rows), losses(rows)) if part)


def runs(rows: Rows) -> str:
    lines = [
        "| run | who | model | GPUs | tokens/s | TFLOP/s a GPU (4N) | step, s (quartiles) | peak / reserved GiB "
        "| load s |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    models, names = list(MODELS), [*CASES, *TINY, *rows]
    for row in sorted(rows.values(), key=lambda row: (models.index(row["model"]), names.index(row["name"]))):
        start = f"| {row['name']} | {row.get('peer', row['who'])} | {row['model']} | {row['ranks']} "
        if "failed" in row:
            lines.append(f"{start}| {row['failed']} | | | | |")
            continue
        memory = f"{row['peak_gib']:.1f} / {row['reserved_gib']:.1f}" if row["peak_gib"] else "-"
        step = row["step_seconds"]
        low, high = step["quartiles"]
        lines.append(
            f"{start}| {row['tokens_per_second']:,.0f} | {row['tflops_4n']:.0f} "
            f"| {step['median']:.3f} ({low:.3f}-{high:.3f}) | {memory} | {row['load_seconds']:.1f} |"
        )
    return "\n".join(lines)


def gates(rows: Rows) -> str:
    """Only gates of which something was run; empty where there are none."""
    lines = ["| point | gate | goal | seen | met |", "|--:|---|--:|--:|---|"]
    for gate in GATES:
        ways = [[(condition, seen(condition, rows)) for condition in way] for way in gate.ways]
        if not any(name in rows for name in _cases(gate)):
            continue
        goal = " or ".join(_all(_goal(condition, len(way) > 1) for condition, _ in way) for way in ways)
        found = dict.fromkeys(_figure(condition, value, len(way) > 1) for way in ways for condition, value in way)
        shown = f"{', '.join(found)}{_left_out(gate, rows)}"
        lines.append(f"| {gate.point} | {gate.says} | {goal} | {shown} | {_verdict(ways)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def seen(condition: Condition, rows: Rows) -> float | None:
    """The figure, or its ratio to the best peer's; None where it was not measured. Of peers the fastest counts, and
    its other figures with it."""
    ours = _figure_of(rows, condition.ours, condition.figure)
    if ours is None or not condition.peers:
        return ours
    there = [name for name in condition.peers if _figure_of(rows, name, condition.figure) is not None]
    if not there:
        return None
    best = max(there, key=lambda name: _figure_of(rows, name, "tokens_per_second") or 0.0)
    return ours / (_figure_of(rows, best, condition.figure) or 1.0)


def _figure_of(rows: Rows, name: str, what: str) -> float | None:
    return figure(rows[name], what) if name in rows else None


def _left_out(gate: Gate, rows: Rows) -> str:
    """Says where a best peer is the best of some only; one that was run and failed is not left out."""
    peers = gate.ways[0][0].peers
    run = [name for name in peers if name in rows]
    return f" ({len(run)} of {len(peers)} peers run)" if 0 < len(run) < len(peers) else ""


def _cases(gate: Gate) -> set[str]:
    return {name for way in gate.ways for condition in way for name in (condition.ours, *condition.peers)}


def _verdict(ways: list[list[tuple[Condition, float | None]]]) -> str:
    if any(condition.goal is None for way in ways for condition, _ in way):
        return "no goal"
    if any(all(value is not None and _holds(condition, value) for condition, value in way) for way in ways):
        return "yes"
    return "not measured" if any(value is None for way in ways for _, value in way) else "**no**"


def _holds(condition: Condition, value: float) -> bool:
    assert condition.goal is not None
    return value >= condition.goal if condition.at_least else value <= condition.goal


def _goal(condition: Condition, named: bool) -> str:
    name = f"{WORDS[condition.figure]} " if named else ""
    if condition.goal is None:
        return "-"
    return f"{name}{'>=' if condition.at_least else '<='} {_number(condition, condition.goal)}"


def _figure(condition: Condition, value: float | None, named: bool) -> str:
    name = f"{WORDS[condition.figure]} " if named else ""
    return f"{name}{'-' if value is None else _number(condition, value)}"


def _number(condition: Condition, value: float) -> str:
    if condition.peers:
        return f"{value:.2f}x"
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def _all(words: Any) -> str:
    return " and ".join(words)


def losses(rows: Rows) -> str:
    """First losses of runs on the same weights and the same tokens: both sides of a comparison compute the same model.
    Before the first optimizer step an adapter adds nothing, so the first is the base's own."""
    lines = []
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows.values():
        if "failed" not in row:
            groups.setdefault((row["model"], row["tokens_a_step"], row["method"]), []).append(row)
    for (model, tokens, method), members in groups.items():
        if not any(is_ours(row) for row in members) or all(is_ours(row) for row in members):
            continue
        peers = [row["losses"] for row in members if not is_ours(row)]
        for row in members:
            off = max(abs(row["losses"][i] - sum(p[i] for p in peers) / len(peers)) for i in range(SHOWN_LOSSES))
            shown = " ".join(f"{loss:.4f}" for loss in row["losses"][:SHOWN_LOSSES])
            lines.append(f"| {row['name']} | {model} | {tokens:,} | {method} | {shown} | {off:.4f} |")
    head = [
        "| run | model | tokens a step | method | first losses | largest difference from the mean of the peers |",
        "|---|---|--:|---|---|--:|",
    ]
    return "\n".join([*head, *lines]) if lines else ""


def waterfall(records: Sequence[dict[str, Any]], chart: str) -> Bars:
    """The bars of a chart, from the peer's to ours. A change that was not measured alone is named by the next bar."""
    if chart not in WATERFALLS:
        raise UsageError(f"--chart is {chart}; choose {', '.join(WATERFALLS)}")
    rows, measured, skipped = merged(records), Bars(), list[str]()
    for label, place in WATERFALLS[chart]:
        name, _, commit = place.partition("@")
        there = _at_commit(records, commit) if commit else rows
        if (speed := _figure_of(there, name, "tokens_per_second")) is None:
            skipped.append(label)
        else:
            measured.append((" + ".join([*skipped, label]), name, speed))
            skipped = []
    if len(measured) < 2:
        wanted = ", ".join(name for _, name in WATERFALLS[chart])
        raise UsageError(f"--chart {chart}: a waterfall needs figures of at least two of {wanted}")
    return measured


def _at_commit(records: Sequence[dict[str, Any]], commit: str) -> Rows:
    """The rows of one commit: of code that is gone."""
    of = [{"rows": [row for row in record["rows"] if row.get("commit", "").startswith(commit)]} for record in records]
    return merged(of)


def waterfall_table(bars: Bars) -> str:
    lines = ["| change | run | tokens/s | of the one before | of the first |", "|---|---|--:|--:|--:|"]
    before = first = bars[0][2]
    for label, name, speed in bars:
        lines.append(f"| {label} | {name} | {speed:,.0f} | {speed / before:.2f}x | {speed / first:.2f}x |")
        before = speed
    return "\n".join(lines)


def drawn(chart: str, bars: Bars) -> str:
    return figures.waterfall(
        f"From the peer to ours ({chart}): {bars[-1][2] / bars[0][2]:.2f}x", "tokens/s", [(b[0], b[2]) for b in bars]
    )
