#!/usr/bin/env python3
"""The tables of docs/paper.md, each beside the paper's own numbers, and its picture. Nothing else knows both.

    python experiments/paper_page.py docs/benchmarks/2026-11-23-paper.json docs/paper.md

Reads what `run_grid.py collect` wrote. Writes each table between its two marks in the page, `<!-- made: NAME -->` and
`<!-- end -->`, and the picture beside the record. Scores are in points (hundredths), spreads are standard deviations
over seeds, intervals 95% of paired differences (the same seed on both sides).
"""

import argparse
import json
import math
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import run_grid

from lora_scale.storage.durable import write_text_atomically

TASKS = {"synopsis": ("rouge_l", "ROUGE-L"), "sentiment": ("accuracy", "accuracy")}
Seeds = dict[str, dict[str, Any]]  # "seed0" -> record

# arXiv 2106.09685, Table 4 (GPT-3 175B): parameters in millions; WikiSQL, MNLI-m, ROUGE-L on SAMSum
METHODS = {
    "full": "175,256M: 73.8, 89.5, 44.5",
    "bitfit": "14.2M: 71.3, 91.0, 43.5",
    "preembed": "3.2M: 63.1, 88.6, 40.5",
    "prelayer": "20.2M: 70.1, 89.5, 43.5",
    "adapter-l": "-",
    "adapter-h": "7.1M: 71.9, 89.8, 44.8; 40.1M: 73.2, 91.5, 45.1",
    "lora": "4.7M (r = 1): 73.4, 91.7, 45.9; 37.7M (r = 8): 74.0, 91.6, 45.1",
    "lora-all": "-",
}
# Table 6 (GPT-3, W_q and W_v): WikiSQL, MNLI-m
RANKS = {"r1": "73.4, 91.3", "r2": "73.3, 91.3", "r4": "73.7, 91.4", "r8": "73.8, 91.6", "r64": "73.5, 91.4"}
# Table 5 (GPT-3, 18M parameters): WikiSQL, MNLI-m
MATRICES = {
    "q": "70.4, 91.0",
    "k": "70.0, 90.8",
    "v": "73.0, 91.0",
    "o": "73.2, 91.3",
    "qk": "71.4, 91.3",
    "qv": "73.7, 91.3",
    "qkvo": "73.7, 91.7",
}
# Table 16 (GPT-3): MNLI with 100, 1,000, 10,000 and all 392,000 rows
LOW_DATA = {
    "full": "60.2, 85.8, 88.9, 89.5",
    "preembed": "37.6, 75.2, 79.5, 88.6",
    "prelayer": "48.3, 82.5, 85.9, 89.6",
    "lora": "63.8, 85.6, 89.2, 91.7",
}
# Table 1 (GPT-2 medium): ms at (batch, tokens)
LATENCY = {
    "base or merged LoRA": {(1, 128): 19.8, (16, 256): 338.0},
    "base": {(1, 128): 19.8, (16, 256): 338.0},
    "merged LoRA": {(1, 128): 19.8, (16, 256): 338.0},
    "adapter-l": {(1, 128): 23.9, (16, 256): 354.8},
    "adapter-h": {(1, 128): 25.8, (16, 256): 366.3},
}

# cells that are another once more: the second's config and seed, trained anew
AGAIN = {
    **{f"again/{task}/{name}/seed0": f"methods/{task}/{name}/seed0" for task in TASKS for name in ("full", "lora")},
    **{f"kept/synopsis/r8/seed{seed}": f"methods/synopsis/lora/seed{seed}" for seed in (0, 1)},
    **{f"kept/synopsis/r64/seed{seed}": f"ranks/synopsis/r64/seed{seed}" for seed in (0, 1)},
    **{f"ranks-wide/synopsis/lora-r64/seed{seed}": f"ranks/synopsis/r64/seed{seed}" for seed in (0, 1, 2)},
}

# where a label would lie on another, in the picture: points to the right and up
BESIDE = {"full": (-5, 5), "adapter-h": (-5, 4), "adapter-l": (5, -10), "prelayer": (5, -11), "lora-all": (-5, 4)}


