#!/usr/bin/env python3
"""The declared grid of experiments (grid.yaml): its cells, a queue that can be left and taken up, and the tables.

Knows cells and records; training and scoring are `grid_worker.py`'s, of which several work on the queue at once.

    python experiments/run_grid.py list [PATTERN]        cells, and where each stands
    python experiments/run_grid.py run [PATTERN...] --jobs 8 --minutes 9    several patterns: in this order
        --gpus 2                                         workers take turns on the GPUs
    python experiments/run_grid.py rerun CELL            once more beside its record, and both compared
        --record docs/benchmarks/NAME.json               the record, where --out has none
    python experiments/run_grid.py tables                means, spreads and intervals, from records alone
    python experiments/run_grid.py collect --out runs/paper docs/benchmarks/NAME.json    all records as one

A worker imports and starts once, then does cell after cell: it trains one by what `lora-scale train` runs, scores it as
it stands in memory, and writes it down as one JSON file, which is whole or not there. Learning rates come first; a cell
that needs one waits until all values of its method on its task are known. When the minutes are over workers are asked
to stop (SIGTERM): a run under way saves, and the next call goes on from there; a GPU machine that is taken away loses
at most a cell a worker.
"""

import argparse
import fnmatch
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from ruamel.yaml import YAML

from lora_scale.storage import provenance
from lora_scale.storage.durable import write_text_atomically

HERE = Path(__file__).parent
ATTEMPTS = 2
RESTARTS = 20  # workers that may take the place of one that a fault ended
LATENCY = "latency.jsonl"  # in the folder of records: the lines of experiments/latency.py
GRACE = 20.0  # seconds to finish a step and save it, once asked to stop
T_95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}  # two-sided, by df
MARGINS = {"rouge_l": 0.005, "accuracy": 0.01}  # by how much LoRA may be worse than full fine-tuning


@dataclass(frozen=True)
class Cell:
    """One training run and its score, or one prompting of the base."""

    name: str  # experiment/task/variant/seed
    task: str
    method: str  # whose learning rate it has; "" for prompting
    overrides: dict[str, Any]
    shots: int = 0
    same: str = ""  # the cell that is this one where both have one learning rate

    @property
    def tunes(self) -> bool:
        return self.name.startswith("tune/")


def read_grid(path: Path = HERE / "grid.yaml") -> dict[str, Any]:
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))


def cells(grid: dict[str, Any]) -> Iterator[Cell]:
    """Every cell, in the order of work: learning rates first, with as many values and rows for every method."""
    pairs = [(task, method) for e in grid["experiments"].values() for task in e["tasks"] for method in e["of"]]
    tried = {(task, like_of(grid, method), lr): None for task, method in pairs for lr in rates_of(grid, method)}
    for task, method, lr in tried:
        overrides = {**keys_of(grid, method), "train.lr": lr, "seed": grid["tuning_seed"]}
        overrides["data.max_rows"] = grid["tasks"][task]["tuning_rows"]
        yield Cell(f"tune/{task}/{method}/lr{lr:g}", task, method, overrides)
    for experiment, row in grid["experiments"].items():
        if experiment == grid["prompting"].get("before"):
            yield from _prompted(grid)
        yield from _trained(grid, experiment, row)
    if "before" not in grid["prompting"]:
        yield from _prompted(grid)


def like_of(grid: dict[str, Any], method: str) -> str:
    """The method itself, or the one that it searches further."""
    return grid["methods"][method].get("like", method)


def keys_of(grid: dict[str, Any], method: str) -> dict[str, Any]:
    return grid["methods"][like_of(grid, method)]["keys"]


def rates_of(grid: dict[str, Any], method: str) -> list[float]:
    """The learning rates among which the method's is chosen."""
    return [*grid["methods"][like_of(grid, method)]["lr"], *grid["methods"][method].get("more", [])]


