#!/usr/bin/env python3
"""The declared grid of experiments (grid.yaml): its cells, a queue that can be left and taken up, and the tables.

Knows cells and records; training is `lora-scale train`'s, scoring `score_run.py`'s, each a process of its own.

    python experiments/run_grid.py list [PATTERN]        cells, and where each stands
    python experiments/run_grid.py run [PATTERN] --jobs 4 --minutes 9
    python experiments/run_grid.py rerun CELL            once more beside its record, and both compared
    python experiments/run_grid.py tables                means, spreads and intervals, from records alone

A cell is trained, scored, and written down as one JSON file, which is whole or not there. When the minutes are over
training is asked to stop (SIGTERM): it saves, and the next call goes on from there.
"""

import argparse
import fnmatch
import json
import math
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from ruamel.yaml import YAML

from lora_scale.storage import provenance
from lora_scale.storage.durable import write_text_atomically

HERE = Path(__file__).parent
INTERRUPTED = 75  # exit code of `lora-scale train` that was asked to stop
ATTEMPTS = 2
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

    @property
    def tunes(self) -> bool:
        return self.name.startswith("tune/")


def read_grid(path: Path = HERE / "grid.yaml") -> dict[str, Any]:
    return YAML(typ="safe").load(path.read_text(encoding="utf-8"))


def cells(grid: dict[str, Any]) -> Iterator[Cell]:
    """Every cell, the learning rates' first; an equal number of values and seeds for every method."""
    pairs = {(task, method) for e in grid["experiments"].values() for task in e["tasks"] for method in e["of"]}
    for task, method in sorted(pairs):
        row = grid["methods"][method]
        for lr in row["lr"]:
            overrides = {**row["keys"], "train.lr": lr, "seed": grid["tuning_seed"]}
            yield Cell(f"tune/{task}/{method}/lr{lr:g}", task, method, overrides)
    for experiment, row in grid["experiments"].items():
        for task in row["tasks"]:
            for method, variants in row["of"].items():
                for variant, changes in variants.items():
                    for seed in grid["seeds"]:
                        overrides = {**grid["methods"][method]["keys"], **changes, "seed": seed}
                        label = variant if variant == method or len(row["of"]) == 1 else f"{method}-{variant}"
                        yield Cell(f"{experiment}/{task}/{label}/seed{seed}", task, method, overrides)
    for task in grid["prompting"]["tasks"]:
        for shots in grid["prompting"]["shots"]:
            yield Cell(f"prompting/{task}/k{shots}/seed0", task, "", {}, shots)


def chosen_lr(grid: dict[str, Any], cell: Cell, out: Path) -> float | None:
    """The method's learning rate with the least validation loss on this task; None while some are not known."""
    found = {}
    for lr in grid["methods"][cell.method]["lr"]:
        record = read_record(out, f"tune/{cell.task}/{cell.method}/lr{lr:g}")
        if record is None:
            return None
        if (loss := record.get("val_loss")) is not None:
            found[lr] = loss
    if not found:
        raise SystemExit(f"run_grid: {cell.name}: every learning rate of {cell.method} failed on {cell.task}")
    return min(found, key=found.__getitem__)


