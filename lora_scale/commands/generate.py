"""`lora-scale generate`: rows in, completions out, on the sharded base, with several adapters one after another."""

import contextlib
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch

from lora_scale.commands.options import EXIT_CODES
from lora_scale.parallel import generation, local, request, serving, source, world
from lora_scale.parallel import grid as grids
from lora_scale.parallel.generation import Completion, Sampling
from lora_scale.parallel.serving import Served
from lora_scale.parallel.waiting import first_rank_works
from lora_scale.parallel.world import World, on_every_rank, on_rank_zero
from lora_scale.spec.errors import LoraScaleError, UsageError
from lora_scale.storage import completions, hub, runlog
from lora_scale.storage.console import Console, LastWords, bar, size
from lora_scale.storage.staging import disk_errors, resumable_directory

TASK = "generate.json"  # in the result: what was generated from


class _Remembering(click.Command):
    """Keeps its words, for the ranks that it starts."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["words"] = list(args)
        return super().parse_args(ctx, args)


@click.command(cls=_Remembering, epilog=EXIT_CODES)
@click.argument("what", metavar="CONFIG_OR_RUN", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--data", required=True, type=click.Path(path_type=Path), help="Rows in any form that `train` reads.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; it must be new or empty.")
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=PATH", help="A run, checkpoint or adapter folder.")
@click.option("--with-base", is_flag=True, help="Generate with the base alone, too, first.")
@click.option("--limit", type=click.IntRange(min=1), help="Use the first so many rows.")
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=16, show_default=True, help="Rows a data-parallel rank."
)
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0.0), default=0.0, show_default=True, help="0: greedy.")
@click.option("--top-p", type=click.FloatRange(0.0, 1.0, min_open=True), default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(min=0), default=0, show_default=True, help="0: all tokens.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of sampling.")
@click.option("--stop", multiple=True, help=r"A text that ends a completion; \n is a new line. May be repeated.")
@click.option("--metrics/--no-metrics", default=True, help="Compare with the rows' references, where there are any.")
@click.option("--ranks", type=click.IntRange(min=1), help="Local ranks to start. Default: one a visible GPU.")
@click.option("--adapters-on-host", "on_host", is_flag=True, help="Keep adapters in host memory until they are used.")
@click.option("--allow-other-base", is_flag=True, help="Also on a base that an adapter was not trained on.")
@click.option("--log-folder", hidden=True, type=click.Path(path_type=Path))
@click.pass_context
def command(
    ctx: click.Context,
    what: Path,
    overrides: tuple[str, ...],
    ranks: int | None,
    log_folder: Path | None,
    data: Path,
    out: Path,
    adapters: tuple[str, ...],
    with_base: bool,
    allow_other_base: bool,
    on_host: bool,
    limit: int | None,
    metrics: bool,
    **chosen: Any,
) -> None:
    """Continue the rows of --data with a run's adapter, or with several on one loaded base, one after another.

    \b
    lora-scale generate runs/x --data data/test.jsonl --out out/x
    lora-scale generate run.yaml --adapter a=runs/a --adapter b=ad/b --data t.jsonl --out out/ab
    lora-scale generate runs/x parallel.tensor_parallel_size=2 --data t.jsonl --out out/x

    CONFIG_OR_RUN is a config, a run (its newest checkpoint, unless --adapter names others) or a model folder; base and
    layout are its own, KEY=VALUE changes them. --out gets a JSONL file for each adapter, in the rows' order, and
    metrics.json where rows have references: ROUGE, BLEU, exact match. Interrupted, the same command goes on with the
    next adapter; until all are done, --out is not there.
    """
    hub.stay_offline()
    chosen["stop"] = tuple(text.replace("\\n", "\n") for text in chosen["stop"])
    asked = request.Asked(data, out, adapters, with_base, allow_other_base, on_host, limit, metrics, Sampling(**chosen))
    here = world.from_environment()
    if here and ranks and ranks != here.size:
        raise UsageError(f"--ranks is {ranks}, but {here.launcher} started {here.size}; leave --ranks out")
    if here is None:
        source.refuse_used(out)
    work = request.prepare(what, overrides, asked)
    token = world.launch_token(here)
    logs = log_folder or Path(tempfile.gettempdir(), f"lora-scale-generate-{token}")
    count = 1 if here else ranks or local.default_ranks()
    grids.check(work.cfg.parallel, here.size if here else count)
    log = runlog.log_path(logs, here.rank if here else 0)
    if count > 1:
        code = local.run(count, ["generate", *ctx.meta["words"], "--log-folder", str(logs)], logs)
    else:
        code = _as_rank(work, asked, here, Console(here.rank if here else 0), log, token)
    if not code and not log_folder:
        shutil.rmtree(logs, ignore_errors=True)
    sys.exit(code)


def _as_rank(
    work: request.Work, asked: request.Asked, here: World | None, screen: Console, log: Path, token: str
) -> int:
    """One rank's work; its exit code. One rank tells the screen what went wrong."""
    screen.redirect(log)
    try:
        here = world.start(here, work.cfg.parallel.timeout_minutes)
        _run(work, asked, here, screen)
    except BaseException as error:
        traceback.print_exc()
        code, text = _told(error, here.rank if here else 0)
        screen.clear()
        if LastWords(log.parent.parent, token).claim(code):
            screen.error(f"lora-scale: {text}\n  log: {log}")
        if not isinstance(error, LoraScaleError):
            sys.stdout.flush()
            os._exit(code)  # the others are in a collective, and must not wait for us
    else:
        code = 0
    world.stop()
    return code


