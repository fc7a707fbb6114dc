"""What is asked of generation: config, adapters, base and rows, read and checked before anything heavy is loaded.

Every process of a job does this by itself; nothing here is collective, and no weight of the base is read.
"""

import hashlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lora_scale
from lora_scale.adapters import peft
from lora_scale.adapters.peft import Adapter
from lora_scale.parallel import serving, source
from lora_scale.parallel.generation import Sampling
from lora_scale.spec import configfile
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import UsageError
from lora_scale.storage import encoder, hub, prompts, runlog, scores
from lora_scale.storage.folder import ModelFolder, fingerprint, open_folder
from lora_scale.storage.prompts import Prompt

BASE = "base"  # the name of the base without an adapter
_TAKEN = (BASE, "metrics")


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line says beside the config."""

    data: Path
    out: Path
    adapters: tuple[str, ...]
    with_base: bool
    allow_other_base: bool
    on_host: bool
    limit: int | None
    metrics: bool
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Work:
    """Everything that is known and checked before the base is loaded."""

    cfg: RunConfig
    folder: ModelFolder
    adapters: dict[str, tuple[Path, Adapter]]
    names: tuple[str, ...]  # in their order; BASE for the base alone
    tokenizer: Any
    prompts: list[Prompt]
    ends: list[int]
    scorer: scores.Scorer | None
    task: dict[str, Any]


def prepare(what: Path, overrides: tuple[str, ...], asked: Asked) -> Work:
    """Read all that is small, and refuse what cannot work; called by every process."""
    cfg = _config(what, overrides)
    named = list(asked.adapters)
    if not named and (what / runlog.CHECKPOINTS).is_dir():
        name = re.sub(r"[^\w.-]", "-", what.absolute().name).lstrip(".-") or "adapter"
        named = [f"{name}={what}"]
    folder = open_folder(hub.resolve(cfg.model, only_cached=True), cfg.model.trust_remote_code)
    identity = fingerprint(folder)
    adapters = _read(named, folder, identity, asked.allow_other_base)
    serving.check(folder, cfg, adapters)
    tokenizer = encoder.tokenizer(folder.path, cfg.model.trust_remote_code, cfg.data.chat_template)
    context = folder.config.get("max_position_embeddings") or folder.config.get("n_positions")
    longest = context - asked.sampling.max_new_tokens if isinstance(context, int) else None
    if longest is not None and longest < 1:
        raise UsageError(f"--max-new-tokens is {asked.sampling.max_new_tokens}; the model has {context} positions")
    rows = prompts.read(asked.data, tokenizer, longest, asked.limit, cfg.data.fields)
    scored = asked.metrics and any(row.reference is not None for row in rows)
    names = ((BASE,) if asked.with_base or not adapters else ()) + tuple(adapters)
    task = {
        "what": f"lora-scale {lora_scale.__version__} generate",
        "base": identity,
        "precision": cfg.precision,
        "adapters": {name: _sha256(adapters[name][0]) if name in adapters else None for name in names},
        "prompts": hashlib.sha256(repr([(row.line, row.ids, row.reference) for row in rows]).encode()).hexdigest(),
        "sampling": asdict(asked.sampling) | {"stop": list(asked.sampling.stop)},
    }
    ends = prompts.end_tokens(folder.path, tokenizer)
    return Work(cfg, folder, adapters, names, tokenizer, rows, ends, scores.Scorer() if scored else None, task)


def _read(
    named: list[str], folder: ModelFolder, identity: str, allow_other_base: bool
) -> dict[str, tuple[Path, Adapter]]:
    """The adapters of NAME=PATH texts, whole, finite, and of this base."""
    found: dict[str, tuple[Path, Adapter]] = {}
    for text in named:
        name, equals, path = text.partition("=")
        if not (equals and path and re.fullmatch(r"\w[\w.-]*", name)):
            raise UsageError(f"--adapter is {text!r}; write NAME=PATH, with a name that a file could have")
        if name in (*found, *_TAKEN):
            raise UsageError(f"--adapter is {text!r}, but the name {name!r} is taken; choose another")
        origin = source.find(Path(path))
        if not allow_other_base:
            source.refuse_another_base(origin, folder, identity, "set model.path to that base, or --allow-other-base")
        found[name] = (origin.path, peft.read_adapter(origin.path))
    return found


def _config(what: Path, overrides: tuple[str, ...]) -> RunConfig:
    """Of a config, a run, or a model folder; with what generation needs of it."""
    if (what / runlog.RESOLVED).is_file():
        cfg = configfile.load(what / runlog.RESOLVED, overrides)
    elif (what / "config.json").is_file():
        cfg = configfile.of_model(str(what), overrides)
    else:
        cfg = configfile.load(what, overrides)
    parallel = cfg.parallel.model_copy(update={"sequence_parallel": False})  # a step has one token
    return cfg.model_copy(update={"parallel": parallel, "method": "lora"})


def _sha256(adapter: Path) -> str:
    return hashlib.sha256((adapter / peft.WEIGHTS_FILE).read_bytes()).hexdigest()