def config_of(grid: dict[str, Any], cell: Cell, run: Path, lr: float | None) -> dict[str, Any]:
    """The run's config, nested; a learning rate is in the cell already where it is being tuned."""
    task = grid["tasks"][cell.task]
    flat = {
        "model": grid["model"],
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


def record_path(out: Path, name: str) -> Path:
    return out / "records" / f"{name.replace('/', '__')}.json"


def read_record(out: Path, name: str) -> dict[str, Any] | None:
    path = record_path(out, name)
    return json.loads(path.read_text()) if path.is_file() else None


class Queue:
    """Works on cells with a few processes at once until the time is up."""

    def __init__(self, grid: dict[str, Any], out: Path, minutes: float, device: str):
        self.grid, self.out, self.device = grid, out, device
        self.deadline = time.monotonic() + 60 * minutes
        self.running: set[subprocess.Popen[bytes]] = set()
        self.lock = threading.Lock()
        self.commit = provenance.commit()

    def work(self, todo: Sequence[Cell], jobs: int) -> None:
        """Tuning first: what depends on it waits for all of it."""
        with ThreadPoolExecutor(jobs) as pool:
            timer = threading.Timer(max(0.0, self.deadline - time.monotonic()), self.stop)
            timer.daemon = True
            timer.start()
            for stage in (True, False):
                for future in [pool.submit(self.finish, cell) for cell in todo if cell.tunes is stage]:
                    future.result()
            timer.cancel()

    def stop(self) -> None:
        with self.lock:
            for process in self.running:
                process.send_signal(signal.SIGTERM)

    def finish(self, cell: Cell) -> None:
        """Train and score one cell; nothing is written when the time was up before."""
        if time.monotonic() > self.deadline or read_record(self.out, cell.name) is not None:
            return
        lr = None
        if cell.method and not cell.tunes and (lr := chosen_lr(self.grid, cell, self.out)) is None:
            return
        for attempt in range(1, ATTEMPTS + 1):
            began = time.monotonic()
            result = self.once(cell, self.out / "runs" / cell.name.replace("/", "__"), lr)
            if result is None:  # interrupted
                return
            if "failed" not in result or attempt == ATTEMPTS:
                break
        record = {"cell": cell.name, "commit": self.commit, "versions": provenance.versions(), "lr": lr, **result}
        record["seconds"] = round(time.monotonic() - began, 1)
        path = record_path(self.out, cell.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps(record, indent=1) + "\n")
        print(f"{cell.name}: {summary(record)}", flush=True)

    def once(self, cell: Cell, run: Path, lr: float | None) -> dict[str, Any] | None:
        """One try: the scores, or what failed; None when it was interrupted."""
        run.mkdir(parents=True, exist_ok=True)
        result, config = run / "score.json", run / "grid.yaml"
        task = json.dumps(self.grid["tasks"][cell.task])
        score = [str(HERE / "score_run.py"), "--task", task, "--out", str(result), "--device", self.device]
        if not cell.method:
            score += ["--base", self.grid["model"], "--shots", str(cell.shots)]
        else:
            with config.open("w") as file:
                YAML().dump(config_of(self.grid, cell, run, lr), file)
            if (code := self.process(["-m", "lora_scale", "train", str(config), "--ranks", "1"], run)) != 0:
                return None if code == INTERRUPTED or self.is_over() else {"failed": f"training, exit code {code}"}
            score += ["--run", str(run)]
            score += ["--no-test"] if cell.tunes else []
        if (code := self.process(score, run)) != 0:
            return None if self.is_over() else {"failed": f"scoring, exit code {code}"}
        return json.loads(result.read_text())

    def is_over(self) -> bool:
        return time.monotonic() > self.deadline

    def process(self, arguments: Sequence[str], run: Path) -> int:
        with (run / "output.txt").open("ab") as log:
            process = subprocess.Popen([sys.executable, *arguments], stdout=log, stderr=subprocess.STDOUT)
            with self.lock:
                self.running.add(process)
            try:
                return process.wait()
            finally:
                with self.lock:
                    self.running.discard(process)


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


def tables(grid: dict[str, Any], out: Path) -> str:
    """Markdown, from records alone; a cell without one is counted as missing."""
    groups: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    missing: dict[str, int] = {}
    for cell in cells(grid):
        experiment, task, variant, seed = cell.name.split("/")
        if cell.tunes:
            continue
        record = read_record(out, cell.name)
        if record is None:
            missing[experiment] = missing.get(experiment, 0) + 1
        else:
            groups.setdefault(f"{experiment}, {task}", {}).setdefault(variant, {})[seed] = record
    lines = []
    for title, variants in groups.items():
        metric = grid["tasks"][title.split(", ")[1]]["metric"]
        lines += [
            f"## {title}",
            "",
            f"| | parameters | test NLL | {metric} | seeds | failed |",
            "|---|--:|--:|--:|--:|--:|",
        ]
        for variant, records in variants.items():
            whole = [record for record in records.values() if "failed" not in record]
            row = [variant, f"{whole[0]['trainable']:,}" if whole else "-"]
            row += [_mean([record[key] for record in whole]) for key in ("test_nll", metric)]
            lines.append(f"| {' | '.join(row)} | {len(whole)} | {len(records) - len(whole)} |")
        lines += ["", *_verdicts(variants, metric), ""]
    lines += (
        [f"Not run: {', '.join(f'{count} cells of {name}' for name, count in missing.items())}."] if missing else []
    )
    return "\n".join(lines) + "\n"


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


def rerun(grid: dict[str, Any], cell: Cell, out: Path, minutes: float, device: str) -> None:
    """One cell anew in a folder of its own, with the learning rate that was chosen; then both scores."""
    again = out / "again"
    for lr in grid["methods"][cell.method]["lr"] if cell.method and not cell.tunes else ():
        name = f"tune/{cell.task}/{cell.method}/lr{lr:g}"
        target = record_path(again, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(record_path(out, name).read_text())
    record_path(again, cell.name).unlink(missing_ok=True)
    shutil.rmtree(again / "runs" / cell.name.replace("/", "__"), ignore_errors=True)
    Queue(grid, again, minutes, device).work([cell], 1)
    for label, folder in (("before", out), ("again", again)):
        record = read_record(folder, cell.name)
        print(f"{label:<7} {summary(record) if record else 'no record'}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=["list", "run", "rerun", "tables"])
    parser.add_argument("pattern", nargs="?", default="*", help="cells by name, * and ? as in file names")
    parser.add_argument("--grid", type=Path, default=HERE / "grid.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"))
    parser.add_argument("--jobs", type=int, default=1, help="cells at once")
    parser.add_argument("--minutes", type=float, default=1e6)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    grid = read_grid(args.grid)
    chosen = [cell for cell in cells(grid) if fnmatch.fnmatchcase(cell.name, args.pattern)]
    if not chosen:
        raise SystemExit(f"run_grid: no cell is called {args.pattern}; see `list`")
    if args.verb == "tables":
        print(tables(grid, args.out), end="")
    elif args.verb == "list":
        for cell in chosen:
            record = read_record(args.out, cell.name)
            print(f"{cell.name:<44} {summary(record) if record else '-'}")
    else:
        commit = provenance.commit()
        if commit is None or "+" in commit:
            raise SystemExit("run_grid: a record names its commit; commit all changes first")
        if args.verb == "run":
            Queue(grid, args.out, args.minutes, args.device).work(chosen, args.jobs)
        elif len(chosen) == 1:
            rerun(grid, chosen[0], args.out, args.minutes, args.device)
        else:
            raise SystemExit(f"run_grid: rerun takes one cell, {args.pattern} names {len(chosen)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
