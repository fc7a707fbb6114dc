"""`lora-scale merge`: base + adapters -> a model folder, file by file; killed and called again, it goes on."""

import hashlib
import math
import os
import shlex
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

import lora_scale
from lora_scale.adapters import merging, peft, rewriting
from lora_scale.adapters.merging import Plan
from lora_scale.adapters.peft import Adapter
from lora_scale.commands.options import EXIT_CODES
from lora_scale.parallel import load, source
from lora_scale.parallel.source import Source
from lora_scale.spec.config import ModelConfig
from lora_scale.spec.errors import DoesNotFitError, ModelError, UsageError
from lora_scale.storage import companions, durable, hub
from lora_scale.storage.card import merged_card
from lora_scale.storage.console import Console, bar, size
from lora_scale.storage.folder import ModelFolder, fingerprint, open_folder
from lora_scale.storage.staging import disk_errors, free_for, resumable_directory, unfinished

TASK = "merge.json"  # in the result: what was merged


@dataclass(frozen=True, slots=True)
class Part:
    """One adapter of the sum."""

    source: Source
    adapter: Adapter
    weight: float


@click.command(epilog=EXIT_CODES)
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; it must be new or empty.")
@click.option(
    "--base", help="The base model: a folder, or a name on the hub. Default: the run's, or what ADAPTER names."
)
@click.option("--weights", help="Of each ADAPTER in the sum, with commas: 0.7,0.3. Default: 1 each.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: one a core, at most 8.")
@click.option("--check", is_flag=True, help="Then read both folders, take the adapter off again and compare.")
@click.option("--allow-other-base", is_flag=True, help="Also onto a base that the adapter was not trained on.")
def command(
    adapters: tuple[Path, ...],
    out: Path,
    base: str | None,
    weights: str | None,
    threads: int | None,
    check: bool,
    allow_other_base: bool,
) -> None:
    """Write the base with the adapter added to its weights: a plain Hugging Face folder, as large as the base.

    \b
    lora-scale merge runs/x --out models/x-merged
    lora-scale merge adapters/x --base models/llama-3.1-70b --out models/x-merged --check
    lora-scale merge adapters/a adapters/b --weights 0.7,0.3 --base models/m --out models/ab

    ADAPTER is a run, a checkpoint, or a folder that `export` or PEFT wrote; several are summed, each with its weight.
    Files, names and dtypes are the base's; sums are made in fp32 and rounded once. Memory does not grow with the
    model. Interrupted, the same command goes on where it stopped; until it is done, --out is not there.
    """
    with closing(Console(0)) as screen:
        parts = _read(adapters, weights)
        for note in (note for part in parts for note in part.source.notes):
            screen.line(f"skipped  {note}")
        model = _base_of(parts, base)
        folder = open_folder(hub.resolve(model), model.trust_remote_code)
        if folder.has_blocks:
            raise ModelError(
                f"{folder.path} is stored in fp8 blocks: a sum would have to be rounded to fp8 again, which merge does "
                "not do; serve the adapter beside it, or merge into its bf16 release with --base and --allow-other-base"
            )
        identity = fingerprint(folder)
        for part in () if allow_other_base else parts:
            way_out = "give --base with the model of the run, or --allow-other-base"
            source.refuse_another_base(part.source, folder, identity, way_out)
        task = _task(identity, parts)
        done = (out / TASK).is_file() and (out / TASK).read_text(encoding="utf-8") == durable.as_json(task)
        if not done:
            source.refuse_used(out)
        threads = threads or min(8, os.cpu_count() or 1)
        plan = rewriting.measured(_plan(folder, model, parts), threads)
        if done:
            screen.line(f"finished already: {out}")
        else:
            with disk_errors(f"{out} is not written"):
                _write(plan, parts, task, out, threads, screen)
        if check:
            _check(plan, out, screen)
        screen.line(
            f"use it  AutoModelForCausalLM.from_pretrained({str(out)!r}), or: vllm serve {shlex.quote(str(out))}"
        )


def _read(paths: Sequence[Path], weights: str | None) -> list[Part]:
    try:
        factors = [float(weight) for weight in weights.split(",")] if weights else [1.0] * len(paths)
    except ValueError:
        factors = [math.nan]
    if not all(map(math.isfinite, factors)):
        raise UsageError(f"--weights is {weights!r}; give numbers with commas between them, as in 0.7,0.3")
    if len(factors) != len(paths):
        raise UsageError(f"--weights has {len(factors)} numbers for {len(paths)} adapters; give one for each")
    found = [source.find(path) for path in paths]
    return [Part(one, peft.read_adapter(one.path), weight) for one, weight in zip(found, factors, strict=True)]


