"""`lora-scale prepare`: fetch what a run needs, tokenise and pack its data once, and show what will be trained on."""

import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from lora_scale.spec import configfile
from lora_scale.spec.config import RunConfig
from lora_scale.storage import encoder, hub, prepared, sources
from lora_scale.storage.console import Console, bar
from lora_scale.storage.dataset import Documents
from lora_scale.storage.folder import open_folder
from lora_scale.storage.mixture import Mixture
from lora_scale.storage.steps import StepPlan


@click.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option(
    "--show", type=click.IntRange(min=0), default=0, help="Print so many rows of each source, token by token."
)
def command(config: Path, overrides: tuple[str, ...], show: int) -> None:
    """Fetch the model and the data of CONFIG, tokenise and pack the rows once, and say what came of it. Needs no GPU.

    \b
    lora-scale prepare run.yaml
    lora-scale prepare run.yaml --show 3         examples, with the tokens that carry loss in green

    Run it where there is a network, a login node for example: `train` uses what it left, and no network. The data goes
    to data.cache, the model to the cache of the hub (HF_HOME).

    Exit codes: 0 ready, 2 wrong config, model or data.
    """
    cfg = configfile.load(config, overrides)
    folder = open_folder(hub.resolve(cfg.model), cfg.model.trust_remote_code)
    click.echo(f"base     {cfg.model.path}: {folder.path}")
    for source in prepared.sources_of(cfg):
        sources.fetch(Path(source.path), source.split, source.subset)
    begun = time.monotonic()
    place, made = prepared.open_or_build(cfg, folder.path, folder.config.get("vocab_size"), _bar(Console(0)))
    found = prepared.load(cfg, place)
    for line in _about(cfg, found.train):
        click.echo(line)
    if found.validation:
        click.echo(f"held out {_rows(found.validation)}, {len(found.validation):,} blocks")
    if show:
        tokenizer = encoder.tokenizer(folder.path, cfg.model.trust_remote_code, cfg.data.chat_template)
        for part in found.train.parts:
            for line in _examples(part.documents, tokenizer, show):
                click.echo(line)
    for note in found.train.notes():
        click.echo(f"note     {note}")
    click.echo(f"cache    {place} ({f'made in {time.monotonic() - begun:.1f} s' if made else 'was there'})")
    click.echo(f"next     {shlex.join(['lora-scale', 'train', str(config), *overrides])}")


def _bar(screen: Console) -> prepared.Progress:
    def tell(file: str, done: int, total: int) -> None:
        screen.live(lambda: f"data     {bar(done, total)} {done:,} of {total:,} rows of {file} tokenised")
        if done == total:
            screen.clear()

    return tell


def _rows(blocks: Mixture) -> str:
    stats = blocks.stats()
    return f"{stats['rows']:,} rows, {stats['tokens']:,} tokens, {stats['target_tokens']:,} of them trained"


def _about(cfg: RunConfig, blocks: Mixture) -> Iterator[str]:
    stats = blocks.stats()
    for name, weight, part in zip(blocks.sources, blocks.weights, blocks.parts, strict=True):
        times = f" x {weight:g}" if weight != 1.0 else ""
        yield f"source   {name}{times}: {part.documents.n_rows:,} rows, longest {part.documents.longest:,} tokens"
    yield f"rows     {_rows(blocks)} ({stats['target_tokens'] / stats['tokens']:.1%})"
    yield f"cut      {stats['truncated_rows']:,} rows longer than data.seq_len = {cfg.data.seq_len}"
    yield f"left out {stats['dropped_rows']:,} rows without a trained token"
    yield f"blocks   {len(blocks):,} of {blocks.seq_len} tokens, {blocks.efficiency:.1%} full"
    train = cfg.train
    plan = StepPlan(blocks, train.global_batch_size, 1, 0, 1, cfg.seed, train.epochs, train.max_steps)
    epochs = float(plan.total_steps * train.global_batch_size / blocks.blocks_an_epoch)
    yield f"steps    {plan.total_steps:,} of {train.global_batch_size} blocks: {epochs:.2f} epochs"


def _examples(documents: Documents, tokenizer: Any, count: int) -> Iterator[str]:
    """The first documents as text, a bar between tokens; trained ones green, and between » and « without colours."""
    for number in range(min(count, len(documents))):
        part = slice(documents.offsets[number], documents.offsets[number + 1])
        ids, trained = documents.ids[part].tolist(), documents.trained[part].tolist()
        place = f"{documents.path}, {documents.unit} {documents.lines[number]}"
        yield f"\n{place}: {len(ids)} tokens, {sum(trained)} trained"
        pieces = []
        for token, mark, before, after in zip(ids, trained, [False, *trained], [*trained[1:], False], strict=False):
            text = tokenizer.decode([token]).replace("\n", "⏎\n")
            quoted = f"{'' if before else '»'}{text}{'' if after else '«'}" if mark else text
            pieces.append(click.style(quoted, fg="green") if mark else quoted)
        yield "│".join(pieces)
    yield ""