def of(groups: run_grid.Groups, experiment: str, task: str, variant: str) -> Seeds:
    return groups.get(f"{experiment}, {task}", {}).get(variant, {})


def mean(records: Seeds, key: str, scale: float = 100, digits: int = 2) -> str:
    """Mean and spread of what did not fail."""
    values = [scale * record[key] for record in records.values() if key in record]
    if not values:
        return "failed" if records else "not run"
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else " (1 seed)"
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def loss(records: Seeds) -> str:
    return mean(records, "test_nll", 1, 3)


def trained(records: Seeds) -> str:
    """How many parameters."""
    return next((f"{record['trainable']:,}" for record in records.values() if "trainable" in record), "-")


def difference(one: Seeds, other: Seeds, key: str) -> tuple[float, float, float] | None:
    """In points: mean of the paired differences and its interval; None with less than two pairs."""
    seeds = [seed for seed in sorted(one.keys() & other.keys()) if key in one[seed] and key in other[seed]]
    if len(seeds) < 2:
        return None
    center, low, high = run_grid.interval([100 * (one[seed][key] - other[seed][key]) for seed in seeds])
    return center, low, high


def said(found: tuple[float, float, float] | None) -> str:
    return "not run" if found is None else "{:+.2f} ({:+.2f} to {:+.2f})".format(*found)


def methods(groups: run_grid.Groups) -> Iterator[str]:
    """Table 4, each method with the best of five learning rates."""
    head = " | ".join(f"{task}: {name} | minus `full`" for task, (_, name) in TASKS.items())
    yield f"| method | trains | synopsis: loss | {head} | GPT-3: WikiSQL, MNLI, SAMSum |"
    yield "|---|--:|--:|--:|--:|--:|--:|---|"
    for method, theirs in METHODS.items():
        found = {task: of(groups, "wider", task, method) for task in TASKS}
        row = [f"`{method}`", trained(found["synopsis"]), loss(found["synopsis"])]
        for task, (key, _) in TASKS.items():
            full = of(groups, "wider", task, "full")
            row += [mean(found[task], key), said(difference(found[task], full, key)) if method != "full" else ""]
        yield f"| {' | '.join([*row, theirs])} |"


def verdicts(groups: run_grid.Groups) -> Iterator[str]:
    """The declared question of each task; then others."""
    yield "| question | task | margin | difference (95% interval) | answer |"
    yield "|---|---|--:|--:|---|"
    for method in ("lora", "lora-all"):
        for task, (key, _) in TASKS.items():
            full, margin = of(groups, "wider", task, "full"), 100 * run_grid.MARGINS[key]
            found = difference(of(groups, "wider", task, method), full, key)
            yield (
                f"| `{method}` not worse than `full`? | {task} | {margin:g} | {said(found)} | {judged(found, margin)} |"
            )
    lora, full, r1, r64 = ("wider", "lora"), ("wider", "full"), ("ranks-wide", "lora-r1"), ("ranks-wide", "lora-r64")
    for one, other in [(("wider", "adapter-h"), lora), (("wider", "bitfit"), lora), (r64, r1), (r64, full)]:
        for task, (key, _) in TASKS.items():
            found = difference(of(groups, one[0], task, one[1]), of(groups, other[0], task, other[1]), key)
            names = " minus ".join(f"`{name.removeprefix('lora-')}`" for _, name in (one, other))
            yield f"| {names} | {task} | | {said(found)} | {signed(found)} |"


def judged(found: tuple[float, float, float] | None, margin: float) -> str:
    """Against the margin of what may be lost."""
    if found is None:
        return ""
    _, low, high = found
    if low > -margin:
        return "yes, shown"
    return "**no: worse by more than the margin**" if high < -margin else f"**not shown**; {signed(found)}"


def signed(found: tuple[float, float, float] | None) -> str:
    if found is None:
        return ""
    _, low, high = found
    return "better" if low > 0 else "worse" if high < 0 else "not told apart"


