"""`lora-scale export`: a checkpoint's adapter in PEFT form, compared with PEFT before it gets its name."""

import importlib.util
import json
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click

from lora_scale.adapters import peft
from lora_scale.adapters.peft import Adapter
from lora_scale.commands.options import EXIT_CODES
from lora_scale.parallel import verify
from lora_scale.parallel.source import Source, find, refuse_another_base, refuse_used
from lora_scale.spec import servers
from lora_scale.spec.config import ModelConfig
from lora_scale.spec.errors import DoesNotFitError, LoraScaleError, ModelError, UsageError
from lora_scale.storage import companions, hub, runlog
from lora_scale.storage.card import Training, adapter_card
from lora_scale.storage.durable import whole_directory, write_file
from lora_scale.storage.folder import ModelFolder, fingerprint, open_folder
from lora_scale.storage.staging import disk_errors

Dtype = Literal["fp32", "bf16", "fp16"]


@dataclass(frozen=True, slots=True)
class Base:
    """What the adapter stands on: where it is to be found, and what it is called in files."""

    model: ModelConfig | None
    name: str
    revision: str | None
    model_type: str | None
    """By config.json, where the base is here."""
    given: bool
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
    """Write the adapter of a run's newest checkpoint, or of a given one; for full weights see `lora-scale merge`.

    \b
    lora-scale export runs/x --out adapters/x
    lora-scale export runs/x/checkpoints/step-000500 --out adapters/x-500 --dtype bf16

    The folder holds a few megabytes that PEFT, vLLM and SGLang load: adapter_model.safetensors, adapter_config.json
    and a README.md with data, settings and losses; no path, user or machine is in them. The base is not in it. The
    last lines are the commands that use it.
    """
    found = find(source)
    for note in found.notes:
        click.echo(f"skipped  {note}", err=True)
    adapter = peft.read_adapter(found.path)
    refuse_used(out)
    on = _base(found, adapter, base, base_name)
    config = adapter.config | {"base_model_name_or_path": on.name, "revision": on.revision}
    with disk_errors(f"{out} was not written"), whole_directory(out) as partial:
        peft.write_adapter(partial, adapter.factors | adapter.others, config, dtype, found.base_fingerprint)
        for name, file in companions.of_tokenizer(found.path).items():
            write_file(partial / name, [file.read_bytes()])
        write_file(partial / "README.md", [_card(found, on.name, config).encode()])
        verdict = _verdict(found, on, adapter, partial, dtype, wanted)
    size = sum(file.stat().st_size for file in out.iterdir())
    click.echo(
        f"wrote    {out} ({size / 2**20:.1f} MiB, {dtype}, {len(adapter.modules)} layers, r = {adapter.max_rank})"
    )
    trained = f" (step {found.state.step:,}, {found.state.tokens_seen:,} tokens seen)" if found.state else ""
    click.echo(f"from     {found.path}{trained}")
    click.echo(verdict)
    click.echo("\n".join(_ways_to_use(config, adapter, out, on)))


def _base(found: Source, adapter: Adapter, base: str | None, base_name: str | None) -> Base:
    """The base as the run had it or as --base says, and a name for it that means something elsewhere."""
    model = found.model
    if base is not None:
        model = model.model_copy(update={"path": base, "revision": None}) if model else ModelConfig(path=base)
    named = str(adapter.config.get("base_model_name_or_path") or "")
    name = peft.checked_name(base_name) or (
        peft.public_name(base) if base else peft.public_name(named) if named else "unknown"
    )
    revision = model.revision or hub.commit_of(Path(model.path)) if model else None
    return Base(model, name, revision or adapter.config.get("revision"), _model_type(model), given=base is not None)


def _model_type(model: ModelConfig | None) -> str | None:
    file = Path(model.path).expanduser() / "config.json" if model else None
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["model_type"]) if file else None
    except (OSError, ValueError, KeyError, TypeError):  # the base is not here, or not whole: the comparison says so
        return None


def _card(found: Source, name: str, config: dict[str, Any]) -> str:
    training = None
    if found.run is not None and (found.run / runlog.MANIFEST).is_file():
        training = Training(
            runlog.read_resolved_config(found.run), runlog.read_manifest(found.run), runlog.read_metrics(found.run)
        )
    return adapter_card(name, found.base_fingerprint, config, found.state.step if found.state else None, training)


def _verdict(found: Source, on: Base, adapter: Adapter, exported: Path, dtype: Dtype, wanted: bool | None) -> str:
    """One line on what PEFT makes of the folder. What hinders the comparison is an error only for who asked for it."""
    skipped = "not verified: --no-verify"
    if wanted is False and not on.given:
        return skipped
    try:
        base = _open_base(found, on, download=bool(wanted))
    except (ModelError, UsageError) as reason:
        if wanted or on.given:
            raise
        return f"not verified: {reason}"
    refuse_another_base(found, base, fingerprint(base), "give --base with the model of the run")
    if wanted is False:
        return skipped
    try:
        _check_possible(base)
    except (DoesNotFitError, UsageError) as reason:
        if wanted:
            raise
        return f"not verified: {reason}"
    return _compare(on, base, adapter, exported, dtype)


def _open_base(found: Source, on: Base, download: bool) -> ModelFolder:
    if on.model is None:
        raise UsageError(f"{found.path} is not in its run directory, which says where the base is; give --base")
    if not download and not Path(on.model.path).expanduser().exists():
        raise ModelError(f"the base {on.model.path} is no folder here; give --base, or --verify to fetch it")
    return open_folder(hub.resolve(on.model), on.model.trust_remote_code)


def _check_possible(base: ModelFolder) -> None:
    if importlib.util.find_spec("peft") is None:
        raise UsageError("peft is not installed; pip install peft")
    needed, free = verify.bytes_needed(base), verify.bytes_free()
    if needed > free:
        raise DoesNotFitError(
            f"comparing takes {needed / 2**30:.1f} GiB of memory (the base in fp32), {free / 2**30:.1f} GiB are free; "
            f"run it on a larger machine, or with --no-verify"
        )


def _compare(on: Base, base: ModelFolder, adapter: Adapter, exported: Path, dtype: Dtype) -> str:
    trust = on.model is not None and on.model.trust_remote_code
    result = verify.compare(base, exported, adapter, dtype, trust)
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


def _ways_to_use(config: Mapping[str, Any], adapter: Adapter, out: Path, on: Base) -> Iterator[str]:
    """Commands to copy; a server that would not compute the same is named with the reason instead."""
    base = on.model.path if on.model else on.name
    yield f"""
with PEFT:
  from peft import PeftModel
  from transformers import AutoModelForCausalLM
  model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {str(out)!r})
"""
    module, served = shlex.quote(f"{out.name}={out}"), shlex.quote(base)
    modules, rank = adapter.modules, adapter.max_rank
    for server, rules in servers.SERVERS.items():
        yield f"with {server} (rules of {rules.read}):"
        reasons = rules.reasons(config, modules, rank, on.model_type)
        yield from (f"  not this adapter: {reason}" for reason in reasons)
        yield "  `lora-scale merge` makes a model for it" if reasons else "  " + rules.command(served, module, rank)
    yield f"\nto the hub:\n  hf upload ORG/{shlex.quote(out.name)} {shlex.quote(str(out))}"