def _told(error: BaseException, rank: int) -> tuple[int, str]:
    match error:
        case LoraScaleError():
            return error.exit_code, f"error: {error}"
        case torch.OutOfMemoryError():
            return 3, f"error: rank {rank} is out of memory; set a smaller --batch-size, or more ranks"
        case KeyboardInterrupt():
            return 130, "stopped with Ctrl-C; the same command goes on with the adapter that it was at"
    return 1, f"error: rank {rank} failed: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _run(work: request.Work, asked: request.Asked, here: World, screen: Console) -> None:
    grid = grids.make(work.cfg.parallel, here)
    longest = max(len(row.ids) for row in work.prompts)
    answered = sum(row.reference is not None for row in work.prompts)
    screen.line(
        f"data     {len(work.prompts):,} rows of {asked.data}, the longest prompt {longest:,} tokens; "
        f"{answered:,} with a reference"
    )
    with contextlib.ExitStack() as stack:
        places: list[Path] = []  # of the growing folder; on the first rank only

        def enter() -> list[str]:
            source.refuse_used(asked.out)
            with disk_errors(f"{asked.out} is not written"):
                places.append(stack.enter_context(resumable_directory(asked.out, TASK, work.task)))
            return [file.stem for file in places[0].glob("*.jsonl")]

        there = first_rank_works(enter)
        served = serving.serve(
            work.cfg, work.folder, work.adapters, grid, on_host=asked.on_host, progress=_load_bar(screen)
        )
        resident = sum(served.adapters.nbytes(name) for name in work.adapters)
        screen.line(
            f"loaded   {size(served.loaded.nbytes)} a rank in {served.loaded.seconds:.1f} s; {len(work.adapters)} "
            f"adapters beside it, {size(resident)} a rank; {grid.dp_size} x {grid.tp_size} ranks (data x tensor)"
        )
        for name in work.names:
            if name in there:
                screen.line(f"{name:<8} was there")
                continue
            found, facts = _with_adapter(work, asked, served, grid, name, screen)
            on_rank_zero(lambda found=found, name=name: _keep(places[0], name, work, found))  # type: ignore[misc]
            screen.line(f"{name:<8} {facts}")

        def leave() -> list[str]:
            with disk_errors(f"{asked.out} is not written"):
                lines = completions.summarise(places[0], work.names, work.scorer)
                stack.close()
            return lines

        for line in first_rank_works(leave):
            screen.line(line)
    screen.line(f"wrote    {asked.out}: {', '.join(f'{name}.jsonl' for name in work.names)}")


def _load_bar(screen: Console) -> Callable[[int, int], None]:
    return lambda done, total: screen.live(lambda: f"loading  {bar(done, total)} {size(done)} of {size(total)} a rank")


def _keep(folder: Path, name: str, work: request.Work, found: list[Completion]) -> None:
    with disk_errors(f"{folder / name}.jsonl is not written"):
        completions.write(folder / f"{name}.jsonl", work.prompts, [asdict(one) for one in found], work.scorer)


def _with_adapter(
    work: request.Work, asked: request.Asked, served: Served, grid: grids.Grid, name: str, screen: Console
) -> tuple[list[Completion], str]:
    """All completions with one adapter; and how long it took."""
    moved = on_every_rank(lambda: served.adapters.use(None if name == request.BASE else name))
    total = len(work.prompts)

    def tell(done: int, tokens: int) -> None:
        screen.live(
            lambda: (
                f"{name:<8} {bar(done, total)} {done:,} of {total:,} rows, {tokens} of at most "
                f"{asked.sampling.max_new_tokens} tokens of the next"
            )
        )

    begun = time.perf_counter()
    found = generation.generate(served.model, work.tokenizer, work.prompts, work.ends, asked.sampling, grid, tell)
    seconds = time.perf_counter() - begun
    tokens = sum(len(one.ids) for one in found)
    rate = f"{tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} tokens/s)"
    return found, f"{total:,} rows, {rate}; {size(moved)} copied to switch"
