"""`lora-scale extract`: a LoRA out of a base and a fully tuned version of it, and how much of the tuning it keeps."""

import os
import shlex
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeVar

import click
from torch import Tensor, nn

from lora_scale.adapters import extraction, pairing, peft
from lora_scale.adapters.analysis import EXACT_DIM
from lora_scale.adapters.extraction import Extracted
from lora_scale.adapters.pairing import Plan
from lora_scale.adapters.survey import split_name
from lora_scale.commands.options import EXIT_CODES
from lora_scale.parallel import load, source, verify
from lora_scale.spec import servers
from lora_scale.spec.config import LoraConfig, ModelConfig
from lora_scale.spec.errors import ConfigError, DoesNotFitError, ModelError, UsageError
from lora_scale.storage import companions, hub
from lora_scale.storage.card import adapter_card
from lora_scale.storage.console import Console, bar, size
from lora_scale.storage.durable import whole_directory, write_file
from lora_scale.storage.folder import ModelFolder, fingerprint, open_folder
from lora_scale.storage.staging import disk_errors, free_for

Dtype = Literal["fp32", "bf16", "fp16"]
Found = TypeVar("Found")
KEPT, LEFT = "Kept of the difference (squared norm)", "Differs, and is not in the adapter"


@click.command(epilog=EXIT_CODES)
@click.argument("tuned", metavar="TUNED")
@click.option("--base", required=True, help="What TUNED was tuned from: a folder, or a name on the hub.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; it must be new or empty.")
@click.option("--r", type=click.IntRange(min=1), default=16, show_default=True, help="The rank of each layer's update.")
@click.option(
    "--energy",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Of each layer's squared change, the share to keep: r is then the most, and each layer has the r it needs.",
)
@click.option(
    "--targets",
    default="all-linear",
    show_default=True,
    help="Layers, with commas, as in lora.target_modules; one that did not change is left out.",
)
@click.option("--modules-to-save", default="", help="Modules that are put in whole, with commas: embed_tokens,norm.")
@click.option("--dtype", type=click.Choice(list(peft.DTYPES)), default="fp32", show_default=True, help="Of the files.")
@click.option("--base-name", help="What to call the base in the files. Default: its name on the hub, or its folder's.")
@click.option("--threads", type=click.IntRange(min=1), help="Default: one a core, at most 8, as memory allows.")
def command(
    tuned: str,
    base: str,
    out: Path,
    r: int,
    energy: float | None,
    targets: str,
    modules_to_save: str,
    dtype: Dtype,
    base_name: str | None,
    threads: int | None,
) -> None:
    """Write the LoRA that is nearest to what full fine-tuning did: the SVD of TUNED - base, layer by layer.

    \b
    lora-scale extract models/tuned --base models/llama-3.1-70b --out adapters/tuned --r 32
    lora-scale extract org/tuned --base org/base --out adapters/tuned --r 64 --energy 0.9
    lora-scale extract tuned --base base --out adapters/t --modules-to-save embed_tokens,lm_head,norm

    The folder loads in PEFT; its update is B A, scaled by 1. Neither model is loaded: matrices pass through, each
    thread holding one in fp32. The last lines say how much of the difference the adapter keeps, by kind of layer, and
    which tensors differ that it does not hold.
    """
    with closing(Console(0)) as screen:
        folders = _open(base), _open(tuned)
        if folders[0].path.samefile(folders[1].path):
            raise UsageError(f"TUNED and --base are the same folder, {folders[0].path}; give the model before tuning")
        source.refuse_used(out)
        name = peft.checked_name(base_name) or peft.public_name(base)
        cfg = LoraConfig(
            r=r, lora_alpha=float(r), target_modules=_list(targets), modules_to_save=_list(modules_to_save)
        )
        model, plan = _plan(folders, cfg, screen)
        _refuse_full_disk(plan, r, dtype, out)
        start = time.perf_counter()

        def show(done: int, total: int) -> None:
            screen.live(lambda: f"extracting {bar(done, total)} {done / 1e9:.2f} of {total / 1e9:.2f} billion weights")

        found = extraction.extract(plan, r, energy, threads or _threads(plan, r), show)
        if not found.layers:
            raise ModelError(
                f"{folders[1].path} and --base {folders[0].path} are equal in all {len(found.unchanged)} layers of "
                f"--targets {targets}; "
                + (f"they differ in {_few(found.others)}" if found.others else "nothing differs")
            )
        config = _config(model, found, cfg, name, folders[0])
        report = _report(found, energy)
        with disk_errors(f"{out} was not written"), whole_directory(out) as partial:
            _write(partial, found, config, dtype, folders, peft.public_name(tuned), report)
        for line in _said(out, found, config, report, folders[0], time.perf_counter() - start):
            screen.line(line)


