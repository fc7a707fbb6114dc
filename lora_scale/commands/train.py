"""`lora-scale train`: from a config to a checkpoint. Set-up is a list of named steps; the loop stands whole."""

import contextlib
import faulthandler
import gc
import os
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from lora_scale.commands.training import resuming
from lora_scale.commands.training.books import Books, open_log
from lora_scale.parallel import beside, checkpoint, fits, guards, local, memory, metrics, mpi, setup, world
from lora_scale.parallel import data as run_data
from lora_scale.parallel import grid as grids
from lora_scale.parallel.beside import Factors, Turn, take_turns
from lora_scale.parallel.clock import seconds_between
from lora_scale.parallel.pace import Pace
from lora_scale.parallel.pulse import Pulse
from lora_scale.parallel.setup import Job
from lora_scale.parallel.waiting import first_rank_works
from lora_scale.parallel.world import World, on_every_rank, on_rank_zero
from lora_scale.spec import configfile, planning, search, together
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError, InterruptedRunError, LoraScaleError, UsageError
from lora_scale.spec.progress import Deadline, Validation, deadline
from lora_scale.spec.schedule import learning_rate
from lora_scale.storage import checkpoints, console, durable, hub, runlog
from lora_scale.storage.console import Console, LastWords, StopRequest, size
from lora_scale.storage.folder import ModelFolder
from lora_scale.storage.lease import Lease
from lora_scale.storage.runlog import CHECKPOINTS, RunLog, log_path
from lora_scale.storage.steps import with_next

LEAST_AWAY = 1e-3  # seconds that are worth telling apart from a step


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says beside the config."""

    started: float  # when; seconds since 1970
    ignore_plan: bool
    beside: tuple[tuple[RunConfig, Path], ...] = ()  # runs on the same base


@dataclass(frozen=True, slots=True)
class Begun:
    """A run that is about to take its next step."""

    job: Job
    log: RunLog | None  # of the first rank
    own: runlog.RankMemory
    behind: tuple[int, int, Validation]  # steps that are done, their tokens, their validation losses
    label: str = ""  # of its lines on the screen


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--ranks", type=click.IntRange(min=1), help="Local ranks to start. Default: one a visible GPU, or one process."
)
@click.option(
    "--beside",
    multiple=True,
    metavar="CONFIG",
    type=click.Path(path_type=Path),
    help="Another run, whose adapter trains on the same base in memory, step by step in turns; may be given several "
    "times. KEY=VALUE are not for it.",
)
@click.option("--ignore-plan", is_flag=True, help="Start even where the plan says that it will not fit.")
@click.option("-q", "--quiet", is_flag=True, help="Errors only; everything is in the log all the same.")
@click.option("-v", "--verbose", count=True, help="A line for every step; -vv: what libraries say, too.")
def command(
    config: Path,
    overrides: tuple[str, ...],
    ranks: int | None,
    beside: tuple[Path, ...],
    ignore_plan: bool,
    quiet: bool,
    verbose: int,
) -> None:
    """Train as CONFIG says: an adapter on a frozen, sharded base, or every weight (method=full).

    \b
    lora-scale train run.yaml                        on all GPUs of this machine
    lora-scale train run.yaml lora.r=16 train.lr=1e-4 --ranks 2
    deepspeed --module lora_scale train run.yaml     or torchrun, mpirun, srun: one process a GPU

    Started by a launcher it is one rank. Started by hand with more than one rank it runs the deepspeed launcher and
    prints the equivalent command. The same command again goes on from the newest checkpoint (resume: auto).

    Ctrl-C or SIGTERM, SIGUSR1: the step under way is finished and saved, and the exit code is 75.

    Exit codes: 0 finished, 1 stopped by a fault or a guard, 2 wrong usage, config, model, data or checkpoint, 3 out of
    memory, 75 interrupted but resumable.
    """
    hub.stay_offline()
    started, verbosity = time.time(), -1 if quiet else min(verbose, 2)
    here = world.from_environment()
    try:
        if here and ranks:
            raise UsageError(f"--ranks is {ranks}, but {here.launcher} started {here.size} already; leave --ranks out")
        cfg = configfile.load(config, overrides)
        others = tuple((configfile.load(path, ()), path) for path in beside)
        together.check_all([cfg, *(other for other, _ in others)])
        log, *_ = [_log_path(one, here.rank if here else 0) for one in (cfg, *(other for other, _ in others))]
    except LoraScaleError as error:
        if here and here.local_rank:  # every rank reads the same file: one a host says what is wrong with it
            sys.exit(error.exit_code)
        raise
    if here is None and (count := ranks or local.default_ranks()) > 1:
        words = [word for path in beside for word in ("--beside", str(path))]
        words += [*(["--ignore-plan"] if ignore_plan else []), *(["-q"] if quiet else ["-v"] * verbosity)]
        arguments = ["train", str(config), *overrides, *words]
        if not quiet:
            click.echo(f"{count} local ranks: {local.shown(count, arguments)}")
        sys.exit(local.run(count, arguments, cfg.run_dir))
    screen = Console(here.rank if here else 0, verbosity)
    sys.exit(_guarded(cfg, config, here, log, screen, Asked(started, ignore_plan, others)))


def _log_path(cfg: RunConfig, rank: int) -> Path:
    try:
        return log_path(cfg.run_dir, rank)
    except OSError as error:
        where = f"run_dir is {cfg.run_dir}, where no log can be written"
        raise ConfigError(f"{where} ({error.filename}: {error.strerror}); set another run_dir") from error


def _guarded(cfg: RunConfig, config: Path, here: World | None, log: Path, screen: Console, asked: Asked) -> int:
    """Run, and let exactly one rank tell the screen what went wrong, after everything else, with its log's path."""
    rank, words, code = here.rank if here else 0, LastWords(cfg.run_dir, world.launch_token(here)), 0
    screen.redirect(log)
    faulthandler.enable()
    with StopRequest(screen, words) as stop, Pulse(rank, screen, log, cfg.parallel.hang_seconds) as pulse:
        try:
            here = world.start(here, cfg.parallel.timeout_minutes)
            words.token = on_rank_zero(lambda: words.token)  # one for all hosts
            pulse.phase = "set-up"
            run(cfg, config, here, screen, stop, pulse, words.token, asked)
            pulse.end(0)
        except BaseException as error:
            stop.over()
            traceback.print_exc()
            code, text = _last_words(stop.cause(error), rank, log)
            code = _tell_once(screen, pulse, code, text, words)
            if not isinstance(error, LoraScaleError):
                sys.stdout.flush()
                mpi.end_all(code)
                os._exit(code)  # the others are in a collective: there is no orderly way out; they must not wait
        world.stop()
    return code