def _trained(grid: dict[str, Any], experiment: str, row: dict[str, Any]) -> Iterator[Cell]:
    for task in row["tasks"]:
        for method, variants in row["of"].items():
            for variant, changes in variants.items():
                alone = variant == like_of(grid, method) or len(row["of"]) == 1
                label = variant if alone else f"{method}-{variant}"
                for seed in row.get("seeds", grid["seeds"]):
                    overrides = {**keys_of(grid, method), **changes, "seed": seed}
                    same = row.get("same", "").format(task=task, variant=variant, seed=seed)
                    yield Cell(f"{experiment}/{task}/{label}/seed{seed}", task, method, overrides, same=same)


def _prompted(grid: dict[str, Any]) -> Iterator[Cell]:
    for task in grid["prompting"]["tasks"]:
        for shots in grid["prompting"]["shots"]:
            yield Cell(f"prompting/{task}/k{shots}/seed0", task, "", {}, shots)


def _tuning(grid: dict[str, Any], cell: Cell) -> dict[float, str]:
    """Learning rate -> the cell that tries it."""
    place = f"tune/{cell.task}/{like_of(grid, cell.method)}"
    return {lr: f"{place}/lr{lr:g}" for lr in rates_of(grid, cell.method)}


def is_ready(grid: dict[str, Any], cell: Cell, out: Path) -> bool:
    """Whether all that the cell needs to know is known."""
    if cell.tunes or not cell.method:
        return True
    return all(record_path(out, name).is_file() for name in _tuning(grid, cell).values())


def chosen_lr(grid: dict[str, Any], cell: Cell, out: Path) -> float:
    """The method's learning rate with the least validation loss on this task."""
    found = {}
    for lr, name in _tuning(grid, cell).items():
        record = read_record(out, name)
        assert record is not None, f"{cell.name} before {name}"
        if (loss := record.get("val_loss")) is not None:
            found[lr] = loss
    if not found:
        raise LookupError(f"every learning rate of {cell.method} failed on {cell.task}")
    return min(found, key=found.__getitem__)


def config_of(grid: dict[str, Any], cell: Cell, run: Path, lr: float | None) -> dict[str, Any]:
    """The run's config, nested; a learning rate is in the cell already where it is being tuned."""
    task = grid["tasks"][cell.task]
    flat = {
        "model.path": grid["model"],
        "data.train": f"{task['data']}/train.jsonl",
        "data.validation": f"{task['data']}/val.jsonl",
        "data.max_rows": task["rows"],
        "data.seq_len": task["seq_len"],
        "run_dir": str(run),
        **grid["common"],
        **({} if lr is None else {"train.lr": lr}),
        **cell.overrides,
    }
    tree: dict[str, Any] = {}
    for dotted, value in flat.items():
        *parents, leaf = dotted.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def file_name(cell: str) -> str:
    return cell.replace("/", "__")


def record_path(out: Path, name: str) -> Path:
    return out / "records" / f"{file_name(name)}.json"


def read_record(out: Path, name: str) -> dict[str, Any] | None:
    path = record_path(out, name)
    return json.loads(path.read_text()) if path.is_file() else None


def write_record(out: Path, name: str, record: dict[str, Any]) -> None:
    path = record_path(out, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, json.dumps(record, indent=1) + "\n")


def select(grid: dict[str, Any], patterns: Sequence[str]) -> list[Cell]:
    """The cells that a pattern names, each once, in the order of the patterns."""
    found = {c.name: c for pattern in patterns for c in cells(grid) if fnmatch.fnmatchcase(c.name, pattern)}
    return list(found.values())


def on_gpu(taken: Sequence[str], visible: Sequence[str]) -> dict[str, str]:
    """What makes a worker see only the GPU that has the fewest of those that run; of one GPU nothing is said."""
    return {"CUDA_VISIBLE_DEVICES": min(visible, key=list(taken).count)} if len(visible) > 1 else {}


def visible_gpus(count: int, env: Mapping[str, str] = os.environ) -> list[str]:
    """The names of the first `count` GPUs."""
    names = [name for name in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] or list(map(str, range(count)))
    if len(names) < count:
        raise SystemExit(f"run_grid: --gpus {count}, and CUDA_VISIBLE_DEVICES names {len(names)}")
    return names[:count]


