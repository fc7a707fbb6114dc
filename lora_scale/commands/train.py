"""`lora-scale train`: from a config to a checkpoint. Set-up is a list of named steps; the loop is whole, in order, here."""

import contextlib
import faulthandler
import os
import sys
import time
import traceback
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from lora_scale.parallel import checkpoint, guards, local, metrics, setup, world
from lora_scale.parallel.setup import Job
from lora_scale.parallel.world import World, on_every_rank, on_rank_zero
from lora_scale.spec import configfile
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import CheckpointError, InterruptedRunError, LoraScaleError
from lora_scale.spec.schedule import learning_rate
from lora_scale.storage import checkpoints, console, durable, provenance
from lora_scale.storage.console import Console, StopRequest, bar
from lora_scale.storage.runlog import CHECKPOINTS, RunLog, log_path


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--ranks", type=click.IntRange(min=1), help="Local ranks to start. Default: one a visible GPU, or one process."
)
def command(config: Path, overrides: tuple[str, ...], ranks: int | None) -> None:
    """Train as CONFIG says: an adapter on a frozen, sharded base, or every weight (method=full).

    \b
    lora-scale train run.yaml                        on all GPUs of this machine
    lora-scale train run.yaml lora.r=16 train.lr=1e-4 --ranks 2
    deepspeed --module lora_scale train run.yaml     or torchrun, mpirun, srun: one process a GPU

    Started by a launcher it is one rank. Started by hand with more than one rank it runs the deepspeed launcher and
    prints the equivalent command. The same command again goes on from the newest checkpoint (resume: auto).

    Exit codes: 0 finished, 1 stopped by a fault or a guard, 2 wrong usage, config, model, data or checkpoint,
    75 interrupted but resumable.
    """
    here = world.from_environment()
    try:
        cfg = configfile.load(config, overrides)
    except LoraScaleError as error:
        if here and here.local_rank:  # every rank reads the same file: one a host says what is wrong with it
            sys.exit(error.exit_code)
        raise
    if here is None and (count := ranks or local.default_ranks()) > 1:
        arguments = ["train", str(config), *overrides]
        click.echo(f"{count} local ranks: {local.shown(count, arguments)}")
        sys.exit(local.run(count, arguments))
    sys.exit(_guarded(cfg, config, here))


def _guarded(cfg: RunConfig, config: Path, here: World | None) -> int:
    """Run, and let exactly one rank tell the screen what went wrong, after everything else, with its log's path."""
    rank = here.rank if here else 0
    screen = Console(rank)
    log = log_path(cfg.run_dir, rank)
    screen.redirect(log)
    faulthandler.enable()
    try:
        here = world.start(here, cfg.parallel.timeout_minutes)
        run(cfg, config, here, screen)
    except LoraScaleError as error:
        traceback.print_exc()
        if console.claim(cfg.run_dir, world.launch_token()):
            screen.error(f"lora-scale: {error}\n  log: {log}")
        world.stop()
        return error.exit_code
    except BaseException as error:
        traceback.print_exc()
        if console.claim(cfg.run_dir, world.launch_token()):
            screen.error(f"lora-scale: rank {rank} failed: {type(error).__name__}: {error}\n  log: {log}")
        sys.stderr.flush()
        os._exit(1)  # the others are in a collective: there is no orderly way out, and they must not wait for us
    world.stop()
    return 0


def run(cfg: RunConfig, config: Path, here: World, screen: Console) -> None:
    """One rank's whole run."""
    folder, identity = setup.open_base(cfg, screen)
    resume = on_rank_zero(lambda: _find_checkpoint(cfg))
    data = setup.read_data(cfg, folder, here)
    setup.say_data(cfg, data, here, screen)
    model, dropout, notes = on_every_rank(lambda: setup.build_model(cfg, folder))
    job = setup.start_engine(cfg, model, dropout, folder, identity, data, here, screen)
    for note in (*data.notes, *notes):
        screen.line(f"note     {note}")
    step, tokens_seen = _restore(job, resume) if resume else (0, 0)
    logs: list[RunLog] = []
    on_rank_zero(lambda: logs.append(_open_log(job, config, step)))  # stays with the first rank
    with contextlib.ExitStack() as stack:
        _loop(job, stack.enter_context(logs[0]) if logs else None, screen, step, tokens_seen)