def _base_of(parts: Sequence[Part], base: str | None) -> ModelConfig:
    """Where the base is: as given, as the run had it, or as the adapter names it."""
    run = next((part.source.model for part in parts if part.source.model), None)
    if base is not None:
        return run.model_copy(update={"path": base, "revision": None}) if run else ModelConfig(path=base)
    named = parts[0].adapter.config.get("base_model_name_or_path")
    if run or named:
        return run or ModelConfig(path=str(named), revision=parts[0].adapter.config.get("revision"))
    raise UsageError(f"{parts[0].source.path} does not say what its base is; give --base")


def _task(identity: str, parts: Sequence[Part]) -> dict[str, Any]:
    """What the result is made from: contents, no paths."""
    return {
        "what": f"lora-scale {lora_scale.__version__} merge",
        "base": identity,
        "adapters": [{"sha256": _sha256(part.source.path), "weight": part.weight} for part in parts],
    }


def _sha256(adapter: Path) -> str:
    digest = hashlib.sha256()
    for name in (peft.CONFIG_FILE, peft.WEIGHTS_FILE):
        digest.update((adapter / name).read_bytes())
    return digest.hexdigest()


def _plan(folder: ModelFolder, model: ModelConfig, parts: Sequence[Part]) -> Plan:
    skeleton = load.skeleton(folder, model)
    return merging.plan(folder, skeleton, [(part.source.path, part.adapter, part.weight) for part in parts])


def _write(plan: Plan, parts: Sequence[Part], task: dict[str, Any], out: Path, threads: int, screen: Console) -> None:
    _refuse_full_disk(plan, out)
    others, notes = _others(plan.folder, parts[0].source.path)
    for note in notes:
        screen.line(f"note     {note}")
    start = time.perf_counter()
    with resumable_directory(out, TASK, task) as growing:
        for name, file in others.items():
            durable.write_bytes_atomically(growing / name, file.read_bytes())
        names = [peft.public_name(str(part.source.run or part.source.path)) for part in parts]
        base = peft.public_name(str(plan.folder.path))
        durable.write_text_atomically(growing / "README.md", merged_card(base, names, task))
        nbytes = rewriting.write(plan, growing, threads, _bar(screen, "merging ", start))
    seconds = time.perf_counter() - start
    screen.line(
        f"wrote    {out}: {len(plan.folder.files)} files, {size(plan.folder.nbytes)}, of which "
        f"{len(plan.changed)} tensors with {size(plan.changed_bytes)} are changed"
    )
    screen.line(
        f"took     {seconds:.1f} s for {size(nbytes)} ({nbytes / 1e9 / seconds:.2f} GB/s read, as much written)"
    )


def _refuse_full_disk(plan: Plan, out: Path) -> None:
    growing = unfinished(out)
    there = sum(file.stat().st_size for file in growing.iterdir()) if growing.is_dir() else 0
    needed, (free, parent) = plan.folder.nbytes - there, free_for(out)
    if needed > free:
        raise DoesNotFitError(f"{out} takes {size(needed)} of disk, {size(free)} are free in {parent}; nothing written")


def _others(folder: ModelFolder, adapter: Path) -> tuple[dict[str, Path], list[str]]:
    """Files beside the weights: the base's, with the adapter's tokenizer and chat template where it has other ones."""
    found, notes = companions.of_model(folder.path), []
    for name, file in companions.of_tokenizer(adapter).items():
        if name not in found or found[name].read_bytes() != file.read_bytes():
            notes.append(f"{name} is the adapter's, which differs from the base's")
            found[name] = file
    return found, notes


def _check(plan: Plan, out: Path, screen: Console) -> None:
    start = time.perf_counter()
    found = rewriting.check(plan, out, _bar(screen, "checking", start))
    screen.line(
        f"checked  the adapter taken off again gives the base: {found.tensors} tensors within rounding (changed by up "
        f"to {found.changed:.2g}), every other byte equal; {size(found.nbytes)} in {time.perf_counter() - start:.1f} s"
    )


def _bar(screen: Console, what: str, start: float) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        rate = done / max(1e-3, time.perf_counter() - start)
        screen.live(lambda: f"{what} {bar(done, total)} {size(done)} of {size(total)}, {size(rate)}/s")

    return show
