"""What the verbs share on the command line: CONFIG with its overrides, and the table of exit codes. No verb itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

EXIT_CODES = """\b
Exit codes:
  0   yes
  1   ran and failed
  2   wrong usage, config, model, data or checkpoint
  3   does not fit in memory or on disk
  4   doctor found something
  75  interrupted; the same command resumes
  130 stopped with Ctrl-C
"""


def takes_config(function: F) -> F:
    """Give a click command `config: Path` and `overrides: tuple[str, ...]`, as `spec.configfile.load` takes them."""
    function = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")(function)
    return click.argument("config", metavar="CONFIG", type=click.Path(path_type=Path))(function)
