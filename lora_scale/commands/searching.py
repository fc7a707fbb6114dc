"""`lora-scale plan --search` and `--scale`: layouts of a run on given hardware, and on clusters far larger."""

import json
from dataclasses import asdict
from pathlib import Path

import click

from lora_scale.spec import configfile, hardware, planning, search, speed, traffic
from lora_scale.spec.errors import DoesNotFitError, UsageError
from lora_scale.spec.wording import binary, decimal, gpus, table
from lora_scale.storage.durable import write_text_atomically

MOST_LAYOUTS = 12


def answer(
    job: planning.Job, gpu: str | None, gpus_per_node: int, out: Path | None, *, scales: bool, as_json: bool
) -> None:
    """Print what was asked for; with `out` write the fastest layout as a config. Exit code 3 where nothing fits."""
    if gpu not in hardware.GPUS:
        asked = "--scale" if scales else "--search"
        raise UsageError(f"{asked} needs --gpu with the name of a GPU, to know its speed: {', '.join(hardware.GPUS)}")
    if scales and out:
        raise UsageError("--out writes what --search finds; leave --scale out")
    device = hardware.GPUS[gpu]
    found = _scale(job, device, gpus_per_node, as_json) if scales else _search(job, device, gpus_per_node, out, as_json)
    if not found:
        click.get_current_context().exit(DoesNotFitError.exit_code)


def _search(job: planning.Job, device: hardware.Gpu, gpus_per_node: int, out: Path | None, as_json: bool) -> bool:
    ranks = job.grid.ranks
    found = search.layouts(job.model, job.cfg, ranks, gpus_per_node, device, job.work)
    rows = [{"changes": x.changes, "needed": x.needed, "tokens_per_second": round(x.tokens_per_second)} for x in found]
    if as_json:
        click.echo(json.dumps({"layouts": rows}, indent=2))
    elif found:
        lines = [[" ".join(x.changes), f"{x.tokens_per_second:,.0f}", binary(x.needed)] for x in found[:MOST_LAYOUTS]]
        click.echo(f"fastest of {len(found)} layouts that fit {gpus(ranks)}: {' '.join(found[0].changes)}\n")
        click.echo(table(lines, "layout", "tokens/s", "a GPU"))
        click.echo(f"\nTokens/s by formulas, not measured here; two constants are fitted on {speed.FITTED_ON}.")
    else:
        click.echo(f"no layout fits {gpus(ranks)} of {device.memory_gib:g} GiB: more GPUs, or shorter blocks")
    if found and out:
        write_text_atomically(out, configfile.resolved_json(found[0].cfg))
        click.echo(f"written: {out}", err=True)
    return bool(found)


def _scale(job: planning.Job, device: hardware.Gpu, gpus_per_node: int, as_json: bool) -> bool:
    found = list(traffic.clusters(job, device, gpus_per_node))
    if as_json:
        rows = [
            asdict(x) | {"tokens_per_second": round(x.tokens_per_second), "efficiency": x.efficiency} for x in found
        ]
        click.echo(json.dumps({"clusters": rows}, indent=2))
        return bool(found)
    if not found:
        click.echo(f"no layout fits nodes of {gpus(gpus_per_node)} of {device.memory_gib:g} GiB")
        return False
    for layout, size in traffic.ends(found).items():
        end = f"at {size:,} GPUs the network takes more than a tenth of a step" if size else "scales to 1,024 GPUs"
        click.echo(f"{layout}: {end}")
    lines = [
        [
            *(x.layout, f"{x.gpus:,}", f"{x.tokens_a_step:,}", decimal(x.network), decimal(x.node)),
            *(f"{x.work:.2f}", f"{x.waits:.3f}", f"{x.efficiency:.0%}", f"{x.tokens_per_second:,.0f}"),
        ]
        for x in found
    ]
    heads = ("layout", "GPUs", "tokens a step", "from other nodes", "from own node", "work, s", "waits, s", "")
    click.echo("\n" + table(lines, *heads, "tokens/s"))
    click.echo(
        f"\nBytes a GPU and step of one pass. On paper: a network of {decimal(int(speed.NETWORK))}/s a GPU and "
        f"{traffic.LATENCY * 1e6:.0f} us a message are assumed, and products as fast in small pieces as in large ones; "
        "formulas and their sources: lora_scale/spec/traffic.py."
    )
    return True