def _tell_once(screen: Console, pulse: Pulse, code: int, text: str, words: LastWords) -> int:
    """The code to end with: what looks like a fault to this rank may be another's answer to a signal."""
    screen.clear()
    first = words.claim(code)
    code = console.INTERRUPTED if words.interrupted() else code
    if not pulse.end(code, text) and first:
        screen.error(text)
    return code


def _last_words(error: BaseException, rank: int, log: Path) -> tuple[int, str]:
    """Exit code and what the screen shows; the traceback is in the log."""
    first = (str(error).splitlines() or [""])[0]
    match error:
        case InterruptedRunError():
            return error.exit_code, f"lora-scale: {error}"
        case LoraScaleError():
            code, lines = error.exit_code, str(error).splitlines()
        case torch.OutOfMemoryError():
            what = first.partition(" Including ")[0]  # torch goes on about its allocator
            code = 3
            lines = [f"rank {rank}: {what} Set recompute=all, or a smaller train.micro_batch_size or data.seq_len"]
        case _:
            code, lines = 1, [f"rank {rank} failed: {type(error).__name__}: {first}"]
    return code, "".join(f"lora-scale: error: {line}\n" for line in lines) + f"  log: {log}"


def run(
    cfg: RunConfig,
    config: Path,
    here: World,
    screen: Console,
    stop: StopRequest,
    pulse: Pulse,
    token: str,
    asked: Asked,
) -> Job | None:
    """One rank's whole run, and those beside it; the first that had steps to take, still in memory, or None."""
    turns: list[tuple[Job, Turn]] = []
    with contextlib.ExitStack() as stack:  # what stays with the first rank: the lease, the log, the trackers
        runs = ((cfg, config), *asked.beside)
        for each, _ in runs:
            first_rank_works(partial(_enter, each.run_dir, token, screen, stack))
        for each, path in runs:
            begun = _begin(each, path, here, screen, asked, stack, turns[0][0] if turns else None)
            if begun is not None:
                steps = _steps(begun, screen, stop, pulse, asked.started)
                turns.append((begun.job, Turn(Factors.of(begun.job.engine.module), steps)))
        if turns:
            take_turns(turns[0][0].engine.module, [turn for _, turn in turns])
    return turns[0][0] if turns else None


