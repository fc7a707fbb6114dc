"""What `lora-scale analyze` is given: run directories, checkpoints, PEFT folders; opened and held against each other.

Reads adapters, states and records; computes nothing of them.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_scale.adapters import peft
from lora_scale.adapters.survey import Subject
from lora_scale.parallel import checkpoint
from lora_scale.spec.config import ModelConfig
from lora_scale.spec.errors import CheckpointError, ModelError, UsageError
from lora_scale.storage import checkpoints, hub, runlog
from lora_scale.storage.folder import ModelFolder, fingerprint, open_folder


@dataclass(frozen=True, slots=True)
class Opened:
    """One RUN of the command line."""

    subject: Subject
    path: Path  # of the folder that holds the adapter
    run: Path | None  # its run directory
    state: checkpoint.State | None  # None for a PEFT folder
    config: dict[str, Any]  # the run's resolved config, or nothing

    @property
    def name(self) -> str:
        return self.subject.name

    @property
    def val_losses(self) -> list[tuple[int, float]]:
        """(step, validation loss) of the run's records, up to the step that is looked at."""
        if self.run is None or not (self.run / runlog.METRICS).is_file():
            return []
        last = self.state.step if self.state else 0
        rows = [row for row in runlog.read_metrics(self.run) if row["step"] <= last]
        return [(row["step"], row["val_loss"]) for row in rows if isinstance(row.get("val_loss"), float)]


def open_all(paths: Sequence[Path]) -> list[Opened]:
    """Every RUN under a label of its own; two of different bases are refused, as far as they say which they had."""
    opened = [_open(path, name) for path, name in zip(paths, _labels(paths), strict=True)]
    known = [run for run in opened if run.state]
    for other in known[1:]:
        assert other.state and known[0].state
        if other.state.base_fingerprint != known[0].state.base_fingerprint:
            raise CheckpointError(
                f"{other.name} was trained on another base than {known[0].name} "
                f"({other.state.base_fingerprint[:19]}... and {known[0].state.base_fingerprint[:19]}...): "
                "directions of two bases have nothing in common; compare runs of one base"
            )
    return opened


def _labels(paths: Sequence[Path]) -> list[str]:
    """The last part of each path; more of it where two would be called the same."""
    absolute = [path.absolute() for path in paths]
    if len(set(absolute)) < len(absolute):
        twice = next(path for path in paths if absolute.count(path.absolute()) > 1)
        raise UsageError(f"{twice} is given twice; give each run once")
    for length in range(1, max(len(path.parts) for path in absolute) + 1):
        names = ["/".join(path.parts[-length:]) for path in absolute]
        if len(set(names)) == len(names):
            return names
    raise AssertionError("distinct paths have distinct parts")


def _open(path: Path, name: str) -> Opened:
    folder, run = path, None
    if not (path / peft.CONFIG_FILE).is_file():
        folder = newest(path)
    state = checkpoint.read_state(folder) if (folder / checkpoint.STATE).is_file() else None
    if state and state.method != "lora":
        raise CheckpointError(f"{folder} is of method: {state.method} and holds no adapter; give runs of method: lora")
    config: dict[str, Any] = {}
    if state and (folder.absolute().parent.parent / runlog.RESOLVED).is_file():
        run = folder.absolute().parent.parent
        config = runlog.read_resolved_config(run)
    adapter = peft.read_adapter(folder)
    gaussian = state is not None and state.lora.get("init_A") == "gaussian"
    subject = Subject(name, adapter, state.seed if state else None, "gaussian" if gaussian else "kaiming")
    return Opened(subject, folder, run, state, config)


def newest(run: Path) -> Path:
    """The newest whole checkpoint of a run directory."""
    if not run.is_dir():
        raise CheckpointError(f"{run} {'is a file' if run.exists() else 'does not exist'}; give a run directory")
    whole = checkpoints.list_checkpoints(run / runlog.CHECKPOINTS)
    if not whole:
        raise CheckpointError(
            f"{run} holds no adapter: neither {peft.CONFIG_FILE} nor a whole checkpoint in {runlog.CHECKPOINTS}/; "
            "give a run directory of `lora-scale train`, a checkpoint, or a PEFT folder"
        )
    return whole[-1][1]


def earlier(opened: Opened) -> Iterator[tuple[int, Subject]]:
    """(step, adapter) of every whole checkpoint of the run, oldest first; nothing where there is only one."""
    whole = checkpoints.list_checkpoints(opened.run / runlog.CHECKPOINTS) if opened.run else []
    if len(whole) > 1:
        for step, path in whole:
            yield step, Subject(opened.name, peft.read_adapter(path))


def find_base(opened: Sequence[Opened], given: str | None) -> tuple[ModelFolder | None, str]:
    """The base's headers, and a sentence on it. What hinders it is an error only where --base was given."""
    try:
        folder = _open_base(opened, given)
    except (ModelError, UsageError) as reason:
        if given is not None:
            raise
        return None, f"The base was not read: {reason}."
    here = fingerprint(folder)
    for run in opened:
        if run.state and run.state.base_fingerprint != here:
            raise CheckpointError(
                f"{run.name} was trained on another base than {folder.path}: its fingerprint is "
                f"{run.state.base_fingerprint[:19]}..., this folder's {here[:19]}...; give --base with the run's model"
            )
    return folder, f"Base: {peft.public_name(str(folder.path))}, {folder.config.get('model_type')}."


def _open_base(opened: Sequence[Opened], given: str | None) -> ModelFolder:
    models = [ModelConfig.model_validate(run.config["model"]) for run in opened if run.config]
    model = ModelConfig(path=given) if given is not None else next(iter(models), None)
    if model is None:
        raise UsageError("no RUN is in a run directory, which says where the base is; give --base")
    if given is None and not Path(model.path).expanduser().exists():
        raise ModelError(f"{model.path} is no folder here; give --base")
    return open_folder(hub.resolve(model), model.trust_remote_code)


def judged_alike(opened: Sequence[Opened]) -> bool:
    """Whether the runs' validation losses are of the same tokens, so that they can be compared."""
    judged = set()
    for run in opened:
        data = {key: value for key, value in run.config.get("data", {}).items() if key != "packing"}
        if not isinstance(data.get("validation"), float):  # a fraction is of the training rows, as the seed draws them
            data = {key: data.get(key) for key in ("validation", "seq_len", "train_on")}
        else:
            data["seed"] = run.config.get("seed")
        judged.add(json.dumps([data, run.config.get("eval", {}).get("max_blocks")], sort_keys=True))
    return len(judged) == 1


def same_but_for_seed(opened: Sequence[Opened]) -> list[list[Opened]]:
    """Groups of two and more runs whose configs differ in the seed (and the folder) alone: their spread is chance."""
    groups: dict[str, list[Opened]] = {}
    for run in opened:
        if run.config:
            rest = {key: value for key, value in run.config.items() if key not in ("seed", "run_dir", "resume")}
            groups.setdefault(json.dumps(rest, sort_keys=True), []).append(run)
    return [group for group in groups.values() if len(group) > 1]
