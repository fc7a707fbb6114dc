"""`lora-scale bench`: our speed beside that of others on this machine's GPUs: a record, and tables made from it."""

import json
import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from lora_scale.commands.benching import running, tables
from lora_scale.commands.benching.cases import MODELS, Case, chosen
from lora_scale.commands.benching.running import Bench, Row
from lora_scale.commands.options import EXIT_CODES
from lora_scale.spec.errors import UsageError
from lora_scale.storage import provenance
from lora_scale.storage.durable import write_text_atomically

STEPS = 8


@click.group(epilog=EXIT_CODES, invoke_without_command=True)
@click.option("--work", type=click.Path(path_type=Path), help="Folder for checkpoints and runs: memory files, 210 GB.")
@click.option("--out", type=click.Path(path_type=Path), help="The record, .json; written anew after each case.")
@click.option("--only", multiple=True, metavar="CASE", help="This case only; may be given several times.")
@click.option("--steps", type=click.IntRange(min=2), default=STEPS, show_default=True, help="Steps measured, after 3.")
@click.option("--resume", is_flag=True, help="Keep the figures that --out has, and run what is missing or failed.")
@click.option("--keep", is_flag=True, help="Leave the checkpoints of random weights in --work.")
@click.option("--tiny", is_flag=True, help="Tiny shapes, on a CPU too: goes through everything, says nothing of speed.")
@click.option("--list", "listed", is_flag=True, help="Print the cases, and run none.")
@click.pass_context
def command(
    context: click.Context,
    work: Path | None,
    out: Path | None,
    only: tuple[str, ...],
    steps: int,
    resume: bool,
    keep: bool,
    tiny: bool,
    listed: bool,
) -> None:
    """Run every speed comparison that this machine has GPUs for, one after the other.

    \b
    lora-scale bench --work /dev/shm/bench --out record.json
    lora-scale bench --work /dev/shm/bench --out record.json --only 100b-tp2 --resume
    lora-scale bench --list
    lora-scale bench table record.json
    lora-scale bench waterfall record.json --chart tp2 --out waterfall.svg

    Needs the source tree. A case that fails, is not over in time or needs more GPUs is a row that says so. Checkpoints
    are random weights, written when the first case needs them and deleted after the last.
    """
    if context.invoked_subcommand:
        return
    cases = chosen(tiny, only)
    if listed:
        click.echo(tables.listing(cases))
        return
    if work is None or out is None:
        raise UsageError("--work and --out are needed: a folder for checkpoints and runs, and the record's file")
    running.check_steps(steps, cases.values())
    record = _record(out, resume, tiny)
    _run(cases, Bench(work.resolve(), steps, _gpus()), record, out, keep)
    click.echo(tables.markdown([record]))


@command.command("table", epilog=EXIT_CODES)
@click.argument("records", nargs=-1, required=True, metavar="RECORD...", type=click.Path(path_type=Path))
def table(records: tuple[Path, ...]) -> None:
    """Print runs and gates of RECORD as Markdown; of several records the newest figure of a case counts.

    \b
    lora-scale bench table docs/benchmarks/NAME.json
    """
    click.echo(tables.markdown([_read(path) for path in records]))


@command.command("waterfall", epilog=EXIT_CODES)
@click.argument("records", nargs=-1, required=True, metavar="RECORD...", type=click.Path(path_type=Path))
@click.option("--chart", default="tp2", show_default=True, help="Which list of cases.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The picture, .svg.")
def waterfall(records: tuple[Path, ...], chart: str, out: Path) -> None:
    """Draw the way from a peer to ours, a bar for each change, and print it as a table.

    \b
    lora-scale bench waterfall record.json --out docs/benchmarks/waterfall.svg
    """
    bars = tables.waterfall([_read(path) for path in records], chart)
    write_text_atomically(out, tables.drawn(chart, bars))
    click.echo(tables.waterfall_table(bars))


def _run(cases: dict[str, Case], bench: Bench, record: dict[str, Any], out: Path, keep: bool) -> None:
    """Every case that the record has no figures of, as the case is now. The record is whole after each."""
    done = [(row["name"], row["settings"]) for row in record["rows"] if "failed" not in row]
    left = [name for name, case in cases.items() if (name, list(case.settings)) not in done]
    _forget_models(bench, [] if keep else [m for m in MODELS if m not in {cases[name].model for name in left}])
    for number, name in enumerate(left):
        click.echo(f"{number + 1}/{len(left)} {name}", err=True, nl=False)
        row = running.measure(name, cases[name], bench)
        row |= {"commit": provenance.commit(), "made": _now()}
        record["rows"] = [other for other in record["rows"] if other["name"] != name] + [row]
        if device := row.get("device"):
            record["hardware"]["device"] = device
        write_text_atomically(out, json.dumps(record, indent=1) + "\n")
        click.echo(f": {tables.in_short(row)}", err=True)
        model = cases[name].model
        if not keep and model not in {cases[other].model for other in left[number + 1 :]}:
            _forget_models(bench, [model])


def _forget_models(bench: Bench, models: Sequence[str]) -> None:
    for model in models:
        preset, layers = MODELS[model]
        shutil.rmtree(bench.work / "models" / f"{preset}-{layers or 'all'}", ignore_errors=True)


def _record(out: Path, resume: bool, tiny: bool) -> dict[str, Any]:
    """The record to go on with, or a new one; refused where nobody could say which program its figures are of."""
    commit = provenance.commit()
    if not tiny and (not commit or commit.endswith("+changes")):
        raise UsageError(
            f"the commit of this program is {commit or 'not known'}, so a record would not say what was measured; "
            "commit first, or name it in LORA_SCALE_COMMIT"
        )
    if out.exists() and not resume:
        raise UsageError(f"--out is {out}, which is there; --resume goes on with it, or name another")
    if not out.parent.is_dir():
        raise UsageError(f"--out is {out}, but {out.parent} is no folder; make it first")
    rows: list[Row] = _read(out)["rows"] if out.exists() else []
    return {
        "kind": "bench",
        "title": "Speed beside others" + (" (tiny shapes: says nothing of speed)" if tiny else ""),
        "made": _now(),
        "commit": commit,
        "versions": provenance.versions(),
        "hardware": {"device": next((row["device"] for row in rows if "device" in row), None)},
        "rows": rows,
    }


def _read(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a record: {error}") from None
    if not isinstance(record, dict) or record.get("kind") != "bench":
        raise UsageError(f"{path} is no record of `lora-scale bench`")
    return record


def _gpus() -> int:
    return int(import_module("torch").cuda.device_count())


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