def ranks(groups: run_grid.Groups) -> Iterator[str]:
    """At the learning rate of r = 8, and where it was run with the best of each rank's own."""
    names = [f"{task}: {name}" for task, (_, name) in TASKS.items()]
    yield (
        f"| r on q, v | trains | synopsis: loss | {' | '.join(names)} | {' | '.join(f'{n}, own rate' for n in names)} "
        "| GPT-3: WikiSQL, MNLI |"
    )
    yield "|--:|--:|--:|--:|--:|--:|--:|---|"
    for rank, theirs in RANKS.items():
        found = {task: of(groups, "ranks", task, rank) for task in TASKS}
        scores = [mean(found[task], key) for task, (key, _) in TASKS.items()]
        for task, (key, _) in TASKS.items():
            own = of(groups, "ranks-wide", task, f"lora-{rank}")
            scores.append(f"{mean(own, key)} at {next(iter(own.values()))['lr']:g}" if own else "")
        yield f"| {' | '.join([rank[1:], trained(found['synopsis']), loss(found['synopsis']), *scores, theirs])} |"


def low_data(groups: run_grid.Groups) -> Iterator[str]:
    """Accuracy on sentiment by the number of training rows."""
    yield "| method | 100 rows | 1,000 rows | 6,000 rows (`methods`) | GPT-3 on MNLI: 100, 1k, 10k, 392k |"
    yield "|---|--:|--:|--:|---|"
    for method, theirs in LOW_DATA.items():
        places = [("low-data", f"{method}-n100"), ("low-data", f"{method}-n1000"), ("methods", method)]
        scores = [mean(of(groups, experiment, "sentiment", name), "accuracy") for experiment, name in places]
        yield f"| `{method}` | {' | '.join([*scores, theirs])} |"


def combined(groups: run_grid.Groups) -> Iterator[str]:
    """LoRA beside vectors, each against LoRA alone; the best of three learning rates for each."""
    head = " | ".join(f"{task}: {name} | minus `lora`" for task, (_, name) in TASKS.items())
    yield f"| method | trains | synopsis: loss | {head} |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for method in ("lora", "lora+preembed", "lora+prelayer"):
        found = {task: of(groups, "methods" if method == "lora" else "combined", task, method) for task in TASKS}
        row = [f"`{method}`", trained(found["synopsis"]), loss(found["synopsis"])]
        for task, (key, _) in TASKS.items():
            alone = of(groups, "methods", task, "lora")
            row += [mean(found[task], key), said(difference(found[task], alone, key)) if method != "lora" else ""]
        yield f"| {' | '.join(row)} |"


def matrices(groups: run_grid.Groups, grid: dict[str, Any]) -> Iterator[str]:
    yield "| adapted | r | synopsis: loss | synopsis: ROUGE-L | sentiment: accuracy | GPT-3: WikiSQL, MNLI |"
    yield "|---|--:|--:|--:|--:|---|"
    for name, theirs in MATRICES.items():
        rank = grid["experiments"]["matrices"]["of"]["lora"][name]["lora.r"]
        found = {task: of(groups, "matrices", task, name) for task in TASKS}
        scores = [mean(found[task], key) for task, (key, _) in TASKS.items()]
        yield f"| {', '.join(name)} | {rank} | {loss(found['synopsis'])} | {' | '.join(scores)} | {theirs} |"


def prompting(groups: run_grid.Groups) -> Iterator[str]:
    yield "| examples in the prompt | synopsis: loss | synopsis: ROUGE-L | sentiment: accuracy |"
    yield "|--:|--:|--:|--:|"
    for variant in groups["prompting, synopsis"]:
        one = {task: of(groups, "prompting", task, variant)["seed0"] for task in TASKS}
        yield (
            f"| {variant[1:]} | {one['synopsis']['test_nll']:.3f} | {100 * one['synopsis']['rouge_l']:.2f} "
            f"| {100 * one['sentiment']['accuracy']:.2f} |"
        )
    best = {task: of(groups, "methods", task, "full") for task in TASKS}
    yield f"| `full` | {loss(best['synopsis'])} | {' | '.join(mean(best[t], k) for t, (k, _) in TASKS.items())} |"


