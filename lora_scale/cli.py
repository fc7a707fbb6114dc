"""The command line: which verbs there are, and how a mistake of the user becomes one clear line and an exit code.

A verb's module is imported when that verb is chosen, so that `--help` needs nothing but click.
"""

import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module

import click
from click.shell_completion import CompletionItem

from lora_scale import __version__
from lora_scale.commands.options import EXIT_CODES
from lora_scale.spec.errors import LoraScaleError

VERBS = {
    "plan": "Say what a run needs on each GPU, before it is queued.",
    "prepare": "Fetch, tokenise and pack once; show what will be trained on.",
    "train": "Train the run that a config describes, or resume it.",
    "launch": "Train on several hosts, watched and restarted.",
    "export": "Write a checkpoint's adapter in PEFT form.",
    "merge": "Write the base with the adapter added to its weights.",
    "extract": "Make an adapter from a base and a tuned model.",
    "convert": "Take a state dict of loralib into PEFT's form.",
    "analyze": "Say what updates look like, and what that means for r and targets.",
    "generate": "Continue rows of text with one or more adapters.",
    "config": "Print every key with its value and origin, or the JSON Schema.",
    "report": "Turn a run directory into a page: memory, loss, speed.",
    "bench": "Measure speed beside others on this machine's GPUs.",
    "doctor": "Look for what would hurt a run on this machine.",
}


EXTRAS = {  # what pyproject.toml calls them: the packages that are missed without them
    "train": ("torch", "deepspeed", "transformers", "tokenizers", "huggingface_hub", "safetensors", "peft", "jinja2"),
    "data": ("datasets", "pyarrow"),
    "mpi": ("mpi4py",),
    "eval": ("rouge_score", "sacrebleu"),
}


class Verbs(click.Group):
    """Loads `lora_scale.commands.<verb>.command` when it is called for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return import_module(f"lora_scale.commands.{cmd_name}").command if cmd_name in VERBS else None

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Verbs by their names alone; click's own would import each to ask for its help."""
        found = [CompletionItem(name, help=text) for name, text in VERBS.items() if name.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in VERBS and not args[0].startswith("-"):
            close = get_close_matches(args[0], VERBS, n=1)
            meant = f"did you mean {close[0]}?" if close else f"choose {', '.join(VERBS)}"
            raise click.UsageError(f"unknown verb {args[0]}; {meant}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group(cls=Verbs, epilog=EXIT_CODES, subcommand_metavar="VERB ...", context_settings={"max_content_width": 100})
@click.version_option(__version__, prog_name="lora-scale")
@click.option("--local_rank", "--local-rank", type=int, expose_value=False, hidden=True)  # from DeepSpeed's launcher
def verbs() -> None:
    """LoRA fine-tuning of very large language models on a frozen, sharded base.

    \b
      lora-scale plan configs/run.yaml               will it fit?
      lora-scale train configs/run.yaml lora.r=16    train; KEY=VALUE changes a key of the config
      deepspeed --module lora_scale train configs/run.yaml
      lora-scale VERB --help                         what a verb takes, with examples
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit. A verb returns None for 0, or raises; an unexpected exception keeps its traceback."""
    try:
        color = False if os.environ.get("NO_COLOR") else None  # None: where there is a terminal
        code = verbs.main(args=arguments, prog_name="lora-scale", standalone_mode=False, color=color)
    except LoraScaleError as error:
        for line in str(error).splitlines():
            click.echo(f"lora-scale: error: {line}", err=True)
        code = error.exit_code
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
        if extra is None:
            raise
        click.echo(f"lora-scale: error: this needs {package}; pip install 'lora-scale[{extra}]'", err=True)
        code = 2
    except click.ClickException as error:
        error.show()
        if isinstance(error, click.NoSuchOption) and "." in error.option_name:
            click.echo("A key of the config is written without dashes: lora.r=16", err=True)
        code = error.exit_code
    except click.Abort as abort:
        if not isinstance(abort.__cause__, KeyboardInterrupt):  # click answers an EOFError in the same way
            raise
        click.echo("lora-scale: stopped with Ctrl-C", err=True)
        code = 130
    sys.exit(code or 0)