def _begin(
    cfg: RunConfig,
    config: Path,
    here: World,
    screen: Console,
    asked: Asked,
    stack: contextlib.ExitStack,
    base: Job | None,
) -> Begun | None:
    """Set up, on the base of another run where there is one; None where the run was finished already."""
    grid = base.engine.grid if base else grids.make(cfg.parallel, here)
    folder, identity = setup.open_base(cfg, screen)
    cfg = planning.with_attention(cfg, str(folder.config.get("model_type")), here.device.type == "cuda")
    resume, notes = on_rank_zero(lambda: resuming.find_checkpoint(cfg))
    start = on_rank_zero(lambda: None if resume else setup.find_init_adapter(cfg, folder, identity))
    data = run_data.read_data(cfg, folder, grid, screen)
    run_data.say_data(cfg, data, grid, screen)
    saved = on_rank_zero(lambda: resuming.read_state(cfg, identity, data, resume)) if resume else None
    if saved and saved.step >= data.plan.total_steps:
        way_on = "a larger train.max_steps or train.epochs goes on"
        screen.line(f"finished already: {saved.step} of {data.plan.total_steps} steps are done; {way_on}")
        _mark_finished(cfg, saved.step, here)
        return None
    step, tokens_seen = (saved.step, saved.tokens_seen) if saved else (0, 0)
    seen = on_rank_zero(lambda: resuming.validation_before(cfg, step))
    if _is_over(cfg, seen):
        screen.line(f"finished already, at step {step}: {_no_better(seen)}; a larger early_stop.patience goes on")
        return None
    model, dropout, more = on_every_rank(lambda: setup.build_model(cfg, folder, start, resume))
    on_rank_zero(lambda: _check_space(cfg, setup.count(model)))
    limit = fits.device_gib(here.device)
    if base is None:
        cfg, planned = on_every_rank(lambda: _plan(cfg, folder, data, grid, screen, limit, asked.ignore_plan))
        job = setup.start_engine(cfg, model, dropout, folder, identity, data, grid, screen, start)
    else:
        same = {key: getattr(base.cfg, key) for key in search.AUTO}
        cfg, planned = cfg.model_copy(update=same), {"unknown": f"the base is counted in {base.cfg.run_dir}"}
        job = beside.start_engine(cfg, base, model, data, start)
        screen.line(f"beside   {base.cfg.run_dir}: {cfg.run_dir} trains {job.parameters.trainable:,} parameters")
    for note in (*notes, *data.notes, *more):
        screen.line(f"note     {note}")
    if resume and saved:
        checkpoint.restore(job.engine, resume, saved, job.key)
        screen.line(f"resumed  {resume}: {saved.step} of {data.plan.total_steps} steps are done")
    loading = memory.measure(here.device, job.engine.tracked, memory.since_start(here.device, "load"))
    own = stack.enter_context(runlog.RankMemory(cfg.run_dir, here.rank, step or None))
    own.write({"step": step, "phase": "load", **loading})
    kept: list[RunLog] = []
    on_rank_zero(lambda: kept.append(stack.enter_context(open_log(job, config, step, planned, loading))))
    label = f"{cfg.run_dir.name}: " if asked.beside else ""
    return Begun(job, kept[0] if kept else None, own, (step, tokens_seen, seen), label)


