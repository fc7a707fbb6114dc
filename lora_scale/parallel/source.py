"""Where an adapter comes from: a run directory, one of its checkpoints, or a folder that `export` or PEFT wrote.

And which base it is for. Reads small files and headers only; the tensors are `adapters.peft`'s.
"""

from dataclasses import dataclass
from pathlib import Path

from lora_scale.adapters import peft
from lora_scale.parallel import checkpoint
from lora_scale.parallel.checkpoint import State
from lora_scale.spec.baselines import METHODS
from lora_scale.spec.config import ModelConfig
from lora_scale.spec.errors import CheckpointError, UsageError
from lora_scale.storage import checkpoints, runlog
from lora_scale.storage.folder import ModelFolder


@dataclass(frozen=True, slots=True)
class Source:
    """A folder with an adapter in it, and what is known of its base."""

    path: Path
    base_fingerprint: str | None
    """None for an adapter that did not come from this program: its base is known by name at most."""
    state: State | None = None
    """Of a checkpoint."""
    model: ModelConfig | None = None
    """Of the run that the checkpoint lies in."""
    run: Path | None = None
    notes: tuple[str, ...] = ()
    """What was passed over on the way."""


def find(path: Path) -> Source:
    """The newest whole checkpoint of a run, a given checkpoint, or an adapter folder; CheckpointError for others."""
    if not (path / checkpoint.STATE).is_file() and (path / peft.CONFIG_FILE).is_file():
        return Source(path, peft.base_fingerprint(path))
    notes: list[str] = []
    if not (path / checkpoint.STATE).is_file():
        path, notes = _newest(path)
    state = checkpoint.read_state(path)
    if state.method in METHODS:
        raise CheckpointError(f"{path} is of method: {state.method}, which is there to be compared with: no PEFT form")
    if state.method != "lora":
        weights = checkpoint.WEIGHTS[state.method]
        raise CheckpointError(
            f"{path} is of full fine-tuning (method: {state.method}) and holds no adapter; its {weights} is the whole "
            f"model: copy the base's folder without its weights, and put this file there as model.safetensors"
        )
    run = path.absolute().parent.parent
    if not (run / runlog.RESOLVED).is_file():
        return Source(path, state.base_fingerprint, state, notes=tuple(notes))
    model = ModelConfig.model_validate(runlog.read_resolved_config(run)["model"])
    return Source(path, state.base_fingerprint, state, model, run, tuple(notes))


def _newest(run: Path) -> tuple[Path, list[str]]:
    folder = run / runlog.CHECKPOINTS
    if not folder.is_dir():
        what = "is neither a run directory nor a checkpoint nor an adapter" if run.is_dir() else "does not exist"
        raise CheckpointError(f"{run} {what}; a run directory has {runlog.CHECKPOINTS}/ in it")
    whole = checkpoints.list_checkpoints(folder)
    if not whole:
        raise CheckpointError(f"{run} has no whole checkpoint; the run that writes one is `lora-scale train`")
    return whole[-1][1], [what for _, what in checkpoints.list_damaged(folder)]


def refuse_another_base(source: Source, base: ModelFolder, here: str, way_out: str) -> None:
    """An adapter goes with the base it was trained on; one that says nothing of its base is taken as it is.

    `here` is the fingerprint of `base`.
    """
    trained_on = source.base_fingerprint
    if trained_on is not None and here != trained_on:
        raise CheckpointError(
            f"{source.path} was trained on another base than {base.path}: its fingerprint is {trained_on[:19]}..., "
            f"this folder's {here[:19]}...; {way_out}"
        )


def refuse_used(out: Path) -> None:
    """`--out` must be new or empty; an empty folder gives way to the one that gets its name when it is whole."""
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    elif out.exists():
        raise UsageError(f"--out is {out}, which is {'not empty' if out.is_dir() else 'a file'}; name a new folder")
