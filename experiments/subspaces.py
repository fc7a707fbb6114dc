#!/usr/bin/env python3
"""Section 7 of the paper as a record: what `lora-scale analyze` finds of some runs, by layers' medians, with pictures.

    python experiments/subspaces.py runs/r8-seed0 runs/r8-seed1 runs/r64-seed0 --out docs/benchmarks/NAME.json

Beside the record come NAME-phi.svg (Figures 3 and 4: the first run against each other one) and NAME-spectra.svg. A tree
with uncommitted changes is refused.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from lora_scale.adapters import survey as surveys
from lora_scale.adapters.survey import ModuleRow, Survey
from lora_scale.commands.analysis import figures
from lora_scale.commands.analysis import runs as folders
from lora_scale.storage import provenance, runlog
from lora_scale.storage.durable import write_text_atomically

PROGRAM = "experiments/subspaces.py"
WHAT = "updates of the grid's kept runs, by `analyze`; medians over layers"


def look(runs: Sequence[Path]) -> tuple[Survey, dict[str, Any]]:
    """The survey of these runs on their own base, and its figures."""
    opened = folders.open_all(runs)
    folder, _ = folders.find_base(opened, None)
    found = surveys.survey([run.subject for run in opened], folder)
    names = [run.name for run in opened]
    groups = figures.by_group(found.modules)
    record = {
        "runs": [
            {
                "run": run.name,
                "r": run.subject.adapter.max_rank,
                "seed": run.subject.seed,
                "steps": run.state.step if run.state else None,
                "val_loss": [loss for _, loss in run.val_losses][:: max(1, len(run.val_losses) - 1)],
                "trained_by": runlog.read_manifest(path)["commit"],
            }
            for run, path in zip(opened, runs, strict=True)
        ],
        "updates": [_update(group, rows, name) for group, rows in groups.items() for name in names],
        "pairs": [
            {
                "runs": pair.names,
                "group": pair.group,
                "phi": {
                    side: [phi[0, 0].item(), phi[-1, -1].item()] for side in pair.sums for phi in [pair.mean(side)]
                },
                "chance": [pair.expected(surveys.OUTPUT)[at, at].item() for at in (0, -1)],
            }
            for pair in found.pairs
        ],
    }
    return found, record


def _update(group: str, rows: Sequence[ModuleRow], name: str) -> dict[str, Any]:
    """One line of the table: what a run did to a kind of module."""
    spectra, weights = [row.spectra[name] for row in rows], [row.correlations[name] for row in rows]
    return {
        "group": group,
        "run": name,
        "effective_rank": median(s.effective_rank for s in spectra),
        "directions_90": median(s.directions_90 for s in spectra),
        "from_update": median(c.from_update for c in weights),
        "from_weight": median(c.from_weight for c in weights),
        "from_random": median(c.from_random for c in weights),
        "update_norm": median(c.update_norm for c in weights),
        "amplification": median(c.amplification for c in weights),
    }


def table(record: dict[str, Any]) -> list[str]:
    """The record as Markdown."""
    lines = [
        "| module, run | effective rank | directions for 90% | \\|\\|U^T W V\\|\\| from dW | from W | from random | "
        "\\|\\|dW\\|\\| | amplification |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in record["updates"]:
        keys = ("effective_rank", "directions_90", "from_update", "from_weight", "from_random", "update_norm")
        cells = [f"{row[key]:.3g}" for key in (*keys, "amplification")]
        lines.append(f"| {row['group']}, {row['run']} | {' | '.join(cells)} |")
    sides = list(record["pairs"][0]["phi"])
    lines += [
        "",
        f"| phi of the first / of all directions | {' | '.join(sides)} | chance, output side |",
        f"|---|{'--:|' * len(sides)}--:|",
    ]
    for row in record["pairs"]:
        cells = [
            f"{row['phi'][side][0]:.2f} / {row['phi'][side][1]:.2f}" if side in row["phi"] else "-" for side in sides
        ]
        level = "{:.3f} / {:.3f}".format(*row["chance"])
        lines.append(f"| {' and '.join(row['runs'])}, {row['group']} | {' | '.join(cells)} | {level} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    commit = provenance.commit_of_record(PROGRAM)
    found, record = look(args.runs)
    head = {"kind": "subspaces", **provenance.head(WHAT, PROGRAM, commit)}
    write_text_atomically(args.out, json.dumps(head | record, indent=1) + "\n")
    first = record["runs"][0]["run"]
    pictures = {
        "phi": figures.heat_maps([pair for pair in found.pairs if pair.names[0] == first]),
        "spectra": figures.spectra(found, [run["run"] for run in record["runs"]]),
    }
    for name, svg in pictures.items():
        write_text_atomically(args.out.with_name(f"{args.out.stem}-{name}.svg"), svg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