def _steps(begun: Begun, screen: Console, stop: StopRequest, pulse: Pulse, job_started: float) -> Iterator[None]:
    """The steps from those that are behind to the last, one each time that it is asked."""
    job, log, own = begun.job, begun.log, begun.own
    cfg, engine, data, total = job.cfg, job.engine, job.data, job.data.plan.total_steps
    first, tokens_seen, seen = begun.behind
    learning, pace = guards.LearningGuard(engine), Pace(job.world.device)
    end_of_job, step_seconds, save_seconds = deadline(job_started, cfg.max_hours, os.environ), 0.0, 0.0
    with Books(job, log, screen, first, begun.label) as books:
        if data.validation and first == 0:
            val_loss = engine.evaluate(data.validation)
            screen.line(f"before   val_loss {val_loss:.4f}")
            seen = seen.after(0, val_loss)
            books.step(lambda: {"step": 0, "val_loss": val_loss})
        snapshot = memory.Snapshot(cfg.memory.snapshot_steps, runlog.log_path(cfg.run_dir, job.world.rank))
        before = engine.clock.now()
        away = 0.0  # seconds since the last step that are no training: evaluation, saving
        stop.in_loop = True
        pairs = engine.clock.timed("data", with_next(data.plan.steps(first)))
        for number, (step, after) in enumerate(pairs, start=first):
            done = number + 1
            lr = learning_rate(number, total, cfg.train)
            begin_time = time.time()
            must_end = partial(_must_end, stop, end_of_job, step_seconds, save_seconds)
            snapshot.before(done)
            if away > LEAST_AWAY and not engine.has_begun:
                engine.clock.rest()
                before = engine.clock.now()
            away = 0.0
            with pulse.step(done):
                finish = engine.start_step(step, number, lr, must_end, books.settle)
                phases = engine.clock.memory.take()
                held = memory.measure(job.world.device, engine.tracked, phases)  # while the device works
                own.write({"step": done, **held})
                alone = not begun.label  # else the layers hold other runs' factors before the next step
                if after and alone and number > first and not _pauses(cfg, done):
                    engine.begin(after, number + 1)
                result = finish()
                snapshot.after(done)
                guards.check_finite(done, result, step.names)
                learning.after_step(done, lr, step.target_tokens)
            tokens_seen += step.tokens
            seconds, before = seconds_between(before, result.ended), result.ended  # data and our own books included
            books.step(partial(metrics.row, done, result, lr, step, seconds, job, held))
            figures, slow = pace.measure(done)
            for text in slow:
                screen.line(text)
            if data.validation and (done == total or (cfg.eval.every and done % cfg.eval.every == 0)):
                paused = time.perf_counter()
                figures |= job.evaluate(done)
                away += time.perf_counter() - paused
                seen = seen.after(done, figures["val_loss"])
            ends = done == total or result.stop or _is_over(cfg, seen)
            best = cfg.save.best is not None and seen.is_best(done)
            last = ends and (cfg.save.last or done < total)
            saves = last or best or bool(cfg.save.every and done % cfg.save.every == 0)
            if ends:
                engine.forget()
            if saves or figures:
                books.write(figures, sync=saves)  # before the save: a run that resumes from it finds all its rows
            if saves:
                path, save_seconds = _save(job, done, tokens_seen, best)
                away += save_seconds
                print(f"saved {path} in {save_seconds:.2f} s", flush=True)  # into the log
                saving = engine.clock.memory.take()
                own.write({"step": done, "phase": "save", "phases": saving}, flush=True)
                books.write({"save_seconds": save_seconds, **({"save_memory": saving["save"]} if saving else {})})
            step_seconds = time.time() - begin_time
            if number == first:
                away += _freeze()
            if ends:
                break
            paused = time.perf_counter()
            yield
            away += time.perf_counter() - paused  # the turns of others
    if saves:  # before any last words
        on_rank_zero(lambda: screen.line(f"saved    {path} ({size(checkpoints.nbytes(path))})"))
    if done < total and (result.stop or not _is_over(cfg, seen)):
        raise InterruptedRunError(
            f"interrupted after step {done} of {total}, checkpoint saved; the same command goes on from there"
        )
    _mark_finished(cfg, done, job.world)
    if done < total:
        screen.line(f"finished early, at step {done} of {total}: {_no_better(seen)}")
        return
    end = f"; val_loss {figures['val_loss']:.4f}" if data.validation else ""
    screen.line(f"finished {total} steps in {books.seconds:.0f} s{end}")


