#!/usr/bin/env python3
"""Predicted against measured memory over a grid of runs, each through `lora-scale train`; a record, and its table.

    python scripts/memory_grid.py run --work /dev/shm/grid --out docs/benchmarks/NAME.json [--only NAME]... [--tiny]
    python scripts/memory_grid.py collect --out docs/benchmarks/NAME.json [--calibration RUN]... RUN_DIR...
    python scripts/memory_grid.py table docs/benchmarks/NAME.json

`run` writes random checkpoints and rows into --work as it needs them, runs what this machine has GPUs for, one after
the other, and writes the record anew after each: what was cut short is kept. A run that fails is a row that says so.
`collect` makes rows of run directories that are there, planned anew by the code as it is; `planned_then` is what the
run itself predicted.
`--tiny` goes through the same with tiny shapes, on a CPU too, where only states are compared. Rows marked `calibration`
are those that constants in lora_scale/spec/memory.py come from; they do not count as a test of them.
"""

import argparse
import json
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from lora_scale.commands.benching import materials
from lora_scale.spec import cost, named, planning
from lora_scale.spec.config import RunConfig
from lora_scale.spec.memory import CALIBRATED_ON, GIB, Work
from lora_scale.spec.shapes import architecture
from lora_scale.spec.states import grid_of
from lora_scale.storage import provenance
from lora_scale.storage.runlog import read_manifest, read_memory, read_metrics

