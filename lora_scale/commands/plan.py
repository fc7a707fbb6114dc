"""`lora-scale plan`: what a run needs on each GPU, before it is queued. Reads headers at most: no torch, no network.

The arithmetic is `spec.cost`'s; this verb finds the model, asks, and shows the answer first and the reasons after it.
"""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from lora_scale.commands import searching
from lora_scale.spec import configfile, cost, hardware, memory, named, planning, search, targets
from lora_scale.spec.architecture import Architecture
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import DoesNotFitError, ModelError, UsageError
from lora_scale.spec.shapes import BUILDERS, architecture, from_tensors
from lora_scale.spec.states import grid_of
from lora_scale.spec.wording import BESIDE, CATEGORIES, JOBS, PAPER, STATES, binary, decimal, gpus, table
from lora_scale.storage.folder import ModelFolder, open_folder, sources

NOTHING = ""  # an empty cell: the figure does not exist, or is 0


@click.command()
@click.argument("arguments", nargs=-1, metavar="[CONFIG] [KEY=VALUE]...")
@click.option("--nodes", type=click.IntRange(min=1), default=1, show_default=True, help="Machines.")
@click.option("--gpus-per-node", type=click.IntRange(min=1), default=1, show_default=True, help="GPUs on each.")
@click.option("--gpu", help=f"What the run must fit on: {', '.join(hardware.GPUS)}, or the GiB of one GPU.")
@click.option("--shape", metavar="NAME", help="A well-known model instead of model.path; CONFIG may be left out then.")
@click.option(
    "--bytes-per-parameter",
    type=click.FloatRange(min=0, min_open=True),
    multiple=True,
    help="Another convention of what a trained parameter costs, beside 2 and 16 bytes.",
)
@click.option(
    "--search", "searches", is_flag=True, help="Find layouts that fit --gpu, the fastest first, by a model of time."
)
@click.option("--scale", "scales", is_flag=True, help="What a step sends over each link on 64 to 1,024 GPUs; on paper.")
@click.option("--out", type=click.Path(path_type=Path), help="With --search: write the fastest as a config.")
@click.option("--json", "as_json", is_flag=True, help="Figures only, in bytes.")
def command(
    arguments: tuple[str, ...],
    nodes: int,
    gpus_per_node: int,
    gpu: str | None,
    shape: str | None,
    bytes_per_parameter: tuple[float, ...],
    searches: bool,
    scales: bool,
    out: Path | None,
    as_json: bool,
) -> None:
    """Say what a run needs on each GPU, before it is queued.

    \b
    lora-scale plan run.yaml --gpus-per-node 8 --gpu h200
    lora-scale plan run.yaml lora.r=64 data.seq_len=8192 --nodes 2 --gpus-per-node 8 --gpu 80
    lora-scale plan --shape gpt3-175b lora.r=4
    lora-scale plan run.yaml --gpus-per-node 2 --gpu h200 --search --out fastest.yaml
    lora-scale plan run.yaml --gpus-per-node 8 --gpu h200 --scale

    Exit codes: 0 fits (or no --gpu was given), 2 wrong usage, config or model, 3 does not fit.
    """
    ranks, limit = nodes * gpus_per_node, None if gpu is None else hardware.memory_gib(gpu)
    cfg = _config(arguments, shape, ranks)
    model, source, notes = _model(cfg, shape)
    grid = grid_of(model, cfg, ranks, gpus_per_node)
    job = planning.job_of(model, cfg, grid)
    if searches or scales or out:
        return searching.answer(job, gpu, gpus_per_node, out, scales=scales, as_json=as_json)
    if limit is None and (key := search.unsettled(cfg)):
        raise UsageError(f"{key} is auto, which depends on the GPU; say which with --gpu")
    job = search.settled(job, limit)
    cfg = job.cfg
    row = planning.plan(job)
    said = planning.answer(row["this_run"], grid.ranks, limit)
    ways = planning.ways_out(job, limit) if limit and said.fits is False else []
    if as_json:
        found = {"fits": said.fits, "gpu_gib": limit, "model": source} | row | {"ways_out": [asdict(w) for w in ways]}
        click.echo(json.dumps(found, indent=2))
    else:
        lines = [said.sentence, *_ways(ways, said.fits), "", *_about(row, model, source, cfg, (nodes, gpus_per_node))]
        click.echo("\n".join([*lines, *(f"warning {text}" for text in row["warnings"]), ""]))
        click.echo(
            "\n\n".join(
                [_memory_table(row), _beside_table(row), _disk_table(row), _job_table(row, shape, bytes_per_parameter)]
            )
        )
        click.echo("\n" + "\n".join([*notes, *_assumptions(row)]))
    if said.fits is False:
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
    stored = f"; {decimal(folder.nbytes)} in fp8 blocks, dequantised in memory" if folder.has_blocks else ""
    if str(folder.config.get("model_type")) not in BUILDERS:
        note = (
            f"Model type {folder.config.get('model_type')} has no row here: its linear layers are guessed from names."
        )
        return from_tensors(folder.config, folder.shapes), f"{folder.path}, headers alone{stored}", [note]
    model = architecture(folder.config)
    table = model.parameters[0]
    tied = {"lm_head.weight": table.name} if model.tied else {}
    for parameter in model.parameters:
        sources(folder, parameter.name, parameter.shape, table.name.partition(".")[0], tied)
    return model, f"{folder.path}, config.json and the headers of {len(folder.files)} files agree{stored}", []


