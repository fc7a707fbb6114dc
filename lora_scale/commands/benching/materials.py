"""What a measured run needs beside this program: a checkpoint of random weights, rows, a config. Made once, in a folder
that should lie in memory files. Needs the source tree: the scripts are no part of the package."""

import json
import random
import shutil
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import lora_scale
from lora_scale.spec.errors import DoesNotFitError, UsageError
from lora_scale.storage.folder import open_folder
from lora_scale.storage.mixture import permutation

ROOT = Path(lora_scale.__file__).parent.parent
ROWS = 64  # blocks of a run at most: within one epoch, so that peers can take them in the same order
SEED = 0


def script(name: str) -> str:
    """A file of scripts/."""
    path = ROOT / "scripts" / name
    if not path.is_file():
        raise UsageError(f"{path} is not there; this needs the source tree: run it from a clone")
    return str(path)


def checkpoint(preset: str, layers: int | None, work: Path) -> Path:
    """A folder of random weights with a tokenizer of the right size, written unless it is there."""
    folder = work / f"{preset}-{layers or 'all'}"
    if not (folder / "tokenizer_config.json").is_file():  # the last to be written
        words = ["--layers", str(layers)] if layers else []
        done = subprocess.run(
            [sys.executable, script("make_checkpoint.py"), preset, str(folder), *words], capture_output=True, text=True
        )
        if done.returncode:
            shutil.rmtree(folder, ignore_errors=True)
            why = (done.stderr.strip().splitlines() or ["killed"])[-1]
            raise DoesNotFitError(f"the checkpoint {folder.name} cannot be written to {work}: {why}")
    return folder


def parameters(folder: Path) -> tuple[int, int]:
    """Of a checkpoint: all, and without the input embedding."""
    sizes = {name: prod(entry.shape) for name, entry in open_folder(folder).tensors.items()}
    return sum(sizes.values()), sum(n for name, n in sizes.items() if not name.endswith("embed_tokens.weight"))


def rows_file(seq_len: int, work: Path) -> Path:
    """Rows that fill a block each, so that there is no mask and every position has a target."""
    path = work / f"rows-{seq_len}.jsonl"
    if not path.is_file():
        work.mkdir(parents=True, exist_ok=True)
        draw = random.Random(0)
        rows = (draw.choices(range(3, 900), k=seq_len) for _ in range(ROWS))
        path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


def rows_in_order(seq_len: int, work: Path) -> Path:
    """The same rows in the order in which a run with SEED trains on them: for peers, which take them as they come."""
    path = work / f"rows-{seq_len}-in-order.jsonl"
    if not path.is_file():
        rows = rows_file(seq_len, work).read_text().splitlines(keepends=True)
        path.write_text("".join(rows[number] for number in permutation(ROWS, SEED, 0)))
    return path


def config(folder: Path, seq_len: int, run_dir: Path, work: Path, **train: Any) -> dict[str, Any]:
    """A run on those rows that leaves no checkpoint behind; `train` are keys of that section."""
    return {
        "model": {"path": str(folder)},
        "data": {"train": str(rows_file(seq_len, work)), "seq_len": seq_len, "packing": False},
        "run_dir": str(run_dir),
        "resume": "never",
        "seed": SEED,
        "train": {"lr": 1e-4, "schedule": "constant", **train},
        "save": {"last": False},
    }
