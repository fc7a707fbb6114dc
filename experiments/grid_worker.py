#!/usr/bin/env python3
"""One process that works on the grid's cells one after the other, several such at once on a GPU.

Knows how a cell is trained (by the function that `lora-scale train` calls, in this process, in a world of one rank) and
scored, as it stands in memory. Refuses to know other workers: a cell belongs to who holds the lock on its file, and the
kernel takes the lock back from a process that ends.

    python experiments/grid_worker.py --grid experiments/grid.yaml --out runs/paper     as `run_grid.py run` starts it

After a fault in a cell the process ends: what a fault leaves behind in it is not known. `run_grid.py` starts another.
"""

import argparse
import fcntl
import gc
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the model is a folder; nothing is to be fetched
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import run_grid
import score_run
import torch
from ruamel.yaml import YAML
from run_grid import ATTEMPTS, Cell
from transformers import AutoTokenizer

from lora_scale.commands.train import Asked
from lora_scale.commands.train import run as train_run
from lora_scale.parallel import world
from lora_scale.parallel.pulse import Pulse
from lora_scale.parallel.setup import Job
from lora_scale.parallel.world import World
from lora_scale.spec import configfile
from lora_scale.spec.baselines import prefix_tokens
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import InterruptedRunError
from lora_scale.storage import checkpoints, provenance, runlog
from lora_scale.storage.console import Console, LastWords, StopRequest

POLL = 1.0  # seconds between looks for a cell that has become ready
GIB = 1 << 30


@contextmanager
def claim(out: Path, cell: Cell) -> Iterator[bool]:
    """Whether the cell is this process's, until the end of the block."""
    path = out / "claims" / run_grid.file_name(cell.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield run_grid.read_record(out, cell.name) is None


def work(grid: dict[str, Any], todo: Sequence[Cell], out: Path, here: World, screen: Console) -> None:
    """Every cell that nobody has done and nobody is at, in their order; waits for learning rates that others look for.

    A fault is noted and raised; the second one of a cell becomes its record.
    """
    while left := [cell for cell in todo if run_grid.read_record(out, cell.name) is None]:
        done = 0
        for cell in left:
            if not run_grid.is_ready(grid, cell, out):
                continue
            with claim(out, cell) as mine:
                if mine:
                    finish(grid, cell, out, here, screen)
                    done += 1
                    break  # from the top: an earlier cell may have become ready
        if not done:
            time.sleep(POLL)


def finish(grid: dict[str, Any], cell: Cell, out: Path, here: World, screen: Console) -> None:
    """Train and score one cell and write its record; an interruption leaves none. What another cell has done already
    is told under this one's name too."""
    began, failures = time.monotonic(), out / "failures" / run_grid.file_name(cell.name)
    lr = None
    try:
        lr = run_grid.chosen_lr(grid, cell, out) if cell.method and not cell.tunes else None
        done = run_grid.read_record(out, cell.same) if cell.same else None
        if done is not None and done["lr"] == lr and "failed" not in done:
            run_grid.write_record(out, cell.name, {**done, "cell": cell.name, "same_as": cell.same})
            return
        result = trained(grid, cell, out, lr, here, screen) if cell.method else prompted(grid, cell, here)
    except InterruptedRunError:
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if not _is_memory(error):  # neighbours on the GPU may have had it all: no fault of this run's
            failures.parent.mkdir(parents=True, exist_ok=True)
            with failures.open("a") as file:
                file.write(what + "\n")
            if len(failures.read_text().splitlines()) >= ATTEMPTS:
                keep(out, cell, lr, {"failed": what}, began)
        raise
    keep(out, cell, lr, result, began)


def _is_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error) or "out of memory" in str(error)


def keep(out: Path, cell: Cell, lr: float | None, result: dict[str, Any], began: float) -> None:
    record = {"cell": cell.name, "commit": provenance.commit(), "versions": provenance.versions(), "lr": lr}
    record |= {"device": _device(), **result, "seconds": round(time.monotonic() - began, 1)}
    run_grid.write_record(out, cell.name, record)


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def trained(
    grid: dict[str, Any], cell: Cell, out: Path, lr: float | None, here: World, screen: Console
) -> dict[str, Any]:
    """A run of `lora-scale train`, and the scores of what it leaves in memory."""
    run = out / "runs" / run_grid.file_name(cell.name)
    if not checkpoints.list_checkpoints(run / runlog.CHECKPOINTS):
        shutil.rmtree(run, ignore_errors=True)  # of a process that was killed
    run.mkdir(parents=True, exist_ok=True)
    config = run / "grid.yaml"
    with config.open("w") as file:
        YAML().dump(run_grid.config_of(grid, cell, run, lr), file)
    cfg, began = configfile.load(config, ()), time.monotonic()
    if here.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    job = train(cfg, config, here, screen)
    assert job is not None, f"{run} was finished, but has no record"
    seconds = {"training": round(time.monotonic() - began, 1)}
    result, began = score_run.facts(run), time.monotonic()
    if not cell.tunes:
        module = job.engine.module.eval()
        tokenizer = AutoTokenizer.from_pretrained(cfg.model.path)
        scorer = score_run.Scorer(module, tokenizer, prefix_tokens(cfg), str(here.device))
        result |= score_run.score(scorer, grid["tasks"][cell.task])
        seconds["scoring"] = round(time.monotonic() - began, 1)
        del module, scorer
    del job
    _forget(here)
    peak = round(torch.cuda.max_memory_reserved() / GIB, 1) if here.device.type == "cuda" else None
    return {**result, "seconds_of": seconds, "reserved_gib": peak}


def train(cfg: RunConfig, config: Path, here: World, screen: Console) -> Job | None:
    """What the command `lora-scale train config --ranks 1` does, in this process."""
    sys.argv = ["lora-scale", "train", str(config), "--ranks", "1"]  # what the manifest says: the same run by hand
    log = runlog.log_path(cfg.run_dir, 0)
    screen.redirect(log)
    words = LastWords(cfg.run_dir, world.launch_token(None))
    with StopRequest(screen, words) as stop, Pulse(0, screen, log, cfg.parallel.hang_seconds) as pulse:
        asked = Asked(time.time(), ignore_plan=True)  # the plan counts what neighbours hold at this moment as gone
        return train_run(cfg, config, here, screen, stop, pulse, words.token, asked)


def prompted(grid: dict[str, Any], cell: Cell, here: World) -> dict[str, Any]:
    """The scores of the base alone."""
    task, device = grid["tasks"][cell.task], str(here.device)
    model, tokenizer = score_run.load_base(grid["model"], device), AutoTokenizer.from_pretrained(grid["model"])
    scorer = score_run.Scorer(model, tokenizer, 0, device)
    result = score_run.score(scorer, task, score_run.shown_examples(task, cell.shots))
    del model, scorer
    _forget(here)
    return {"trainable": 0, **result}


def _forget(here: World) -> None:
    """Give memory back to the GPU, where others can use it: an engine's parts refer to each other."""
    gc.collect()
    if here.device.type == "cuda":
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--grid", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("patterns", nargs="*", default=["*"])
    args = parser.parse_args()
    grid = run_grid.read_grid(args.grid)
    todo = run_grid.select(grid, args.patterns)
    screen = Console(0, verbosity=-1)
    here = world.start(None, timeout_minutes=30.0)
    try:
        work(grid, todo, args.out, here, screen)
    except InterruptedRunError as error:
        return error.exit_code
    except Exception as error:
        screen.error(f"a worker ends: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
        raise
    finally:
        world.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