def _list(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(",") if part)


def _open(name: str) -> ModelFolder:
    folder = open_folder(hub.resolve(ModelConfig(path=name)))
    if folder.has_blocks:
        raise ModelError(
            f"{folder.path} is stored in fp8 blocks, whose rounding is a difference too; give its bf16 form"
        )
    return folder


def _plan(folders: tuple[ModelFolder, ModelFolder], cfg: LoraConfig, screen: Console) -> tuple[nn.Module, Plan]:
    base, tuned = (load.skeleton(folder, ModelConfig(path=str(folder.path))) for folder in folders)
    for note in pairing.refuse_another(base, tuned, folders):
        screen.line(f"note     {note}: no adapter carries that")
    try:
        return base, pairing.plan(folders, base, cfg)
    except ConfigError as error:
        raise UsageError(str(error).replace("lora.target_modules", "--targets")) from error


def _refuse_full_disk(plan: Plan, r: int, dtype: Dtype, out: Path) -> None:
    numel = sum(r * sum(plan.features(module)) for module in plan.layers)
    numel += sum(pair.base.numel for pair in plan.saved.values())
    needed, (free, parent) = numel * peft.DTYPES[dtype][1].itemsize, free_for(out)
    if needed > free:
        raise DoesNotFitError(
            f"{out} takes up to {size(needed)} of disk, {size(free)} are free in {parent}; give a lower --r, --dtype "
            "bf16, or another place"
        )


def _threads(plan: Plan, r: int) -> int:
    """As many as there is memory for."""
    needed, free = extraction.bytes_needed(plan, r), verify.bytes_free()
    if needed > free:
        raise DoesNotFitError(
            f"the largest layer takes up to {size(needed)} of memory, {size(free)} are free; take another machine, or "
            "try --threads 1"
        )
    return max(1, min(8, os.cpu_count() or 1, int(free / needed)))


def _config(model: nn.Module, found: Extracted, cfg: LoraConfig, name: str, base: ModelFolder) -> dict[str, Any]:
    """adapter_config.json. Each alpha is its layer's rank: scaling 1."""
    ranks = {module: layer.rank for module, layer in found.layers.items()}
    r = max(ranks.values())
    pattern = {module: rank for module, rank in ranks.items() if rank != r}
    cfg = cfg.model_copy(
        update={
            "r": r,
            "lora_alpha": float(r),
            "target_modules": tuple(ranks),
            "rank_pattern": pattern,
            "alpha_pattern": {module: float(rank) for module, rank in pattern.items()},
        }
    )
    return peft.config_for(model, cfg, name) | {"revision": hub.commit_of(base.path)}


def _report(found: Extracted, energy: float | None) -> dict[str, list[tuple[str, str]]]:
    """Tables by heading: what is kept, and what is not in the adapter."""
    kept = []
    for kind, layers in _by_kind(found.layers).items():
        shares, ranks = [layer.kept / layer.squared for layer in layers], [layer.rank for layer in layers]
        rank = "" if energy is None else f", r {min(ranks)} to {max(ranks)}"
        kept.append((kind, f"{_share(min(shares))} at least, median {_share(median(shares))}{rank}"))
    kept += [(kind, "whole") for kind in _by_kind(found.saved)]
    left = [(kind, _share(sum(squares) / found.squared)) for kind, squares in _by_kind(found.others).items()]
    return {KEPT: [*kept, ("the whole difference", _share(found.kept / found.squared))], LEFT: left}


