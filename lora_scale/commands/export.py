"""`lora-scale export`: a checkpoint's adapter in PEFT form, compared with PEFT before it gets its name."""

import importlib.util
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click

from lora_scale.adapters import peft
from lora_scale.adapters.peft import Adapter
from lora_scale.commands.options import EXIT_CODES
from lora_scale.parallel import checkpoint, verify
from lora_scale.spec.baselines import METHODS
from lora_scale.spec.config import ModelConfig
from lora_scale.spec.errors import CheckpointError, DoesNotFitError, LoraScaleError, ModelError, UsageError
from lora_scale.storage import checkpoints, hub, runlog
from lora_scale.storage.durable import whole_directory
from lora_scale.storage.folder import ModelFolder, fingerprint, open_folder

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # the values that its --max-lora-rank takes

Dtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint, and what is known of its base."""

    path: Path
    """The checkpoint's folder."""
    state: checkpoint.State
    model: ModelConfig | None
    named_base: bool
    """The user gave --base: it must then be the right one, also where the export is not verified."""


@click.command(epilog=EXIT_CODES)
@click.argument("source", metavar="RUN_OR_CHECKPOINT", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; it must be new or empty.")
@click.option(
    "--dtype", type=click.Choice(list(peft.DTYPES)), default="fp32", show_default=True, help="Of the factors."
)
@click.option("--base", help="The base model, if it is not where the run had it: a folder, or a name on the hub.")
@click.option("--base-name", help="What to call the base in the files. Default: its name on the hub, or its folder's.")
@click.option(
    "--verify/--no-verify",
    "wanted",
    default=None,
    help="Compare logits with PEFT's before anything gets its name. Default: if the base is here and fits in memory.",
)
def command(
    source: Path, out: Path, dtype: Dtype, base: str | None, base_name: str | None, wanted: bool | None
) -> None:
    """Write the adapter of a run's newest checkpoint, or of a given one, as a folder that PEFT and vLLM load.

    \b
    lora-scale export runs/x --out adapters/x
    lora-scale export runs/x/checkpoints/step-000500 --out adapters/x-500 --dtype bf16

    The folder holds a few megabytes: adapter_model.safetensors and adapter_config.json, with no path, user or machine
    in them. The base model is not in it and is not changed.
    """
    found = find(source, base)
    adapter = peft.read_adapter(found.path)
    _refuse_used(out)
    name = base_name or (peft.public_name(base) if base else adapter.config["base_model_name_or_path"])
    with whole_directory(out) as partial:
        peft.write_adapter(partial, adapter.factors, adapter.config | {"base_model_name_or_path": name}, dtype)
        verdict = _verdict(found, adapter, partial, dtype, wanted)
    size = sum(file.stat().st_size for file in out.iterdir())
    click.echo(
        f"wrote    {out} ({size / 2**20:.1f} MiB, {dtype}, {len(adapter.modules)} layers, r = {adapter.max_rank})"
    )
    click.echo(f"from     {found.path} (step {found.state.step:,}, {found.state.tokens_seen:,} tokens seen)")
    click.echo(verdict)
    click.echo("\n".join(_ways_to_use(adapter, out, found.model.path if found.model else name)))


def find(source: Path, base: str | None) -> Source:
    """The checkpoint that `source` names, with its run's model; a checkpoint of full fine-tuning has no adapter."""
    path = source if (source / checkpoint.STATE).is_file() else _newest(source)
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
    model = None
    if (run / runlog.RESOLVED).is_file():
        model = ModelConfig.model_validate(runlog.read_resolved_config(run)["model"])
    if base is not None:
        model = model.model_copy(update={"path": base, "revision": None}) if model else ModelConfig(path=base)
    return Source(path, state, model, named_base=base is not None)


def _newest(run: Path) -> Path:
    folder = run / runlog.CHECKPOINTS
    if not folder.is_dir():
        what = "is neither a run directory nor a checkpoint" if run.is_dir() else "does not exist"
        raise CheckpointError(f"{run} {what}; a run directory has {runlog.CHECKPOINTS}/ in it")
    for _, what in checkpoints.list_damaged(folder):
        click.echo(f"skipped  {what}", err=True)
    whole = checkpoints.list_checkpoints(folder)
    if not whole:
        raise CheckpointError(f"{run} has no whole checkpoint; the run that writes one is `lora-scale train`")
    return whole[-1][1]


def _refuse_used(out: Path) -> None:
    """An empty folder gives way to the one that gets its name when it is whole."""
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()
    elif out.exists():
        raise UsageError(f"--out is {out}, which is {'not empty' if out.is_dir() else 'a file'}; name a new folder")


def _verdict(found: Source, adapter: Adapter, exported: Path, dtype: Dtype, wanted: bool | None) -> str:
    """One line on what PEFT makes of the folder. What hinders the comparison is an error only for who asked for it."""
    skipped = "not verified: --no-verify"
    if wanted is False and not found.named_base:
        return skipped
    try:
        base = _open_base(found, download=bool(wanted))
    except (ModelError, UsageError) as reason:
        if wanted or found.named_base:
            raise
        return f"not verified: {reason}"
    _refuse_another_base(base, found)
    if wanted is False:
        return skipped
    try:
        _check_possible(base)
    except (DoesNotFitError, UsageError) as reason:
        if wanted:
            raise
        return f"not verified: {reason}"
    return _compare(found, base, adapter, exported, dtype)


def _open_base(found: Source, download: bool) -> ModelFolder:
    if found.model is None:
        raise UsageError(f"{found.path} is not in its run directory, which says where the base is; give --base")
    if not download and not Path(found.model.path).expanduser().exists():
        raise ModelError(f"the base {found.model.path} is no folder here; give --base, or --verify to fetch it")
    return open_folder(hub.resolve(found.model), found.model.trust_remote_code)


def _refuse_another_base(base: ModelFolder, found: Source) -> None:
    here, trained_on = fingerprint(base), found.state.base_fingerprint
    if here != trained_on:
        raise CheckpointError(
            f"{found.path} was trained on another base than {base.path}: its fingerprint is {trained_on[:19]}..., "
            f"this folder's {here[:19]}...; give --base with the model of the run"
        )


def _check_possible(base: ModelFolder) -> None:
    if importlib.util.find_spec("peft") is None:
        raise UsageError("peft is not installed; pip install peft")
    needed, free = verify.bytes_needed(base), verify.bytes_free()
    if needed > free:
        raise DoesNotFitError(
            f"comparing takes {needed / 2**30:.1f} GiB of memory (the base in fp32), {free / 2**30:.1f} GiB are free; "
            f"run it on a larger machine, or with --no-verify"
        )


def _compare(found: Source, base: ModelFolder, adapter: Adapter, exported: Path, dtype: Dtype) -> str:
    trust = found.model is not None and found.model.trust_remote_code
    result = verify.compare(base.path, exported, adapter, dtype, trust)
    if not result.equal:
        raise LoraScaleError(
            f"nothing was written: PEFT's logits differ from ours by up to {result.difference:.1e} "
            f"(the largest is {result.logit:.1f}); this is a fault of lora-scale, please report it"
        )
    rounding = f"; {dtype} rounding moves them by up to {result.rounding:.1e}" if dtype != "fp32" else ""
    return (
        f"verified PEFT's logits equal ours in fp32: largest difference {result.difference:.1e}{rounding}; "
        f"the adapter moves the base's by up to {result.moved:.2f}"
    )


def _ways_to_use(adapter: Adapter, out: Path, base: str) -> Iterator[str]:
    """A snippet for PEFT, and a command for vLLM where it would compute the same."""
    yield f"""
with PEFT:
  from peft import PeftModel
  from transformers import AutoModelForCausalLM
  model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {str(out)!r})

with vLLM:"""
    rank = next((rank for rank in VLLM_RANKS if rank >= adapter.max_rank), None)
    if adapter.config.get("rank_pattern") or adapter.config.get("alpha_pattern"):
        yield "  not this adapter: vLLM ignores rank_pattern and alpha_pattern, and would scale its layers wrongly"
    elif rank is None:
        yield f"  not this adapter: vLLM takes ranks up to {VLLM_RANKS[-1]}, and this one has r = {adapter.max_rank}"
    else:
        module = shlex.quote(f"{out.name}={out}")
        yield f"  vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {rank} --lora-modules {module}"
