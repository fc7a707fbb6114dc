#!/usr/bin/env python3
"""What it costs a step to be timed by phase, its memory measured and told of: steps with all that beside steps without,
in turns in one run.

    python scripts/bench_overhead.py MODEL --work DIR [KEY=VALUE]... [--out docs/benchmarks/NAME.json]
    torchrun --nproc-per-node 2 scripts/bench_overhead.py MODEL --work DIR ...

With: events around every phase and every wait for other ranks, the allocator's books by phase, `measure` with the
driver's figure, this rank's memory row, the metrics row and its line, as `lora-scale train` does it. Without: nothing
is read or written. Rounds alternate; the first step of each is not counted. A tree with uncommitted changes is refused
with --out.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from lora_scale.commands.benching import materials
from lora_scale.commands.training.books import Books, open_log
from lora_scale.parallel import data as run_data
from lora_scale.parallel import grid as grids
from lora_scale.parallel import guards, memory, metrics, setup, world
from lora_scale.parallel.clock import Moment
from lora_scale.parallel.setup import Job
from lora_scale.parallel.world import World, on_every_rank, on_rank_zero
from lora_scale.spec import configfile, planning
from lora_scale.storage import provenance, runlog
from lora_scale.storage.console import Console
from lora_scale.storage.steps import Step, with_next

WARM_UP = 3


class NoClock:
    """In place of an engine's clock: no phase is one."""

    def __init__(self, now: Callable[[], Moment]):
        self.now = now  # when a step is over must be known all the same

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield

    def take(self) -> Callable[[], dict[str, float]]:
        return dict


def job_of(args: argparse.Namespace, here: World) -> tuple[Job, Path]:
    """The run, set up."""
    run_dir, file = args.work / "runs" / "overhead", args.work / f"overhead-{here.rank}.yaml"
    steps = WARM_UP + 2 * args.rounds * (args.steps + 1)
    train = {"max_steps": steps, "global_batch_size": args.blocks, "micro_batch_size": args.micro}
    file.parent.mkdir(parents=True, exist_ok=True)
    made: list[dict[str, Any]] = []
    on_rank_zero(lambda: made.append(materials.config(args.model, args.seq_len, run_dir, args.work, **train)))
    tree = made[0] if made else materials.config(args.model, args.seq_len, run_dir, args.work, **train)
    file.write_text(json.dumps(tree | {"resume": "auto"}))
    cfg, screen = configfile.load(file, args.settings), Console(here.rank, -1)
    grid = grids.make(cfg.parallel, here)
    folder, identity = setup.open_base(cfg, screen)
    cfg = planning.with_attention(cfg, str(folder.config.get("model_type")), here.device.type == "cuda")
    data = run_data.read_data(cfg, folder, grid, screen)
    model, dropout, _ = on_every_rank(lambda: setup.build_model(cfg, folder))
    return setup.start_engine(cfg, model, dropout, folder, identity, data, grid, screen), file


def measured(args: argparse.Namespace, here: World) -> dict[str, list[float]]:
    """Seconds of the counted steps, with and without."""
    job, file = job_of(args, here)
    engine, clock, found = job.engine, job.engine.clock, {"with": [], "without": []}
    steps = enumerate(engine.clock.timed("data", with_next(job.data.plan.steps(0))))
    with ExitStack() as stack:
        kept: list[Any] = []
        on_rank_zero(lambda: kept.append(stack.enter_context(open_log(job, file, 0, {}, {}))))
        own = stack.enter_context(runlog.RankMemory(job.cfg.run_dir, here.rank, None))
        books = stack.enter_context(Books(job, kept[0] if kept else None, Console(1), 0))

        def told(number: int, pair: tuple[Step, Step | None], began: float) -> None:
            step, after = pair
            finish = engine.start_step(step, number, 1e-4, bool, books.settle)
            held = memory.measure(here.device, engine.tracked, clock.memory.take())
            own.write({"step": number + 1, **held})
            if after:
                engine.begin(after, number + 1)
            result = finish()
            guards.check_finite(number + 1, result, step.names)
            seconds = time.perf_counter() - began
            books.step(partial(metrics.row, number + 1, result, 1e-4, step, seconds, job, held))

        def untold(number: int, pair: tuple[Step, Step | None], began: float) -> None:
            step, after = pair
            finish = engine.start_step(step, number, 1e-4)
            if after:
                engine.begin(after, number + 1)
            finish()

        for _ in range(WARM_UP):
            told(*next(steps), time.perf_counter())
        for _ in range(args.rounds):
            for way, do in (("with", told), ("without", untold)):
                engine.clock = clock if way == "with" else NoClock(clock.now)  # type: ignore[assignment]
                times = []
                for _ in range(args.steps + 1):
                    began = time.perf_counter()
                    do(*next(steps), began)
                    times.append(time.perf_counter() - began)
                found[way] += times[1:]
        engine.clock = clock
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder, of scripts/make_checkpoint.py for one")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--blocks", type=int, default=2, help="in an optimizer step")
    parser.add_argument("--micro", type=int, default=1, help="blocks in a pass")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=5, help="counted in a round of each")
    parser.add_argument("--out", type=Path)
    args = parser.parse_intermixed_args()
    commit = provenance.commit()
    if args.out and (commit is None or "+" in commit):
        raise SystemExit("bench_overhead: a record names its commit; commit all changes first")
    here = world.start(world.from_environment(), timeout_minutes=10)
    found = measured(args, here)
    medians = {way: statistics.median(times) for way, times in found.items()}
    record = {"kind": "overhead", "commit": commit, "versions": provenance.versions(), "hardware": world.hardware(here)}
    record |= {"command": provenance.command(), "model": args.model.name, "settings": args.settings}
    record |= {"seconds": {way: [round(t, 6) for t in times] for way, times in found.items()}}
    record |= {"medians": medians, "overhead": medians["with"] / medians["without"] - 1}
    if here.is_first:
        print(json.dumps({"medians": medians, "overhead": record["overhead"]}))
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    world.stop()


if __name__ == "__main__":
    main()