def run_workers(
    grid: Path, patterns: Sequence[str], out: Path, jobs: int, minutes: float, gpus: Sequence[str] = ()
) -> None:
    """Keep `jobs` workers at the queue until it is empty or the time is up; tells each record as it comes."""
    deadline = time.monotonic() + 60 * minutes
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(HERE / "grid_worker.py"), "--grid", str(grid), "--out", str(out), *patterns]
    told = {path.name for path in (out / "records").glob("*.json")}
    running: dict[subprocess.Popen[bytes], str] = {}  # and the GPU of each
    left, starts = jobs, jobs + RESTARTS
    try:
        while time.monotonic() < deadline and (left or running):
            while len(running) < left and starts:
                log = (out / f"worker-{jobs + RESTARTS - starts:03d}.txt").open("ab")
                given = on_gpu(list(running.values()), gpus)
                process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **given})
                running[process] = given.get("CUDA_VISIBLE_DEVICES", "")
                log.close()
                starts -= 1
            time.sleep(0.5)
            _tell(out, told)
            ended = [process for process in running if process.poll() is not None]
            running = {process: gpu for process, gpu in running.items() if process not in ended}
            if ended and (not starts or any(process.returncode == 0 for process in ended)):
                left = len(running)  # nothing is left to begin; the others finish what they are at
    finally:
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    _tell(out, told)


def _tell(out: Path, told: set[str]) -> None:
    for path in sorted((out / "records").glob("*.json")):
        if path.name not in told:
            told.add(path.name)
            record = json.loads(path.read_text())
            print(f"{record['cell']}: {summary(record)}, {record['seconds']} s", flush=True)


def summary(record: dict[str, Any]) -> str:
    if "failed" in record:
        return f"failed: {record['failed']}"
    figures = {k: v for k, v in record.items() if k in ("val_loss", "test_nll", "rouge_l", "exact_match", "accuracy")}
    return ", ".join(f"{key} {value:.4f}" for key, value in figures.items() if value is not None)


def interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences with its 95% interval (Student's t; the pairs share a seed)."""
    mean, n = statistics.fmean(differences), len(differences)
    half = T_95[n - 1] * statistics.stdev(differences) / math.sqrt(n)
    return mean, mean - half, mean + half


def read_records(grid: dict[str, Any], out: Path) -> dict[str, dict[str, Any]]:
    """Cell -> record, of those that have one."""
    found = {cell.name: read_record(out, cell.name) for cell in cells(grid)}
    return {name: record for name, record in found.items() if record is not None}


Groups = dict[str, dict[str, dict[str, dict[str, Any]]]]  # "experiment, task" -> variant -> "seed0" -> record


def grouped(grid: dict[str, Any], records: dict[str, dict[str, Any]]) -> Groups:
    """What has a record, but for learning rates; with what one experiment takes from another."""
    groups: Groups = {}
    for cell in cells(grid):
        if cell.name in records and not cell.tunes:
            experiment, task, variant, seed = cell.name.split("/")
            groups.setdefault(f"{experiment}, {task}", {}).setdefault(variant, {})[seed] = records[cell.name]
    for experiment, row in grid["experiments"].items():
        for variant, place in row.get("also", {}).items():  # what another experiment has run already
            for title, variants in groups.items():
                if title.startswith(f"{experiment}, "):
                    names = {f"seed{seed}": place.format(task=title.split(", ")[1], seed=seed) for seed in row["seeds"]}
                    if found := {seed: records[name] for seed, name in names.items() if name in records}:
                        variants[variant] = found
    return groups


def tables(grid: dict[str, Any], records: dict[str, dict[str, Any]]) -> str:
    """Markdown, from records alone; a cell without one is counted as missing."""
    missing = Counter(cell.name.split("/")[0] for cell in cells(grid) if cell.name not in records)
    lines = []
    for title, variants in grouped(grid, records).items():
        metric = grid["tasks"][title.split(", ")[1]]["metric"]
        lines += [f"### {title}", "", *_table(variants, metric), "", *_verdicts(variants, metric)]
    lines += _chosen(grid, records)
    if missing:
        lines.append(f"Not run: {', '.join(f'{count} cells of {name}' for name, count in missing.items())}.")
    return "\n".join(lines) + "\n"


def _table(variants: dict[str, dict[str, dict[str, Any]]], metric: str) -> Iterator[str]:
    extra = ["exact_match"] if metric == "rouge_l" else []
    yield f"| | parameters | learning rate | test NLL | {' | '.join([metric, *extra])} | seeds | failed |"
    yield f"|---|--:|--:|--:|{'--:|' * (1 + len(extra))}--:|--:|"
    for variant, records in variants.items():
        whole = [record for record in records.values() if "failed" not in record]
        row = [variant, f"{whole[0]['trainable']:,}" if whole else "-"]
        row.append(f"{whole[0]['lr']:g}" if whole and whole[0].get("lr") else "-")
        row += [_mean([record[key] for record in whole]) for key in ("test_nll", metric, *extra)]
        yield f"| {' | '.join(row)} | {len(whole)} | {len(records) - len(whole)} |"


def _chosen(grid: dict[str, Any], records: dict[str, dict[str, Any]]) -> Iterator[str]:
    """The validation losses by which learning rates were chosen."""
    pairs = {(cell.task, cell.method) for cell in cells(grid) if cell.tunes and cell.name in records}
    if not pairs:
        return
    tried = {pair: [c for c in cells(grid) if c.tunes and (c.task, c.method) == pair] for pair in sorted(pairs)}
    most = max(map(len, tried.values()))
    yield from ("### learning rates, by validation loss", "", f"|{' |' * (1 + most)}", f"|---|{'--:|' * most}")
    for (task, method), each in tried.items():
        found = sorted((cell.overrides["train.lr"], records.get(cell.name, {}).get("val_loss")) for cell in each)
        losses = [f"{lr:g}: {loss:.4f}" if loss else f"{lr:g}: -" for lr, loss in found] + [""] * (most - len(each))
        yield f"| {task}, {method} | {' | '.join(losses)} |"
    yield ""


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.fmean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")


def _verdicts(variants: dict[str, dict[str, dict[str, Any]]], metric: str) -> Iterator[str]:
    """LoRA against full fine-tuning, seed by seed, and whether it is not worse by more than the margin."""
    for name in ("lora", "lora-all"):
        one, full = variants.get(name, {}), variants.get("full", {})
        seeds = [s for s in one if s in full and "failed" not in one[s] and "failed" not in full[s]]
        if len(seeds) < 2:
            continue
        mean, low, high = interval([one[seed][metric] - full[seed][metric] for seed in seeds])
        verdict = "shown" if low > -MARGINS[metric] else "not shown"
        yield (
            f"{name} minus full: {mean:+.4f}, 95% interval {low:+.4f} to {high:+.4f} over {len(seeds)} seeds; not "
            f"worse by more than {MARGINS[metric]}: {verdict}.\n"
        )


def rerun(grid: Path, cell: Cell, out: Path, minutes: float) -> None:
    """One cell anew in a folder of its own, with the learning rates that were found; then both scores."""
    again = out / "again"
    for name in _tuning(read_grid(grid), cell).values() if cell.method and not cell.tunes else ():
        if (record := read_record(out, name)) is None:
            raise SystemExit(f"run_grid: {cell.name} needs {name}, of which {out} has no record; name one by --record")
        write_record(again, name, record)
    for name in filter(None, (cell.name, cell.same)):  # without the second the cell is trained
        record_path(again, name).unlink(missing_ok=True)
    shutil.rmtree(again / "runs" / file_name(cell.name), ignore_errors=True)
    run_workers(grid, [cell.name], again, 1, minutes)
    for label, folder in (("before", out), ("again", again)):
        record = read_record(folder, cell.name)
        print(f"{label:<7} {summary(record) if record else 'no record'}")


def collect(grid: dict[str, Any], out: Path, to: Path) -> None:
    """All records as one, for docs/benchmarks; what all share is said once."""
    records = read_records(grid, out)
    if not records:
        raise SystemExit(f"run_grid: {out} has no records")
    first = next(iter(records.values()))
    shared = {key: first[key] for key in ("commit", "versions", "device")}
    rows = [{key: value for key, value in one.items() if shared.get(key) != value} for one in records.values()]
    made = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"kind": "paper", "title": "The paper's experiments on real data", "made": made, **shared}
    if (timed := out / LATENCY).is_file():
        record["latency"] = [json.loads(line) for line in timed.read_text().splitlines()]
    text = json.dumps({**record, "grid": grid, "cells": "CELLS"}, indent=1)
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)  # a line a cell
    write_text_atomically(to, text.replace('"CELLS"', f"[\n{lines}\n ]") + "\n")