def again(groups: run_grid.Groups) -> Iterator[str]:
    yield "| cell | once more | loss: first | again | score: first | again | difference | spread over seeds |"
    yield "|---|---|--:|--:|--:|--:|--:|--:|"
    for cell, before in AGAIN.items():
        experiment, task, variant, seed = before.split("/")
        seeds, (key, _) = of(groups, experiment, task, variant), TASKS[task]
        place, _, name, _ = cell.split("/")
        first, second = seeds[seed], of(groups, place, task, name)[seed]
        spread = statistics.stdev(100 * record[key] for record in seeds.values())
        scores = [100 * first[key], 100 * second[key]]
        yield (
            f"| {before} | {place} | {first['test_nll']:.4f} | {second['test_nll']:.4f} "
            f"| {scores[0]:.2f} | {scores[1]:.2f} | {scores[1] - scores[0]:+.2f} | {spread:.2f} |"
        )


def rates(groups: run_grid.Groups, grid: dict[str, Any]) -> Iterator[str]:
    """What was chosen of the five values, and for how long each method trained."""
    yield f"| method | {' | '.join(f'{task}: learning rate | of the five | steps' for task in TASKS)} |"
    yield "|---|--:|---|--:|--:|---|--:|"
    for method in METHODS:
        row, values = [f"`{method}`"], sorted(run_grid.rates_of(grid, f"{method}-wide"))
        for task in TASKS:
            seeds = of(groups, "wider", task, method).values()
            (lr,), (steps,) = ({one[key] for one in seeds} for key in ("lr", "steps"))
            place = {0: "**lowest**", 4: "**highest**"}.get(values.index(lr), f"{values.index(lr) + 1}.")
            row += [f"{lr:g}", place, str(steps)]
        yield f"| {' | '.join(row)} |"