def _ways(ways: list[planning.WayOut], fits: bool | None) -> list[str]:
    """What would make it fit, below the answer."""
    if fits is not False:
        return []
    if not ways:
        return ["nothing that was tried makes it fit: recompute, smaller passes, more GPUs, shorter blocks"]
    if len(ways) == 1 and len(ways[0].changes) > 1:
        changes = ", ".join(ways[0].changes)
        return [f"these {len(ways[0].changes)} changes would make it fit: {changes} ({binary(ways[0].needed)})"]
    each = ", or ".join(f"{way.changes[0]} ({binary(way.needed)})" for way in ways)
    return [f"this would make it fit: {each}"]


def _about(row: dict[str, Any], model: Architecture, source: str, cfg: RunConfig, grid: tuple[int, int]) -> list[str]:
    """What is planned, in four or five lines."""
    count, trainable, accumulation = row["parameters"], row["this_run"]["trainable"], row["accumulation_steps"]
    lines = [f"model   {model.model_type}, {count['total']:,} parameters ({source})"]
    if model.experts:
        lines[0] += f"; {count['computing'] / 1e9:.1f}B meet a token"
    lines.append(f"trains  {trainable:,} parameters ({trainable / count['total']:.3%})")
    if cfg.has_factors:
        lines[1] += f": r={cfg.lora.r} on {', '.join(cfg.lora.target_modules)}"
        if (sentence := targets.fused(model, cfg.lora)) is not None:
            lines.append(f"        {sentence}")
    tp = row["tensor_parallel_size"]
    shared = f"tensor parallel {tp}, " if tp > 1 else ""
    offloaded = "" if cfg.activation_offloading == "none" else f", activation_offloading {cfg.activation_offloading}"
    copies = f"{row['ranks'] // tp} data-parallel ranks" if tp > 1 else gpus(row["ranks"])
    lines.append(
        f"ranks   {row['ranks']} ({grid[0]} x {grid[1]}), {shared}ZeRO-{cfg.parallel.zero_stage}, {cfg.precision}, "
        f"recompute {cfg.recompute}" + offloaded
    )
    lines.append(
        f"step    {cfg.train.global_batch_size} x {cfg.data.seq_len} tokens = {cfg.train.micro_batch_size} a pass x "
        f"{copies} x {accumulation} accumulated"
    )
    return lines


def _memory_table(row: dict[str, Any]) -> str:
    """At the fullest moment of each job, and what stays through the step."""
    jobs = _jobs(row)
    fullest = [job["moments"][job["peak_moment"]] for job in jobs.values()]
    lines: list[list[str]] = []
    for name, label in CATEGORIES.items():
        if any(moment[name] for moment in fullest):
            lines.append([label, *(binary(moment[name]) if moment[name] else NOTHING for moment in fullest)])
        if name == list(STATES)[-1]:
            exact = [binary(job["model_states"]["total"]) for job in jobs.values()]
            lines.append(["= model states, exact", *exact])
    lines.append(["= peak allocated", *(binary(job["allocated"]) for job in jobs.values())])
    lines.append(["  at the moment of", *(job["peak_moment"] for job in jobs.values())])
    return table(lines, "on each GPU", *jobs)


def _beside_table(row: dict[str, Any]) -> str:
    """What torch's allocator has no books of, on the GPU and on the host."""
    jobs = _jobs(row)
    lines = [
        [label, *(binary(job[name]) if job[name] else NOTHING for job in jobs.values())]
        for name, label in BESIDE.items()
    ]
    lines.insert(2, ["= needed: peak allocated and these", *(binary(job["needed"]) for job in jobs.values())])
    lines.append(["host memory", *(binary(job["host"]) for job in jobs.values())])
    lines.append(["pinned host memory", *(binary(job["pinned"]) for job in jobs.values())])
    return table(lines, "beside it", *jobs)


def _assumptions(row: dict[str, Any]) -> list[str]:
    """What the figures stand on, last."""
    assumes, run = row["assumes"], row["this_run"]
    documents = "blocks of several documents or with padding, kept apart by a mask"
    documents = documents if assumes["masked"] else "attention without a mask"
    lines = [
        f"Assumed: {documents}; a target at {assumes['target_share']:.0%} of the positions (logits are computed where "
        "there is one).",
        f"Exact: parameters, model states, sizes on disk. Calibrated on {memory.CALIBRATED_ON}: gathered parameters, "
        "workspaces of libraries, allocator waste. Assumed, not measured: CUDA context, NCCL.",
    ]
    if run["by_analogy"]:
        lines.append("Activations are counted by analogy with Llama: this family's own have not been counted.")
    return lines


def _disk_table(row: dict[str, Any]) -> str:
    jobs = _jobs(row)
    lines = [
        ["export, 16 bits", *(binary(job["export"]) for job in jobs.values())],
        ["training checkpoint", *(binary(job["checkpoint"]) for job in jobs.values())],
    ]
    return table(lines, "on disk", *jobs)


def _job_table(row: dict[str, Any], shape: str | None, more: tuple[float, ...]) -> str:
    """All GPUs together, in the decimal units of the literature, by each convention of what a parameter costs."""
    whole, trained = row["parameters"]["total"], row["this_run"]["trainable"]
    lines = []
    conventions: list[tuple[str, float]] = [
        ("weights only, 2 bytes", 2),
        (f"mixed-precision Adam, {cost.MIXED_ADAM} bytes", cost.MIXED_ADAM),
        *((f"{each:g} bytes", each) for each in more),
    ]
    for label, each in conventions:
        full = each * whole
        run = full if "full_fine_tuning" not in row else 2 * whole + each * trained
        lines.append([f"{label} a parameter, computed", decimal(full), decimal(run), f"{full / run:.1f}x"])
    if shape == "gpt3-175b":
        lines.append(list(PAPER))
    return table(lines, "model states, all GPUs together", "full fine-tuning", "this run", "ratio")


def _jobs(row: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {text: row[name] for name, text in JOBS.items() if name in row}