def _by_kind(found: Mapping[str, Found]) -> dict[str, list[Found]]:
    """What belongs to the same place in each decoder layer, with the number of these places."""
    kinds: dict[str, list[Found]] = defaultdict(list)
    for name, one in found.items():
        kinds[split_name(name)[0]].append(one)
    return {kind if len(them) == 1 else f"{kind} x{len(them)}": them for kind, them in kinds.items()}


def _share(share: float) -> str:
    """Not rounded up to all of it."""
    percent = 100 * share
    return f"{percent:.2f}%" if 0.01 <= percent <= 99.99 else f"{percent:.4g}%"


def _few(names: Sequence[str] | Mapping[str, object]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _write(
    out: Path,
    found: Extracted,
    config: dict[str, Any],
    dtype: Dtype,
    folders: tuple[ModelFolder, ModelFolder],
    tuned: str,
    report: Mapping[str, Sequence[tuple[str, object]]],
) -> None:
    tensors: dict[str, Tensor] = {}
    for module, layer in found.layers.items():
        tensors |= {f"{module}.lora_A": layer.a, f"{module}.lora_B": layer.b}
    tensors |= {name: part.values for name, part in found.saved.items()}
    identity = fingerprint(folders[0])
    peft.write_adapter(out, tensors, config, dtype, identity)
    base, own = (companions.of_tokenizer(folder.path) for folder in folders)
    if any(name not in base or base[name].read_bytes() != file.read_bytes() for name, file in own.items()):
        for name, file in own.items():
            write_file(out / name, [file.read_bytes()])
    more = {"Extracted": [("from", tuned), ("as", "the truncated SVD of its difference to the base")], **report}
    card = adapter_card(config["base_model_name_or_path"], identity, config, more={k: v for k, v in more.items() if v})
    write_file(out / "README.md", [card.encode()])


def _said(
    out: Path,
    found: Extracted,
    config: Mapping[str, Any],
    report: Mapping[str, Sequence[tuple[str, str]]],
    base: ModelFolder,
    seconds: float,
) -> Iterator[str]:
    """What was written, kept and left out, and how it is used."""
    nbytes = sum(file.stat().st_size for file in out.iterdir())
    width = max(len(name) for rows in report.values() for name, _ in rows)
    yield f"wrote    {out} ({size(nbytes)}, {len(found.layers)} layers, r = {config['r']}) in {seconds:.1f} s"
    if found.unchanged:
        yield f"equal    {len(found.unchanged)} layers are equal in both, and not adapted: {_few(found.unchanged)}"
    yield f"kept     of the squared norm of the difference, {report[KEPT][-1][1]} in all; by kind of layer:"
    yield from (f"         {name:<{width}}  {what}" for name, what in report[KEPT][:-1])
    error = max(layer.error for layer in found.layers.values())
    if error:
        yield f"         layers over {EXACT_DIM} features by iteration: singular values right within {_share(error)}"
    if report[LEFT]:
        yield "left out these differ too, and are not in the adapter; share of the whole difference:"
        yield from (f"         {name:<{width}}  {share}" for name, share in report[LEFT])
        yield "         --targets takes linear layers, --modules-to-save whole modules"
    for server, rules in servers.SERVERS.items():
        model_type = str(base.config.get("model_type"))
        for reason in rules.reasons(config, list(found.layers), config["r"], model_type):
            yield f"note     not for {server}: {reason}"
    yield f"use it   PeftModel.from_pretrained(model, {str(out)!r}), or:"
    yield f"         lora-scale merge {shlex.quote(str(out))} --base {shlex.quote(str(base.path))} --out MERGED"
