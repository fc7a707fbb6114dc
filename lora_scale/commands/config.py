"""`lora-scale config`: every key of a run with its value and where that came from, or the schema for editors."""

import json
from pathlib import Path

import click

from lora_scale.spec import configfile
from lora_scale.spec.errors import UsageError
from lora_scale.spec.keys import keys, show


@click.command()
@click.argument("config", type=click.Path(path_type=Path), required=False)
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--show", "as_table", is_flag=True, help="Every resolved value and where it came from (the default).")
@click.option("--schema", is_flag=True, help="The JSON Schema of a config, without a CONFIG.")
@click.option("--json", "as_json", is_flag=True, help="Every resolved value as JSON, which is itself a config.")
def command(config: Path | None, overrides: tuple[str, ...], as_table: bool, schema: bool, as_json: bool) -> None:
    """Print every key of CONFIG with its value and origin. Reads nothing that the config names.

    \b
    lora-scale config --show run.yaml lora.r=16
    lora-scale config --schema > run.schema.json      then, as a config's first line:
                                                      # yaml-language-server: $schema=run.schema.json

    Exit codes: 0 the config is right, 2 it is not.
    """
    if schema:
        click.echo(json.dumps(configfile.schema(), indent=1))
        return
    if config is None:
        raise UsageError("config needs a CONFIG, or --schema")
    read = configfile.load(config, overrides)
    if as_json:
        click.echo(configfile.resolved_json(read), nl=False)
        return
    origin = configfile.origins(config, overrides)
    tree = read.model_dump(mode="json")
    values = {key.name: show((tree[key.section] if key.section else tree)[key.leaf], 60) for key in keys().values()}
    for name, value in values.items():
        line = f"{name:<{max(map(len, values))}}  {value:<{max(map(len, values.values()))}}  {origin[name]}"
        click.echo(line if origin[name] == "default" else click.style(line, bold=True))
