"""The same job of two ranks started by deepspeed, torchrun and mpirun, round by round: are losses and speed the same?

    python scripts/launchers.py --out docs/benchmarks/NAME.json            a tiny model on CPU ranks; 3 minutes
    python scripts/launchers.py --model FOLDER --seq-len 4096 --out ...    on two GPUs

Through the scripts in launch/. Two runs by one launcher show what "the same" is worth: on GPUs attention adds up its
gradients in an order that changes.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import quantiles
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from lora_scale.storage import provenance  # noqa: E402
from lora_scale.storage.durable import write_text_atomically  # noqa: E402
from lora_scale.storage.runlog import read_manifest, read_metrics  # noqa: E402

LAUNCHERS = ("deepspeed", "torchrun", "mpirun")
WARM_UP = 3  # steps whose seconds do not count
CONFIG = """\
model: {{path: {model}}}
data: {{train: rows.jsonl, seq_len: {seq_len}, packing: false}}
run_dir: run
recompute: none
train: {{max_steps: {steps}, global_batch_size: 4, micro_batch_size: 2, lr: 1.0e-4}}
save: {{last: false}}
"""


def _tiny(folder: Path) -> Path:
    from tiny import tiny_folder  # of the tests

    return tiny_folder(folder, "llama")


def run(launcher: str, number: int, folder: Path) -> dict[str, Any]:
    """One run; its row of the record."""
    run_dir = folder / f"{launcher}-{number}"
    command = [str(ROOT / f"launch/{launcher}.sh"), "config.yaml", f"run_dir={run_dir}"]
    env = {**os.environ, "RANKS": "2", "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    rows = [row for row in read_metrics(run_dir) if "loss" in row]
    losses, seconds = [row["loss"] for row in rows], [row["seconds"] for row in rows]
    return {"launcher": launcher, "round": number, "losses": losses, "seconds": seconds}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown. Losses are compared with those of the first row."""
    lines = ["| launcher | round | first loss | last loss | farthest from the first row's | s a step (quartiles) |"]
    lines.append("|---|--:|--:|--:|--:|--:|")
    for row in rows:
        apart = max(abs(a - b) for a, b in zip(row["losses"], rows[0]["losses"], strict=True))
        low, middle, high = quantiles(row["seconds"][WARM_UP:], n=4)
        ends = f"{row['losses'][0]:.9f} | {row['losses'][-1]:.9f} | {apart:.1e}"
        lines.append(f"| {row['launcher']} | {row['round']} | {ends} | {middle:.4f} ({low:.4f}-{high:.4f}) |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint's folder (default: a tiny one)")
    parser.add_argument("--seq-len", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=23)
    parser.add_argument("--out", type=Path, required=True, help="the record, .json")
    args = parser.parse_args()
    commit = provenance.commit_of_record("launchers.py")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model.resolve() if args.model else _tiny(folder / "model")
        (folder / "config.yaml").write_text(CONFIG.format(model=model, seq_len=args.seq_len, steps=args.steps))
        choose = random.Random(0).choices
        lines = (json.dumps({"input_ids": choose(range(3, 90), k=args.seq_len)}) + "\n" for _ in range(64))
        (folder / "rows.jsonl").write_text("".join(lines))
        rows = [run(launcher, number, folder) for number in range(1, args.rounds + 1) for launcher in LAUNCHERS]
        device = read_manifest(folder / f"{LAUNCHERS[0]}-1")["hardware"]["device"]
    record = provenance.head("one job by three launchers", "scripts/launchers.py", commit, device or "")
    record |= {"kind": "launchers", "rows": rows}
    write_text_atomically(args.out, json.dumps(record, indent=1) + "\n")
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
