"""A training checkpoint: what trains, its moments, and a few integers. The frozen base is never gathered, copied or
written.

    step-000500/  adapter_model.safetensors  adapter_config.json  optimizer.safetensors  state.json      (method: lora)
                  weights.safetensors                             optimizer.safetensors  state.json      (method: full)
                  baseline.safetensors                            optimizer.safetensors  state.json      (the others)

Values and moments are whole fp32 tensors by name, so that a checkpoint fits any number of ranks. It is written beside
its final name, synced and renamed. Nothing in it is a pickle. The random state is not in it: dropout and data order
are functions of (seed, step).
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lora_scale.adapters import peft, principal
from lora_scale.adapters.lora import adapted_layers
from lora_scale.parallel import masters
from lora_scale.parallel.engine import Engine
from lora_scale.parallel.world import on_every_rank, on_rank_zero
from lora_scale.spec.baselines import METHODS
from lora_scale.spec.configfile import differences
from lora_scale.spec.errors import CheckpointError, TrainingError
from lora_scale.spec.layout import ByteRange
from lora_scale.storage import checkpoints
from lora_scale.storage.durable import whole_directory, write_text_atomically
from lora_scale.storage.weights import Reader, read_safetensors, write_safetensors

WEIGHTS = {"lora": peft.WEIGHTS_FILE, "full": "weights.safetensors", **dict.fromkeys(METHODS, "baseline.safetensors")}
OPTIMIZER, STATE = "optimizer.safetensors", "state.json"


@dataclass(frozen=True, slots=True)
class State:
    """What a run needs beside its tensors. `step` counts finished optimizer steps; with `data` it is the data
    position."""

    step: int
    method: str
    seed: int
    global_batch_size: int
    tokens_seen: int
    base_fingerprint: str
    config_sha256: str
    data: dict[str, Any]
    lora: dict[str, Any]
    versions: dict[str, str]
    baseline: dict[str, Any] = field(default_factory=dict)


def save(
    engine: Engine, state: State, folder: Path, write_extra: Callable[[Path], None], key: Callable[[str], str]
) -> Path:
    """Write `folder/step-NNNNNN` on rank 0 from all ranks' runs; collective. `key` maps a parameter's name to its
    name in files.

    When the disk is full, say, every rank gets the error, and what was written is removed.
    """
    final = folder / checkpoints.name(state.step)
    found = engine.parts()
    if not found or (empty := [p.name for p in found if 0 in p.shape]):
        what = f"{empty[0]} and {len(empty) - 1} others have no elements" if found else "nothing trains"
        raise TrainingError(f"step {state.step}: {final} is not written: {what}")
    layers = adapted_layers(engine.module)
    specs = [(key(p.name), "F32", principal.widened_shape(layers, p.name, p.whole_shape)) for p in found]
    moments = [(f"{key(p.name)}.{moment}", "F32", p.whole_shape) for moment in masters.MOMENTS for p in found]

    def values() -> Iterator[Tensor | None]:
        for name, tensor in masters.gather(engine.ds, found, masters.VALUE):
            yield None if tensor is None else principal.widened(layers, name, tensor)

    def both_moments() -> Iterator[Tensor | None]:
        for moment in masters.MOMENTS:
            yield from (tensor for _, tensor in masters.gather(engine.ds, found, moment))

    streams = (values(), both_moments())
    failure: Exception | None = None
    if engine.world.is_first:
        try:
            with whole_directory(final) as partial:
                write_safetensors(partial / WEIGHTS[state.method], specs, _bytes(streams[0]), {"format": "pt"})
                write_safetensors(partial / OPTIMIZER, moments, _bytes(streams[1]), {"format": "pt"})
                write_extra(partial)
                write_text_atomically(partial / STATE, json.dumps(asdict(state), indent=1) + "\n")
        except (OSError, CheckpointError) as error:
            failure = error
    for stream in streams:  # the other ranks give their part; rank 0 finishes what a failed write left
        for _ in stream:
            pass

    def outcome() -> Path:
        if failure is not None:
            raise CheckpointError(f"{final} was not written: {failure}")
        return final

    return on_rank_zero(outcome)


def _bytes(stream: Iterator[Tensor | None]) -> Iterator[memoryview]:
    for tensor in stream:
        assert tensor is not None
        yield memoryview(tensor.contiguous().view(-1).numpy())


def read_state(path: Path) -> State:
    """state.json of a checkpoint folder."""
    try:
        return State(**json.loads((path / STATE).read_text()))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is no checkpoint of this program: it has no {STATE}") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path / STATE} is damaged ({error}); delete {path} to go on from an older checkpoint"
        ) from error


def check_resumable(saved: State, now: State, path: Path) -> None:
    """A run resumes onto the same base, method, adapter, data and global batch, or says what is different."""
    if saved.base_fingerprint != now.base_fingerprint:
        raise CheckpointError(
            f"{path} was trained on another base model ({saved.base_fingerprint[:19]}..., now "
            f"{now.base_fingerprint[:19]}...); "
            "set model.path to that base, or another run_dir to start anew"
        )
    changed: list[str] = []
    for section in ("method", "seed", "global_batch_size", "lora", "baseline", "data"):
        before, after = getattr(saved, section), getattr(now, section)
        key = "train.global_batch_size" if section == "global_batch_size" else section
        if section == "lora" and not now.method.startswith("lora"):
            continue
        if section == "baseline" and now.method not in METHODS:
            continue
        changed += differences({key: before}, {key: after})
    if changed:
        raise CheckpointError(
            f"{path} belongs to another run: {'; '.join(changed)}. Set them back, or set another run_dir"
        )


def restore(engine: Engine, path: Path, state: State, key: Callable[[str], str]) -> None:
    """Read a checkpoint's tensors and put this rank's runs in place. All ranks fail together.

    Every rank reads the files; where a host does not see them, the first rank reads them for all.
    """

    found, layers = engine.parts(), adapted_layers(engine.module)

    def read() -> dict[str, dict[str, Tensor]]:
        shapes = {p.name: p.whole_shape for p in found}
        stored = {key(name): principal.widened_shape(layers, name, shape) for name, shape in shapes.items()}
        weights = _read(path / WEIGHTS[state.method], stored)
        wanted = {f"{key(name)}.{moment}": shape for moment in masters.MOMENTS for name, shape in shapes.items()}
        moments = _read(path / OPTIMIZER, wanted)
        values = {masters.VALUE: {name: principal.narrowed(layers, name, weights[key(name)]) for name in shapes}}
        return values | {m: {name: moments[f"{key(name)}.{m}"] for name in shapes} for m in masters.MOMENTS}

    seen = torch.tensor(float((path / STATE).is_file()), device=engine.world.device)
    dist.all_reduce(seen, op=dist.ReduceOp.MIN)
    values = on_every_rank(read) if seen.item() else _from_first(engine, found, read)
    masters.restore(engine.ds, found, values, state.step)


def _from_first(
    engine: Engine, parts: list[masters.Part], read: Callable[[], dict[str, dict[str, Tensor]]]
) -> dict[str, dict[str, Tensor]]:
    """What rank 0 reads, on every rank, tensor by tensor."""
    first = engine.world.is_first
    read_there = on_every_rank(lambda: read() if first else {})
    found: dict[str, dict[str, Tensor]] = {}
    for what in (masters.VALUE, *masters.MOMENTS):
        found[what] = {}
        for p in parts:
            tensor = read_there[what][p.name] if first else torch.empty(p.whole_shape, dtype=torch.float32)
            travelling = tensor.to(engine.world.device)
            dist.broadcast(travelling, src=0)
            found[what][p.name] = travelling.cpu()
    return found


def _read(path: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """All fp32 tensors of one file; the names and shapes must be exactly these."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; delete {path.parent} to go on from an older checkpoint")
    entries, _ = read_safetensors(path)
    if entries.keys() != shapes.keys():
        missing, extra = sorted(shapes.keys() - entries.keys()), sorted(entries.keys() - shapes.keys())
        first = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which this run does not train"
        raise CheckpointError(
            f"{path} {first} ({len(missing)} missing, {len(extra)} unexpected): lora.target_modules differ?"
        )
    tensors = {}
    with Reader() as reader:
        for name, entry in entries.items():
            if entry.shape != shapes[name] or entry.dtype != "F32":
                raise CheckpointError(
                    f"{path}: {name} is {entry.dtype} {entry.shape}; this run has F32 {shapes[name]}: lora.r differs?"
                )
            tensor = torch.empty(entry.shape, dtype=torch.float32)
            reader.read_into(
                ByteRange(entry.file, entry.offset, entry.nbytes, entry.dtype), memoryview(tensor.view(-1).numpy())
            )
            if not tensor.isfinite().all():
                raise CheckpointError(
                    f"{path}: {name} holds a value that is not finite; delete {path.parent} to go on from an "
                    "older checkpoint"
                )
            tensors[name] = tensor
    return tensors
