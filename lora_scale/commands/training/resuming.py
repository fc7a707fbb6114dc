"""Where a run goes on from, by `resume`: which checkpoint, whether it belongs to this run, and what was seen before."""

from pathlib import Path

from lora_scale.parallel import checkpoint, setup
from lora_scale.parallel import data as run_data
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import CheckpointError
from lora_scale.spec.progress import Validation, validation_so_far
from lora_scale.storage import checkpoints, runlog
from lora_scale.storage.runlog import CHECKPOINTS, METRICS


def find_checkpoint(cfg: RunConfig) -> tuple[Path | None, list[str]]:
    """Where to go on from, by `resume`, and what the user must hear of it; called on the first rank."""
    folder = cfg.run_dir / CHECKPOINTS
    found = checkpoints.list_checkpoints(folder)
    if isinstance(cfg.resume, Path):
        return _given_checkpoint(cfg.resume, found, cfg.run_dir), []
    damaged = checkpoints.list_damaged(folder)
    if cfg.resume == "never" and (found or damaged):
        raise CheckpointError(
            f"resume is never, but {cfg.run_dir} has checkpoints ({len(found) + len(damaged)}); "
            "set another run_dir, or resume=auto"
        )
    if damaged and not found:
        raise CheckpointError(
            f"{cfg.run_dir} has no whole checkpoint ({damaged[-1][1]}); "
            f"delete {folder} to start anew, or set another run_dir"
        )
    notes = [f"set aside as {path.name}: {what}" for path, what in checkpoints.set_aside_damaged(folder)]
    return (found[-1][1] if found else None), notes


def _given_checkpoint(path: Path, own: list[tuple[int, Path]], run_dir: Path) -> Path:
    """The checkpoint named by `resume`, unless it is damaged or the run has gone further already."""
    if not (path / checkpoint.STATE).is_file():
        raise CheckpointError(
            f"resume is {path}, which is no checkpoint: it has no {checkpoint.STATE}; "
            "give a folder like checkpoints/step-000500"
        )
    if problem := checkpoints.damage(path, named=False):
        raise CheckpointError(f"resume is {path}: {problem}")
    step = checkpoint.read_state(path).step
    later = [number for number, other in own if number > step]
    if later:
        raise CheckpointError(
            f"resume is {path}, but {run_dir} has a checkpoint of step {later[-1]} already; "
            "set resume=auto, or another run_dir"
        )
    return path


def read_state(cfg: RunConfig, identity: str, data: run_data.Data, path: Path) -> checkpoint.State:
    """The checkpoint's state, once it is known to belong to this run; before anything heavy is loaded."""
    saved = checkpoint.read_state(path)
    now = setup.state_of(cfg, identity, data, saved.step, saved.tokens_seen)
    checkpoint.check_resumable(saved, now, path)
    return saved


def validation_before(cfg: RunConfig, step: int) -> Validation:
    """What was evaluated up to the step that a resumed run goes on from."""
    if not step or not (cfg.run_dir / METRICS).is_file():
        return Validation()
    return validation_so_far([row for row in runlog.read_metrics(cfg.run_dir) if row["step"] <= step])
