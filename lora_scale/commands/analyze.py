"""`lora-scale analyze`: what updates look like, what runs agree on, and what that says of r and target_modules."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import click

from lora_scale.adapters import survey as surveys
from lora_scale.commands.analysis import figures
from lora_scale.commands.analysis import page as pages
from lora_scale.commands.analysis import runs as folders
from lora_scale.commands.analysis.figures import History
from lora_scale.commands.analysis.runs import Opened
from lora_scale.commands.options import EXIT_CODES
from lora_scale.spec.errors import UsageError
from lora_scale.storage import runlog
from lora_scale.storage.console import Console, bar
from lora_scale.storage.durable import write_text_atomically


@click.command(epilog=EXIT_CODES)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), help="The page's file. Default: analysis.html in the first RUN."
)
@click.option("--base", help="The base model, if it is not where the run had it: a folder, or a name on the hub.")
@click.option("--seed", default=0, show_default=True, help="Of the random controls.")
def command(runs: tuple[Path, ...], out: Path | None, base: str | None, seed: int) -> None:
    """Look at one adapter, or hold several of one base against each other: Section 7 of the LoRA paper for your runs.

    \b
    lora-scale analyze runs/first
    lora-scale analyze runs/r8 runs/r32 runs/r8-seed1 --out compared.html
    lora-scale analyze adapters/theirs --base models/llama --out theirs.html

    RUN is a run directory (its newest checkpoint counts), a checkpoint, or a PEFT folder. Each update's spectrum is
    computed from its factors; the base is read one tensor at a time, so a base of any size will do on a small machine.
    Writes one HTML page that opens offline, and the same as Markdown and JSON beside it.
    """
    figures.require()
    opened = folders.open_all(runs)
    page_file = _page_file(runs[0], out)
    folder, about_base = folders.find_base(opened, base)
    with contextlib.closing(Console(rank=0)) as screen:

        def show(done: int, total: int, module: str) -> None:
            screen.live(lambda: f"module {done + 1}/{total} {bar(done, total, 16)} {module}")

        found = surveys.survey([run.subject for run in opened], folder, seed, show)
        screen.clear()
    history = _history(opened)
    page = pages.blocks(opened, found, about_base, history)
    record = pages.as_json(opened, found, about_base, history)
    markdown = page_file.with_suffix(".md")
    write_text_atomically(page_file.with_suffix(".json"), json.dumps(record) + "\n")
    write_text_atomically(markdown, pages.markdown(page, page_file.name))
    write_text_atomically(page_file, pages.html(page))
    for text in page[0].text:
        click.echo(f"{text}\n")
    click.echo(f"written: {page_file} ({page_file.stat().st_size / 1e6:.2f} MB), {markdown.name} and .json beside it")


def _page_file(first: Path, out: Path | None) -> Path:
    """Where the page goes; judged before anything is computed."""
    if out is None:
        if not (first / runlog.CHECKPOINTS).is_dir():
            raise UsageError(f"{first} is no run directory, and nothing is written into it; name the page with --out")
        return first / "analysis.html"
    if out.suffix not in (".html", ".htm"):
        raise UsageError(f"--out is {out}; name a file that ends in .html, the others are written beside it")
    if not out.parent.is_dir():
        raise UsageError(f"--out is {out}, but {out.parent} is no folder; make it first")
    return out


def _history(opened: Sequence[Opened]) -> History:
    """Norms over the checkpoints of every run that has several."""
    found = {}
    for run in opened:
        group_of = {module: surveys.split_name(module)[0] for module in run.subject.adapter.modules}
        if rows := list(surveys.history(folders.earlier(run))):
            found[run.name] = figures.mean_by_group(rows, group_of)
    return found