STEPS = 4  # the first allocates, the others repeat; a peak needs no median


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One run: a preset of make_checkpoint.py, how many of its layers, how many ranks, and changes of the config."""

    preset: str
    layers: int | None = None
    ranks: int = 1
    seq_len: int = 4096
    changes: tuple[str, ...] = ()
    calibration: bool = False


GRID = {
    "1b-none": Case(preset="1b", changes=("recompute=none", "train.micro_batch_size=4", "parallel.zero_stage=0")),
    "1b-all-long": Case(preset="1b", seq_len=8192, changes=("recompute=all", "parallel.zero_stage=0")),
    "1b-full": Case(preset="1b", changes=("method=full", "recompute=all")),
    "1b-full-none": Case(preset="1b", changes=("method=full", "recompute=none")),
    "7b-all": Case(preset="8b", changes=("recompute=all", "train.micro_batch_size=2", "parallel.zero_stage=0")),
    "7b-none": Case(preset="8b", changes=("recompute=none", "train.micro_batch_size=2", "parallel.zero_stage=0")),
    "7b-some-long": Case(preset="8b", seq_len=8192, changes=("recompute=16", "parallel.zero_stage=0")),
    "7b-full": Case(preset="8b", changes=("method=full", "recompute=all")),
    "7b-2gpu-some": Case(preset="8b", ranks=2, changes=("recompute=16", "train.micro_batch_size=2")),
    "7b-2gpu-all-linear": Case(
        preset="8b", ranks=2, changes=("recompute=none", "lora.r=64", "lora.target_modules=[all-linear]")
    ),
    "7b-2gpu-full": Case(preset="8b", ranks=2, changes=("method=full", "recompute=all")),
    "7b-2gpu-full-none": Case(preset="8b", ranks=2, changes=("method=full", "recompute=none")),
    "34b-none": Case(preset="100b", layers=30, changes=("recompute=none",)),
    "34b-2gpu-all": Case(preset="100b", layers=30, ranks=2, changes=("recompute=all",)),
    "34b-2gpu-tp2": Case(
        preset="100b", layers=30, ranks=2, changes=("recompute=none", "parallel.tensor_parallel_size=2")
    ),
    "100b-2gpu-all": Case(preset="100b", ranks=2, changes=("recompute=all",)),
    "100b-2gpu-tp2": Case(
        preset="100b", ranks=2, changes=("recompute=all", "parallel.tensor_parallel_size=2", "parallel.zero_stage=0")
    ),
}
TINY = {
    "tiny-none": Case(preset="tiny", seq_len=64, changes=("recompute=none",)),
    "tiny-2-ranks": Case(preset="tiny", seq_len=64, ranks=2, changes=("recompute=all",)),
}


def measure(name: str, case: Case, work: Path) -> dict[str, Any]:
    """The row of one run: command, planned and measured; or why there is none."""
    run_dir = work / "runs" / name
    micro = next((int(c.partition("=")[2]) for c in case.changes if c.startswith("train.micro_batch_size=")), 1)
    split = next((int(c.partition("=")[2]) for c in case.changes if c.startswith("parallel.tensor")), 1)
    config = work / f"{name}.yaml"
    folder, blocks = materials.checkpoint(case.preset, case.layers, work), micro * case.ranks // split
    train = {"max_steps": STEPS, "global_batch_size": blocks}
    config.write_text(json.dumps(materials.config(folder, case.seq_len, run_dir, work, **train)))
    command = [sys.executable, "-m", "lora_scale", "train", str(config), *case.changes]
    command += ["--ranks", str(case.ranks), "--ignore-plan"]
    done = subprocess.run(command, cwd=materials.ROOT, capture_output=True, text=True, check=False)
    row = {"name": name, "calibration": case.calibration, "ranks": case.ranks, "command": shlex.join(command[1:])}
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-3:]
        return row | {"failed": done.returncode, "said": said}
    return row | _figures(run_dir)


def collected(run_dir: Path, calibration: list[str]) -> dict[str, Any]:
    """The row of a run that was made some time ago. Settings that did not exist then are as they were without them."""
    manifest, resolved = read_manifest(run_dir), json.loads((run_dir / "config.resolved.json").read_text())
    resolved.setdefault("kernels", "none")
    resolved["parallel"].setdefault("base_engine", "deepspeed")
    cfg, ranks = RunConfig.model_validate(resolved), manifest["ranks"]
    total = manifest["parameters"]["total"] - manifest["parameters"]["trainable"] * (cfg.method == "lora")
    models = (architecture(config) for config in named.SHAPES.values())
    model = next(model for model in models if cost.total(model) == total)
    job = planning.job_of(model, cfg, grid_of(model, cfg, ranks, ranks), Work(**manifest["plan"]["assumes"]))
    name = run_dir.name
    row = {"name": name, "calibration": name in calibration, "ranks": ranks, "command": manifest["command"]}
    row |= {"commit": manifest["commit"], "settings": {k: resolved[k] for k in ("method", "recompute", "kernels")}}
    row["settings"] |= {k: resolved["parallel"][k] for k in ("zero_stage", "tensor_parallel_size", "base_engine")}
    then = manifest["plan"]["this_run"]["allocated"]
    return row | _figures(run_dir, planning.plan(job)["this_run"]) | {"planned_then": then}


def _figures(run_dir: Path, run: dict[str, Any] | None = None) -> dict[str, Any]:
    """Bytes of the rank that holds most, planned beside measured."""
    manifest, rows = read_manifest(run_dir), [row for row in read_metrics(run_dir) if "loss" in row]
    run = run or manifest["plan"]["this_run"]
    ranks = [rows_of for rows_of in read_memory(run_dir).values()]
    steps = [row for rows_of in ranks for row in rows_of if "categories" in row and row.get("phase") != "load"]
    planned = {"states": run["model_states"]["total"], "peak": run["allocated"]}
    whole = manifest["hardware"].get("memory_gib", 1 << 20) * GIB - (run["needed"] - run["allocated"])
    planned["reserved"] = round(min(run["allocated"] + run["waste"], whole))  # no more than there is
    measured = {"states": max(row["tracked"] - row["categories"]["gathered"] for row in steps)}
    if "peak_gib" in steps[0]:
        measured |= {"peak": round(GIB * max(row["peak_gib"] for row in steps))}
        measured |= {"reserved": round(GIB * max(row["peak_reserved_gib"] for row in steps))}
        measured |= {"unexplained": max(row["unexplained"] for row in steps)}
    return {
        "hardware": manifest["hardware"],
        "versions": manifest["versions"],
        "tokens_per_second": rows[-1]["tokens_per_second"],
        "planned": planned,
        "measured": measured,
        "phases": steps[-1].get("phases"),
        "moments": {moment: figures["total"] for moment, figures in run["moments"].items()},
    }


def table(record: dict[str, Any]) -> str:
    """Markdown: errors of the total peak, of what is above the states, and of what is reserved, with their bounds."""
    lines = [
        "| run | GPUs | planned / measured peak, GiB | error (3%) | above the states (10%, 0.5 GiB) | reserved (8%) |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in record["rows"]:
        if "failed" in row or "peak" not in row["measured"]:
            why = f"exit code {row['failed']}" if "failed" in row else "no GPU: states only"
            lines.append(f"| {row['name']} | {row['ranks']} | {why} | | | |")
            continue
        plan, got = row["planned"], row["measured"]
        above = plan["peak"] - plan["states"], got["peak"] - plan["states"]
        lines.append(
            f"| {row['name']}{' (calibration)' if row['calibration'] else ''} | {row['ranks']} "
            f"| {plan['peak'] / GIB:.2f} / {got['peak'] / GIB:.2f} | {plan['peak'] / got['peak'] - 1:+.1%} "
            f"| {above[0] / above[1] - 1:+.1%}, {(above[0] - above[1]) / GIB:+.2f} GiB "
            f"| {plan['reserved'] / got['reserved'] - 1:+.1%} |"
        )
    return "\n".join(lines)


def run(arguments: argparse.Namespace) -> None:
    grid = TINY if arguments.tiny else GRID
    cases = {name: case for name, case in grid.items() if not arguments.only or name in arguments.only}
    arguments.work.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "kind": "memory grid",
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": provenance.commit(),
        "calibrated_on": CALIBRATED_ON,
        "rows": [],
    }
    for number, (name, case) in enumerate(cases.items(), start=1):
        print(f"{number}/{len(cases)} {name}", file=sys.stderr, flush=True)
        record["rows"].append(measure(name, case, arguments.work))
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


def collect(arguments: argparse.Namespace) -> None:
    rows = [collected(run_dir, arguments.calibration) for run_dir in arguments.runs]
    record = {"kind": "memory grid", "made": datetime.now(UTC).isoformat(timespec="seconds")}
    record |= {"commit": provenance.commit(), "calibrated_on": CALIBRATED_ON, "rows": rows}
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("run")
    one.add_argument("--work", type=Path, required=True, help="a folder with room for the checkpoints: 201 GB for 100b")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--only", action="append", help=f"one of {', '.join([*GRID, *TINY])}; may be given several times")
    one.add_argument("--tiny", action="store_true")
    one.set_defaults(do=run)
    made = verbs.add_parser("collect")
    made.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    made.add_argument("--out", type=Path, required=True)
    made.add_argument("--calibration", action="append", default=[], help="name of a run that does not count")
    made.set_defaults(do=collect)
    shown = verbs.add_parser("table")
    shown.add_argument("record", type=Path)
    shown.set_defaults(do=lambda arguments: print(table(json.loads(arguments.record.read_text()))))
    arguments = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    main()