def latency(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    settings = [(1, 128), (16, 256)]
    found = {(row["method"], (row["batch"], row["tokens"]), row.get("graph", False)): row for row in rows}
    modes = [False, True] if any(graph for *_, graph in found) else [False]
    told = {False: "ms", True: "CUDA graph, ms"}
    heads = [f"batch {b}, {t} tokens, {' | '.join(told[mode] for mode in modes)}" for b, t in settings]
    yield f"| | {' | '.join(f'{head} | the paper, ms' for head in heads)} |"
    yield f"|---|{'--:|' * (len(settings) * (len(modes) + 1))}"
    base = next(method for method, *_ in found if method.startswith("base"))
    for method, theirs in LATENCY.items():
        if (method, settings[0], False) not in found:
            continue  # called otherwise in this record
        row = []
        for at in settings:
            row += [_timed(found.get((method, at, mode)), found.get((base, at, mode))) for mode in modes]
            more = theirs[at] / LATENCY["base"][at] - 1
            row.append(f"{theirs[at]}{f', {more:+.1%}' if more else ''}")
        yield f"| {method} | {' | '.join(row)} |"


def _timed(one: dict[str, Any] | None, base: dict[str, Any] | None) -> str:
    """Median and quartiles, and how much longer than the base's."""
    if one is None or base is None:
        return "not run"
    (low, high), more = one["quartiles_ms"], one["median_ms"] / base["median_ms"] - 1
    digits = 1 if base["median_ms"] >= 5 else 2
    return f"{one['median_ms']:.{digits}f} ({low:.{digits}f}-{high:.{digits}f}){f', {more:+.1%}' if more else ''}"


def made(record: dict[str, Any]) -> dict[str, str]:
    """Name -> Markdown of every table of the page."""
    grid = record["grid"]
    groups = run_grid.grouped(grid, {one["cell"]: one for one in record["cells"]})
    found = {
        "methods": methods(groups),
        "verdicts": verdicts(groups),
        "rates": rates(groups, grid),
        "ranks": ranks(groups),
        "matrices": matrices(groups, grid),
        "prompting": prompting(groups),
        "latency": latency(record["latency"]),
        "again": again(groups),
        "low_data": low_data(groups),
        "combined": combined(groups),
    }
    return {name: "\n".join(lines) for name, lines in found.items()}


def filled(page: str, tables: dict[str, str]) -> str:
    """The page with its tables as they are made now. KeyError for a table that is not made."""
    marks = re.compile(r"(<!-- made: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
    return marks.sub(lambda found: f"{found[1]}\n{tables[found[2]]}\n{found[3]}", page)


def draw(record: dict[str, Any], to: Path) -> None:
    """Score against trainable parameters, a panel a task: mean and spread over seeds."""
    import matplotlib
    from matplotlib.figure import Figure

    groups = run_grid.grouped(record["grid"], {one["cell"]: one for one in record["cells"]})
    near: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8}
    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    for axes, (task, (key, name)) in zip(figure.subplots(1, 2), TASKS.items(), strict=True):
        points = {method: _point(of(groups, "wider", task, method), key) for method in METHODS}
        line = {rank: _point(of(groups, "ranks", task, rank), key) for rank in RANKS}
        own = [_point(of(groups, "ranks-wide", task, f"lora-{rank}"), key) for rank in ("r1", "r8", "r64")]
        floor = points["preembed"][1] - 2.5
        full = points["full"]
        axes.axhline(full[1], color="#9a9a9a", lw=0.9, ls="--")
        axes.axhspan(full[1] - 100 * run_grid.MARGINS[key], full[1], color="#ececec", lw=0)
        axes.errorbar(*zip(*line.values(), strict=True), color="#3b6ea5", marker="o", ms=4, capsize=2, lw=1.4)
        own = [point for point in own if point[1] > floor]
        axes.errorbar(*zip(*own, strict=True), color="#3b6ea5", marker="o", ms=4, mfc="white", capsize=2, lw=1, ls=":")
        for rank, (x, y, _) in line.items():
            beside: dict[str, Any] = {"xytext": (5, -4)} if rank == "r64" else {"xytext": (-4, 3), "ha": "right"}
            axes.annotate(rank[1:], (x, y), color="#3b6ea5", **beside, **near)
        axes.annotate("LoRA on q, v, by r", (8e6, line["r4"][1]), color="#3b6ea5", ha="center", fontsize=8)
        axes.annotate("margin", (1.1e4, full[1] - 100 * run_grid.MARGINS[key]), (0, 3), color="#9a9a9a", **near)
        for method, (x, y, spread) in points.items():
            if method == "lora":
                continue  # r = 8 of the dotted line, with three of its five seeds
            colour = "#d1602b" if method == "lora-all" else "#4d4d4d"
            label, (right, up) = method, BESIDE.get(method, (5, 4))
            if y < floor:
                label, y, spread, up = f"{method}: {y:.1f}, below", floor + 0.25, 0.0, 4
            axes.errorbar(x, y, spread, color=colour, marker="s", ms=4, capsize=2, lw=1)
            axes.annotate(label, (x, y), (right, up), color=colour, ha="left" if right > 0 else "right", **near)
        axes.set(xscale="log", xlabel="trainable parameters", xlim=(1e4, 2.4e8), ylim=(floor, None))
        axes.set_title(f"{task}: {name}, points", loc="left", fontsize=10, fontweight="bold")
        axes.grid(color="#ededed", lw=0.6, which="major")
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.tick_params(labelsize=8)
    settings = {"svg.hashsalt": "paper", "svg.fonttype": "none", "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure.savefig(to, metadata={"Date": None, "Title": "Score against trainable parameters"})


def _point(records: Seeds, key: str) -> tuple[float, float, float]:
    """Parameters, mean and spread."""
    values = [100 * record[key] for record in records.values()]
    assert len(values) > 1 and all(map(math.isfinite, values))
    return next(iter(records.values()))["trainable"], statistics.fmean(values), statistics.stdev(values)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", type=Path)
    parser.add_argument("page", type=Path)
    args = parser.parse_args()
    record = json.loads(args.record.read_text(encoding="utf-8"))
    write_text_atomically(args.page, filled(args.page.read_text(encoding="utf-8"), made(record)))
    draw(record, args.record.with_suffix(".svg"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
