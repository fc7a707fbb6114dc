"""`lora-scale convert`: a state dict of loralib as an adapter folder in PEFT's form."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import click

from lora_scale.adapters import loralib, merging, peft
from lora_scale.adapters.loralib import Converted
from lora_scale.adapters.survey import split_name
from lora_scale.commands.options import EXIT_CODES
from lora_scale.parallel import load, source
from lora_scale.spec import servers
from lora_scale.spec.config import ModelConfig
from lora_scale.storage import hub
from lora_scale.storage.card import adapter_card
from lora_scale.storage.durable import whole_directory, write_file
from lora_scale.storage.folder import ModelFolder, fingerprint, open_folder
from lora_scale.storage.staging import disk_errors

Dtype = Literal["fp32", "bf16", "fp16"]


@click.command(epilog=EXIT_CODES)
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option("--base", required=True, help="The model it was trained on: a folder, or a name on the hub.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write; it must be new or empty.")
@click.option(
    "--alpha",
    required=True,
    type=click.FloatRange(0, min_open=True),
    help="lora_alpha of the layers, which is not in FILE; loralib's default is 1.",
)
@click.option("--enable", default="", help="Adapted parts of fused weights (enable_lora), which are not in FILE: q,v.")
@click.option("--dtype", type=click.Choice(list(peft.DTYPES)), default="fp32", show_default=True, help="Of the files.")
@click.option("--base-name", help="What to call the base in the files. Default: its name on the hub, or its folder's.")
def command(file: Path, base: str, out: Path, alpha: float, enable: str, dtype: Dtype, base_name: str | None) -> None:
    """Write what Microsoft's loralib has saved as an adapter that PEFT loads: lora_state_dict(model) by torch.save.

    \b
    lora-scale convert e2e.pt --base models/gpt2-medium --alpha 32 --enable q,v --out adapters/e2e
    lora-scale convert lora.pt --base models/llama --alpha 16 --out adapters/theirs

    A MergedLinear becomes one pair on the fused layer, with a block of B for each part, so nothing is rounded. Biases,
    heads and other whole modules in FILE go along. Only tensors are read: a pickle of anything else is not opened.
    """
    source.refuse_used(out)
    name = peft.checked_name(base_name) or peft.public_name(base)
    folder = open_folder(hub.resolve(ModelConfig(path=base)))
    model = load.skeleton(folder, ModelConfig(path=str(folder.path)))
    found = loralib.convert(file, loralib.read(file), model, tuple(part for part in enable.split(",") if part))
    config = peft.config_for(model, found.config(alpha), name) | {"revision": hub.commit_of(folder.path)}
    with disk_errors(f"{out} was not written"), whole_directory(out) as partial:
        identity = fingerprint(folder)
        peft.write_adapter(partial, found.tensors, config, dtype, identity)
        merging.check_fits(file, peft.read_adapter(partial), model, folder)
        write_file(partial / "README.md", [adapter_card(name, identity, config).encode()])
    for line in _said(out, found, config, alpha, folder):
        click.echo(line)


def _said(out: Path, found: Converted, config: dict[str, Any], alpha: float, folder: ModelFolder) -> Iterator[str]:
    """What became of each kind of layer."""
    nbytes = sum(file.stat().st_size for file in out.iterdir())
    yield f"wrote    {out} ({nbytes / 2**20:.1f} MiB, {len(found.pairs)} layers)"
    kinds = Counter((split_name(name)[0], pair.r, pair.enabled) for name, pair in found.pairs.items())
    for (kind, r, enabled), count in kinds.items():
        parts = (
            "" if enabled is None else f", parts {', '.join(map(str, enabled))} of its rows: rank {len(enabled) * r}"
        )
        yield f"         {_counted(kind, count)}: r = {r}, scaled by {alpha:g} / {r}{parts}"
    others = Counter(split_name(name)[0].replace(".base_layer.", ".") for name in found.others)
    yield from (f"         {_counted(kind, count)}, whole" for kind, count in others.items())
    yield from (f"skipped  {note}" for note in found.notes)
    rank = max(len(pair.a) for pair in found.pairs.values())
    for server, rules in servers.SERVERS.items():
        for reason in rules.reasons(config, list(found.pairs), rank, str(folder.config.get("model_type"))):
            yield f"note     not for {server}: {reason}"
    yield f"use it   PeftModel.from_pretrained(model, {str(out)!r})"


def _counted(kind: str, count: int) -> str:
    return f"{kind} x{count}" if count > 1 else kind
