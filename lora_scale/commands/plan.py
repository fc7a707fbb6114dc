"""`lora-scale plan`: what a run needs on each GPU, before it is queued. Reads headers at most: no torch, no network.

The arithmetic is `spec.cost`'s; this verb finds the model, asks, and shows the answer first and the reasons after it.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import click

from lora_scale.spec import configfile, cost, hardware, named, targets
from lora_scale.spec.architecture import Architecture
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import DoesNotFitError, ModelError, UsageError
from lora_scale.spec.shapes import BUILDERS, architecture, from_tensors
from lora_scale.spec.wording import ESTIMATES, GIB, STATES, binary, decimal
from lora_scale.storage.folder import ModelFolder, open_folder, sources

NOTHING = ""  # an empty cell: the figure does not exist, or is 0
PAPER = ("LoRA paper (2106.09685), quoted, not computed", "1.2 TB", "350 GB", "3.4x")


@click.command()
@click.argument("arguments", nargs=-1, metavar="[CONFIG] [KEY=VALUE]...")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines.")
@click.option("--gpus-per-node", type=click.IntRange(min=1), default=1, show_default=True, help="GPUs on each.")
@click.option("--gpu", help=f"What the run must fit on: {', '.join(hardware.GPUS)}, or the GiB of one GPU.")
@click.option("--shape", metavar="NAME", help="A well-known model instead of model.path; CONFIG may be left out then.")
@click.option("--json", "as_json", is_flag=True, help="Figures only, in bytes.")
def command(
    arguments: tuple[str, ...], nodes: int, gpus_per_node: int, gpu: str | None, shape: str | None, as_json: bool
) -> None:
    """Say what a run needs on each GPU, before it is queued.

    \b
    lora-scale plan run.yaml --gpus-per-node 8 --gpu h200
    lora-scale plan run.yaml lora.r=64 data.seq_len=8192 --nodes 2 --gpus-per-node 8 --gpu 80
    lora-scale plan --shape gpt3-175b lora.r=4

    Exit codes: 0 fits (or no --gpu was given), 2 wrong usage, config or model, 3 does not fit.
    """
    ranks, memory = nodes * gpus_per_node, None if gpu is None else hardware.memory_gib(gpu)
    cfg = _config(arguments, shape, ranks)
    model, source, notes = _model(cfg, shape)
    row = cost.plan(model, cfg, ranks)
    answer, fits = _answer(row["this_run"], memory, ranks)
    if as_json:
        click.echo(json.dumps({"fits": fits, "gpu_gib": memory, "model": source} | row, indent=2))
    else:
        click.echo("\n".join([answer, "", *_about(row, model, source, cfg, (nodes, gpus_per_node)), ""]))
        click.echo("\n\n".join([_memory_table(row), _disk_table(row), _job_table(row, shape)]))
        notes.append(f"Not counted: {cost.NOT_COUNTED}. Estimates are formulas, not yet held against measurements.")
        click.echo("\n" + "\n".join(notes))
    if fits is False:
        click.get_current_context().exit(DoesNotFitError.exit_code)  # said above, as the answer and not as an error


def _config(arguments: tuple[str, ...], shape: str | None, ranks: int) -> RunConfig:
    files = [argument for argument in arguments if "=" not in argument]
    overrides = [argument for argument in arguments if "=" in argument]
    if len(files) > 1:
        raise UsageError(f"{files[1]!r} is neither KEY=VALUE nor an option; plan takes one CONFIG")
    if files:
        return configfile.load(files[0], overrides)
    if not shape:
        raise UsageError("plan needs a CONFIG, or --shape NAME for a model that need not be there")
    return _config_of_shape(shape, overrides, ranks)


def _config_of_shape(shape: str, overrides: list[str], ranks: int) -> RunConfig:
    """Defaults for everything but the model; the global batch is one pass, unless it is given."""
    given = {key: value for key, _, value in (override.partition("=") for override in overrides)}
    micro = given.get("train.micro_batch_size", "1")
    batch = int(micro) * ranks if micro.isdigit() else ranks
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        json.dump({"model": {"path": shape}, "data": {"train": "./rows"}, "run_dir": "./run"}, file)
        file.flush()
        return configfile.load(file.name, ["train.max_steps=1", f"train.global_batch_size={batch}", *overrides])


def _model(cfg: RunConfig, shape: str | None) -> tuple[Architecture, str, list[str]]:
    """The model, where its figures come from, and what the user should know about them."""
    if shape:
        return architecture(named.shape(shape)), f"named shape {shape}", []
    path = Path(cfg.model.path)
    if not path.is_dir():
        raise ModelError(
            f"model.path is {cfg.model.path}, which is no folder here; plan downloads nothing: give a folder "
            f"(config.json is enough), or --shape with one of {', '.join(named.SHAPES)}"
        )
    if (path / "config.json").is_file() and not any(path.glob("*.safetensors*")):
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(f"{path / 'config.json'} is not valid JSON ({error}); download it again") from None
        return (
            architecture(config),
            f"{path}, config.json alone",
            ["There are no weights here yet to check it against."],
        )
    return _checked(open_folder(path, cfg.model.trust_remote_code))


def _checked(folder: ModelFolder) -> tuple[Architecture, str, list[str]]:
    """What config.json says and the headers confirm, tensor by tensor; the headers alone for a type without a row."""
    if str(folder.config.get("model_type")) not in BUILDERS:
        shapes = {name: entry.shape for name, entry in folder.tensors.items()}
        note = (
            f"Model type {folder.config.get('model_type')} has no row here: its linear layers are guessed from names."
        )
        return from_tensors(folder.config, shapes), f"{folder.path}, headers alone", [note]
    model = architecture(folder.config)
    table = model.parameters[0]
    tied = {"lm_head.weight": table.name} if model.tied else {}
    for parameter in model.parameters:
        sources(folder, parameter.name, parameter.shape, table.name.partition(".")[0], tied)
    return model, f"{folder.path}, config.json and the headers of {len(folder.files)} files agree", []


def _answer(run: dict[str, Any], memory: float | None, ranks: int) -> tuple[str, bool | None]:
    """The first line, and whether the run fits (None: it was not said on what)."""
    held, whole = run["model_states"]["total"], run["model_states"]["total"] + run["estimates"]["total"]
    if memory is None:
        return f"model states: {binary(held)} a GPU on {_gpus(ranks)}, about {binary(whole)} with estimates", None
    of = f"of {memory:g} GiB a GPU on {_gpus(ranks)}"
    if held > memory * GIB:
        return f"does not fit: model states alone are {binary(held)} {of}", False
    verdict = "fits" if whole <= memory * GIB else "does not fit, by estimate"
    return (
        f"{verdict}: model states {binary(held)}, about {binary(whole)} with estimates, {of}",
        verdict == "fits",
    )


def _gpus(ranks: int) -> str:
    return "1 GPU" if ranks == 1 else f"{ranks} GPUs"


def _about(row: dict[str, Any], model: Architecture, source: str, cfg: RunConfig, grid: tuple[int, int]) -> list[str]:
    """What is planned, in four or five lines."""
    count, trainable, accumulation = row["parameters"], row["this_run"]["trainable"], row["accumulation_steps"]
    lines = [f"model   {model.model_type}, {count['total']:,} parameters ({source})"]
    if model.experts:
        lines[0] += f"; {count['computing'] / 1e9:.1f}B meet a token"
    lines.append(f"trains  {trainable:,} parameters ({trainable / count['total']:.3%})")
    if cfg.method == "lora":
        lines[1] += f": r={cfg.lora.r} on {', '.join(cfg.lora.target_modules)}"
        if (sentence := targets.fused(model, cfg.lora)) is not None:
            lines.append(f"        {sentence}")
    lines.append(
        f"ranks   {row['ranks']} ({grid[0]} x {grid[1]}), ZeRO-{cfg.parallel.zero_stage}, {cfg.precision}, recompute "
        f"{cfg.recompute}"
    )
    lines.append(
        f"step    {cfg.train.global_batch_size} x {cfg.data.seq_len} tokens = {cfg.train.micro_batch_size} a pass x "
        f"{_gpus(row['ranks'])} x {accumulation} accumulated"
    )
    return lines


def _memory_table(row: dict[str, Any]) -> str:
    jobs = _jobs(row)
    lines: list[list[str]] = []
    for kind, labels in (("model_states", STATES), ("estimates", ESTIMATES)):
        for name, label in labels.items():
            cells = [binary(job[kind][name]) if job[kind][name] else NOTHING for job in jobs.values()]
            if any(cells):
                lines.append([label, *cells])
        if kind == "model_states":
            lines.append(["= model states, exact", *(binary(job[kind]["total"]) for job in jobs.values())])
    whole = [binary(job["model_states"]["total"] + job["estimates"]["total"]) for job in jobs.values()]
    lines.append(["= with the estimates above", *whole])
    return _table(lines, "on each GPU", *jobs)


def _disk_table(row: dict[str, Any]) -> str:
    jobs = _jobs(row)
    lines = [
        ["export, 16 bits", *(binary(job["export"]) for job in jobs.values())],
        ["training checkpoint", *(binary(job["checkpoint"]) for job in jobs.values())],
    ]
    return _table(lines, "on disk", *jobs)


def _job_table(row: dict[str, Any], shape: str | None) -> str:
    """All GPUs together, in the decimal units of the literature, by each convention of what a parameter costs."""
    whole, trained = row["parameters"]["total"], row["this_run"]["trainable"]
    lines = []
    for label, each in (
        ("weights only, 2 bytes", 2),
        (f"mixed-precision Adam, {cost.MIXED_ADAM} bytes", cost.MIXED_ADAM),
    ):
        full = each * whole
        run = full if "full_fine_tuning" not in row else 2 * whole + each * trained
        lines.append([f"{label} a parameter, computed", decimal(full), decimal(run), f"{full / run:.1f}x"])
    if shape == "gpt3-175b":
        lines.append(list(PAPER))
    return _table(lines, "model states, all GPUs together", "full fine-tuning", "this run", "ratio")


def _jobs(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    names = {"this_run": "this run", "full_fine_tuning": "full fine-tuning"}
    return {text: row[name] for name, text in names.items() if name in row}


def _table(lines: list[list[str]], *headers: str) -> str:
    """Plain text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(headers, *lines, strict=True)]
    rows = [list(headers), ["-" * width for width in widths], *lines]
    return "\n".join(
        "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]).rstrip() for cells in rows
    )