def spread(record: dict[str, Any], out: Path) -> None:
    """What `collect` put together, as the records it came from, where there are none."""
    shared = {key: record[key] for key in ("commit", "versions", "device")}
    for row in record["cells"]:
        if read_record(out, row["cell"]) is None:
            write_record(out, row["cell"], {**shared, **row})


def tables_of(record: dict[str, Any]) -> str:
    """The tables of what `collect` wrote."""
    page = tables(record["grid"], {one["cell"]: one for one in record["cells"]})
    return page + "".join(f"{line}\n" for line in _latency(record.get("latency", [])))


def _latency(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What experiments/latency.py printed: milliseconds of a forward pass, and how much longer than without."""
    if not rows:
        return
    places = [(row["batch"], row["tokens"], row.get("graph", False)) for row in rows]
    settings = list(dict.fromkeys(places))
    base = {at: row["median_ms"] for at, row in zip(places, rows, strict=True) if row["method"].startswith("base")}
    heads = [f"batch {batch}, {tokens} tokens{', CUDA graph' if graph else ''}" for batch, tokens, graph in settings]
    yield from ("", f"### latency, {rows[0]['shape']}: ms a forward pass, median (quartiles)", "")
    yield f"| | {' | '.join(heads)} |"
    yield f"|---|{'--:|' * len(settings)}"
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {at: row for at, row in zip(places, rows, strict=True) if row["method"] == method}
        texts = [
            f"{one['median_ms']:.2f} ({one['quartiles_ms'][0]:.2f}-{one['quartiles_ms'][1]:.2f}), "
            f"{one['median_ms'] / base[setting] - 1:+.1%}"
            for setting in settings
            if (one := found.get(setting))
        ]
        yield f"| {method} | {' | '.join(texts)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["list", "run", "rerun", "tables", "collect"])
    parser.add_argument("patterns", nargs="*", default=["*"], help="cells by name, * and ? as in file names; a file")
    parser.add_argument("--grid", type=Path, default=HERE / "grid.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"))
    parser.add_argument("--record", type=Path, help="of `collect`: its cells count as done here")
    parser.add_argument("--jobs", type=int, default=1, help="workers at once, on all GPUs together")
    parser.add_argument("--gpus", type=int, default=1, help="the first so many GPUs that are visible, by turns")
    parser.add_argument("--minutes", type=float, default=1e6)
    args = parser.parse_args()
    grid = read_grid(args.grid)
    if args.record is not None:
        spread(json.loads(args.record.read_text()), args.out)
    if args.verb == "collect":
        collect(grid, args.out, Path(args.patterns[0]))
        return 0
    chosen = select(grid, args.patterns)
    if not chosen:
        raise SystemExit(f"run_grid: no cell is called {' or '.join(args.patterns)}; see `list`")
    if args.verb == "tables":
        print(tables(grid, read_records(grid, args.out)), end="")
    elif args.verb == "list":
        for cell in chosen:
            record = read_record(args.out, cell.name)
            print(f"{cell.name:<44} {summary(record) if record else '-'}")
    else:
        commit = provenance.commit()
        if commit is None or "+" in commit:
            raise SystemExit("run_grid: a record names its commit; commit all changes first")
        if args.verb == "run":
            run_workers(args.grid, args.patterns, args.out, args.jobs, args.minutes, visible_gpus(args.gpus))
        elif len(chosen) == 1:
            rerun(args.grid, chosen[0], args.out, args.minutes)
        else:
            raise SystemExit(f"run_grid: rerun takes one cell, {' '.join(args.patterns)} names {len(chosen)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
