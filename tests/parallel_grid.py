"""The grid of tensor-parallel layouts against one process of Hugging Face + PEFT: its cases, how one is run and judged,
and the command that runs all of them and writes a record.

    python tests/parallel_grid.py --jobs 2 --out docs/benchmarks/NAME.json [--model llama]...

In fp32, both factors non-zero, clipping active. The cases of one model and world size share a launch of
ranks; `--jobs` launches run beside each other.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path
from typing import Any

from ranks import run_ranks
from tiny import tiny_folder
from training import STEPS, Trace, config, deviations, reference, write_rows

from lora_scale.storage import provenance

EPOCH, LONG = 6, 20  # steps of CI's part and of the whole grid
TOLERANCE = 1e-5  # relative; norms five times that (training.assert_equal says why)
_HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4}
# family: changes to its tiny config, so that four ranks can share the heads
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**_HEADS, "attention_bias": True, "mlp_bias": True},
    "mistral": {**_HEADS, "sliding_window": 6},
    "qwen2": _HEADS,
    "qwen3": _HEADS,
    "gemma2": _HEADS,
    "gemma3_text": _HEADS,
    "phi3": _HEADS,
    "gpt2": {},
    "falcon": {"multi_query": True},
    "falcon, grouped": {
        "new_decoder_architecture": True,
        "num_attention_heads": 8,
        "num_kv_heads": 4,
        "bias": True,
    },
    "qwen3_moe": _HEADS,
    "mixtral": _HEADS,
    "gpt_neox": {},
}
ATTENTION = {"gemma2": "eager", "qwen2": "documents", "phi3": "documents"}
LAYOUTS = [(1, 2), (2, 1), (2, 2), (1, 4), (4, 1)]  # data parallel x tensor parallel
# ZeRO stage, recompute, dropout of the adapter; and sequence parallel in half of them, with and without each
WAYS = [
    (stage, recompute, dropout, (stage == 3) ^ (recompute == "all") ^ (dropout > 0))
    for stage, recompute, dropout in itertools.product((3, 0), ("all", "none"), (0.0, 0.1))
]
Case = tuple[str, int, int, int, str, float, bool]


def name_of(model: str, dp: int, tp: int, stage: int, recompute: str, dropout: float, sequence: bool) -> str:
    shared = ", sequence parallel" if sequence and tp > 1 else ""
    return f"{model} {dp}x{tp} ZeRO-{stage} recompute {recompute} dropout {dropout}{shared}"


def folder_of(model: str, place: Path) -> Path:
    """A tiny random checkpoint of a row of MODELS, written where it is not there."""
    folder = place / model.replace(", ", "-")
    return folder if folder.exists() else tiny_folder(folder, model.partition(",")[0], **MODELS[model])


def tree_of(
    folder: Path,
    rows: Path,
    steps: int,
    dp: int,
    tp: int,
    stage: int,
    recompute: str,
    dropout: float,
    sequence: bool,
) -> dict[str, Any]:
    """At stage 0 and where tokens are shared and recomputed, passes of one block, accumulated, whose exchanges hide;
    else one pass a step of all blocks."""
    alone = stage == 0 or (sequence and recompute == "all")
    return config(
        folder,
        rows,
        rows.parent / "run",
        data__packing=False,
        model__attention=ATTENTION.get(folder.name, "sdpa"),
        train__max_steps=steps,
        train__global_batch_size=4,
        train__micro_batch_size=1 if alone else 4 // dp,
        parallel__tensor_parallel_size=tp,
        parallel__sequence_parallel=sequence and tp > 1,
        parallel__zero_stage=stage,
        recompute=recompute,
        lora__dropout=dropout,
    )


def cases_of(world: int, names: list[str]) -> list[Case]:
    grid = [(dp, tp) for dp, tp in LAYOUTS if dp * tp == world]
    return [(name, *layout, *way) for name in names for layout in grid for way in WAYS]


def covering(world: int) -> list[Case]:
    """For Llama all ways together over the layouts; one way for each other family, another one for each."""
    layouts = [layout for layout in LAYOUTS if prod(layout) == world and layout[1] > 1]
    here = {2: (0, 1, 6, 7), 4: (2, 3, 4, 5)}[world]
    found: list[Case] = [("llama", *layouts[i % len(layouts)], *WAYS[i]) for i in here]
    if world == 2:
        others = [name for name in MODELS if name != "llama"]
        found += [(name, 1, 2, *WAYS[i % len(WAYS)]) for i, name in enumerate(others)]
        found.append(("llama", 1, 2, 0, "none", 0.0, True))  # nothing recomputed, nothing dropped, all hidden
    else:
        found.append(("llama", 2, 2, *WAYS[1]))  # exchanges hide under ZeRO-3 and recompute
    return found


def run(world: int, cases: Sequence[Case], place: Path, steps: int = STEPS) -> list[dict[str, Any]]:
    """A row for each case: its largest relative errors, and whether each is within its tolerance."""
    rows = write_rows(place / "rows.jsonl", count=24)  # six steps are an epoch
    folders = {case[0]: folder_of(case[0], place) for case in cases}
    trees = {name_of(*case): tree_of(folders[case[0]], rows, steps, *case[1:]) for case in cases}
    ranks = place / f"ranks-{time.monotonic_ns()}"
    traces = run_ranks(world, "training:run_cases", trees, folder=ranks, timeout=len(cases) * 20 + 600)[0]
    references: dict[tuple[str, float], Trace] = {}
    found = []
    for case in cases:
        key = (case[0], case[5])
        if key not in references:
            references[key] = reference(tree_of(folders[case[0]], rows, steps, 1, 1, 0, "none", case[5], False))
        errors = deviations(traces[name_of(*case)], references[key])
        equal = max(errors["gradients"], errors["losses"], errors["norms"] / 5) <= TOLERANCE
        found.append(
            {"case": name_of(*case), "equal": equal, **{what: float(f"{e:.2e}") for what, e in errors.items()}}
        )
    return found


def unequal(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in found if not row["equal"]]


def _part(model: str, world: int) -> list[dict[str, Any]]:
    """All cases of one model and world size in a process of its own; a row that says so where it fails."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "rows.json"
        command = [sys.executable, __file__, "--part", model, str(world), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = json.loads(out.read_text()) if out.exists() else []
    if not found:
        found = [{"case": f"{model}, {world} ranks", "equal": False, "failed": done.stderr.strip().splitlines()[-3:]}]
    print(f"{model}, {world} ranks: {len(found)} cases, {len(unequal(found))} not equal", flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="launches of ranks at once")
    parser.add_argument("--model", action="append", choices=list(MODELS), help="this model only; may be repeated")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--part", nargs=2, metavar=("MODEL", "RANKS"), help="one launch, its rows alone")
    args = parser.parse_args()
    if args.part:
        model, world = args.part[0], int(args.part[1])
        with tempfile.TemporaryDirectory() as place:
            args.out.write_text(json.dumps(run(world, cases_of(world, [model]), Path(place), LONG)))
        return 0
    commit = provenance.commit_of_record("parallel_grid")
    begun, parts = time.monotonic(), list(itertools.product((4, 2), args.model or MODELS))
    with ThreadPoolExecutor(args.jobs) as pool:
        found = [row for rows in pool.map(lambda part: _part(part[1], part[0]), parts) for row in rows]
    bad = unequal(found)
    what = "tensor parallelism, alone and under ZeRO, against one process of Hugging Face + PEFT: largest relative "
    what += f"errors of {LONG} losses and gradient norms and every gradient of step 1; equal within {TOLERANCE}"
    record = provenance.head(what, "tests/parallel_grid.py", commit) | {
        "seconds": round(time.monotonic() - begun, 1),
        "cases": len(found),
        "not_equal": len(bad),
        "rows": found,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{len(found)} cases, {len(bad)} not equal, {record['seconds']} s", *bad, sep="\n")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