def _loop(job: Job, log: RunLog | None, screen: Console, first: int, tokens_seen: int) -> None:
    """The steps from `first` (finished ones are not repeated) to the last."""
    cfg, engine, data, total = job.cfg, job.engine, job.data, job.data.plan.total_steps
    if first >= total:
        screen.line(f"finished already: {first} of {total} steps. A larger train.max_steps or train.epochs goes on")
        return
    learning, stop, val_loss = guards.LearningGuard(engine.ds), StopRequest(), None
    if data.validation and first == 0:
        val_loss = engine.evaluate(data.validation)
        screen.line(f"before   val_loss {val_loss:.4f}")
        if log:
            log.write_row({"step": 0, "val_loss": val_loss})
    metrics.reset_peak(job.world.device)
    started = time.perf_counter()
    for number, step in enumerate(data.plan.steps(first), start=first):
        begin, done = time.perf_counter(), number + 1
        lr = learning_rate(number, total, cfg.train)
        result = engine.train_step(step, number, lr, stop.asked)
        guards.check_finite(done, result.loss, result.grad_norm, step.names)
        learning.after_step(done, lr, step.target_tokens)
        tokens_seen += step.tokens
        row = metrics.row(done, result, lr, step.tokens, time.perf_counter() - begin, job.world, job.flops_per_token)
        last = done == total or result.stop
        if data.validation and (last or (cfg.eval.every and done % cfg.eval.every == 0)):
            row["val_loss"] = val_loss = engine.evaluate(data.validation)
        if last or (cfg.save.every and done % cfg.save.every == 0):
            path, row["save_seconds"] = _save(job, done, tokens_seen)
        if log:
            log.write_row(row)
        screen.live(lambda row=row: _line(row, total, first, val_loss, started), force=done in (first + 1, total))
    screen.line(f"saved    {path} ({checkpoints.nbytes(path) / 2**20:.1f} MiB)")
    if done < total:
        raise InterruptedRunError(
            f"interrupted after step {done} of {total}, checkpoint saved; the same command goes on from there"
        )
    end = f"; val_loss {val_loss:.4f}" if val_loss is not None else ""
    screen.line(f"finished {total} steps in {time.perf_counter() - started:.0f} s{end}")


def _line(row: dict[str, Any], total: int, first: int, val_loss: float | None, started: float) -> str:
    """The live line: where the run stands, how well, how fast, and when it ends."""
    done = row["step"]
    left = (time.perf_counter() - started) / (done - first) * (total - done)
    text = f"step {done}/{total} {bar(done, total, 16)} loss {row['loss']:.4f}"
    if val_loss is not None:
        text += f" val {val_loss:.4f}"
    text += f" lr {row['lr']:.1e} norm {row['grad_norm']:.2f} {row['tokens_per_second']:,.0f} tokens/s"
    if done >= first + 3:
        text += f" {left / 60:.0f} min left" if left > 90 else f" {left:.0f} s left"
    return text


def _find_checkpoint(cfg: RunConfig) -> Path | None:
    """Where to go on from, by `resume`; called on the first rank."""
    folder = cfg.run_dir / CHECKPOINTS
    if isinstance(cfg.resume, Path):
        if problem := checkpoints.damage(cfg.resume):
            raise CheckpointError(f"resume is {cfg.resume}: {problem}")
        return cfg.resume
    durable.remove_leftovers(folder)
    found = checkpoints.list_checkpoints(folder)
    if found and cfg.resume == "never":
        raise CheckpointError(
            f"resume is never, but {cfg.run_dir} has a checkpoint of step {found[-1][0]}; set another run_dir, or resume=auto"
        )
    return found[-1][1] if found else None


def _restore(job: Job, path: Path) -> tuple[int, int]:
    """Put a checkpoint's tensors in place; (finished steps, tokens seen)."""
    saved = checkpoint.read_state(path)
    checkpoint.check_resumable(saved, job.state(saved.step, saved.tokens_seen), path)
    checkpoint.restore(job.engine, path, saved, job.key)
    return saved.step, saved.tokens_seen


def _save(job: Job, step: int, tokens_seen: int) -> tuple[Path, float]:
    """Write a checkpoint, then delete those that `save.keep` leaves out; its path and the seconds it took."""
    start = time.perf_counter()
    folder = job.cfg.run_dir / CHECKPOINTS
    path = checkpoint.save(job.engine, job.state(step, tokens_seen), folder, job.write_adapter_config, job.key)
    on_rank_zero(lambda: checkpoints.prune(folder, job.cfg.save.keep) and None)
    return path, time.perf_counter() - start


def _open_log(job: Job, config: Path, step: int) -> RunLog:
    """The run directory's records, with the manifest written; for the first rank."""
    log = RunLog(
        job.cfg.run_dir,
        config_text=config.read_text(encoding="utf-8"),
        resolved=job.cfg.model_dump(mode="json"),
        resumed_step=step or None,
    )
    log.write_manifest(
        {
            "command": provenance.command(),
            "commit": provenance.commit(),
            "versions": provenance.versions(),
            "hardware": setup.hardware(job.world),
            "ranks": job.world.size,
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "resumed_step": step,
            "base_fingerprint": job.base_fingerprint,
            "config_sha256": configfile.config_sha256(job.cfg),
            "parameters": asdict(job.parameters),
            "load": {"bytes": job.loaded.nbytes, "seconds": round(job.loaded.seconds, 3)},
            "data": job.data.blocks.stats(),
        }
    )
    return log