def _pauses(cfg: RunConfig, done: int) -> bool:
    """Whether something is to be done between this step and the next, or is recorded of one of them alone."""
    every = (cfg.eval.every, cfg.save.every)
    return any(n and done % n == 0 for n in every) or bool({done, done + 1} & set(cfg.memory.snapshot_steps or ()))


def _freeze() -> float:
    """Let Python look for garbage only in what comes from here on: to look through all there is now takes tenths of
    a second, in the middle of a step. The seconds of this last time."""
    began = time.perf_counter()
    gc.collect()
    gc.freeze()
    return time.perf_counter() - began


def _mark_finished(cfg: RunConfig, steps: int, here: World) -> None:
    on_rank_zero(lambda: runlog.mark_finished(cfg.run_dir, {"steps": steps, "ranks": here.size}))


def _must_end(stop: StopRequest, end_of_job: Deadline, step_seconds: float, save_seconds: float) -> bool:
    """Whether this step must be the last of this job."""
    return stop.asked or end_of_job.is_near(time.time(), step_seconds, save_seconds)


def _is_over(cfg: RunConfig, seen: Validation) -> bool:
    """Whether `early_stop` says so."""
    return cfg.early_stop.patience is not None and seen.waited >= cfg.early_stop.patience


def _no_better(seen: Validation) -> str:
    return f"no val_loss below {seen.best:.4f} (step {seen.step}) in {seen.waited} evaluations"


def _check_space(cfg: RunConfig, parameters: setup.Parameters) -> None:
    """Before any GPU hour: a value and two moments in fp32 for everything that trains, `save.keep` + 1 times."""
    checkpoints.check_space(cfg.run_dir, 12 * parameters.trainable, cfg.save.most)


def _enter(run_dir: Path, token: str, screen: Console, stack: contextlib.ExitStack) -> None:
    """Make the run directory this process's own and tidy up what killed runs left in it."""
    lease = stack.enter_context(contextlib.closing(Lease(run_dir, lambda text: screen.live(lambda: text))))
    if lease.warning:
        screen.line(f"warning  {run_dir}: {lease.warning}")
    durable.remove_leftovers(run_dir / CHECKPOINTS)
    console.forget_claims(run_dir, but=token)


def _plan(
    cfg: RunConfig,
    folder: ModelFolder,
    data: run_data.Data,
    grid: grids.Grid,
    screen: Console,
    limit_gib: float | None,
    ignore: bool,
) -> tuple[RunConfig, dict[str, Any]]:
    """The config with what is `auto` in it settled, and what is predicted of it, for the manifest; DoesNotFitError
    where it cannot fit in `limit_gib` a GPU."""
    job = fits.job_of(cfg, folder, data, grid)
    if job is None:
        if key := search.unsettled(cfg):
            raise ConfigError(
                f"{key} is auto, but what a model of type {folder.config.get('model_type')} keeps is "
                "not known here; write all, none or a number of layers"
            )
        return cfg, {"unknown": f"model type {folder.config.get('model_type')} has no row of shapes"}
    job = search.settled(job, limit_gib)
    row = planning.plan(job)
    chosen = "".join(f"; {key}={getattr(job.cfg, key)}" for key in search.AUTO if getattr(cfg, key) == "auto")
    screen.line(f"plan     {fits.check(job, row, limit_gib, ignore)}{chosen}")
    here = min(grid.world.size, torch.cuda.device_count())
    for text in (*row["warnings"], *fits.host_warnings(job.cfg, row, here)):
        screen.line(f"warning  {text}")
    return job.cfg, row


def _save(job: Job, step: int, tokens_seen: int, best: bool) -> tuple[Path, float]:
    """Write a checkpoint, then delete those that `save.keep` leaves out; its path and the seconds it took."""
    start = time.perf_counter()
    folder = job.cfg.run_dir / CHECKPOINTS
    with job.engine.clock.memory.phase("save"):
        path = checkpoint.save(job.engine, job.state(step, tokens_seen), folder, job.write_adapter_config, job.key)
    if best:
        on_rank_zero(lambda: checkpoints.mark_best(folder, step))
    on_rank_zero(lambda: checkpoints.prune(folder, job.cfg.save.keep) and None)
    return path, time.perf_counter() - start
