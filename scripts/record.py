#!/usr/bin/env python3
"""Records of measured runs, and the tables made from them. A figure in docs/benchmarks/ comes from a record or is not
there.

    python scripts/record.py make --out docs/benchmarks/NAME.json --skip 3 RUN... [--peer NAME=OUTPUT.txt]...
    python scripts/record.py tables docs/benchmarks          writes README.md there from every record

`make` reads run directories of `lora-scale train`, and outputs of peers' scripts that print one line `RESULT {json}`.
A record of a tree with uncommitted changes is refused, unless the records' commit is given by LORA_SCALE_COMMIT (a
copy without .git).
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))

import bench_attention
import bench_serving
import fp32_losses
import launchers
import memory_grid
import real_rows
import run_grid
import subspaces

from lora_scale.commands.benching import tables as tables_of_bench
from lora_scale.storage import provenance
from lora_scale.storage.runlog import read_manifest, read_metrics, read_resolved_config

GIB, GB = 1 << 30, 1e9


def of_run(run: Path, skip: int) -> dict[str, Any]:
    """One row of a record: medians over the steps after the first `skip`, with the quartiles as spread."""
    manifest, config = read_manifest(run), read_resolved_config(run)
    rows = [row for row in read_metrics(run) if "loss" in row]
    measured = rows[skip:]
    if len(measured) < 5:
        raise SystemExit(f"{run}: {len(rows)} steps, of which {skip} are skipped; at least 5 are needed for a median")
    seconds = sorted(row["seconds"] for row in measured)
    memory = measured[-1]["memory"]
    low, _, high = statistics.quantiles(seconds, n=4)
    return {
        "name": run.name,
        "who": "lora_scale",
        "command": " ".join(manifest["command"]),
        "ranks": manifest["ranks"],
        "device": manifest["hardware"]["device"],
        "parameters": manifest["parameters"],
        "method": config["method"],
        "zero_stage": config["parallel"]["zero_stage"],
        "recompute": config["recompute"],
        "seq_len": config["data"]["seq_len"],
        "blocks_a_pass": config["train"]["micro_batch_size"],
        "tokens_a_step": round(statistics.median(row["tokens"] for row in measured)),
        "steps": {"measured": len(measured), "skipped": skip},
        "step_seconds": {"median": statistics.median(seconds), "quartiles": [low, high]},
        "tokens_per_second": round(statistics.median(row["tokens_per_second"] for row in measured), 1),
        "tflops_4n": round(statistics.median(row["tflops_4n"] for row in measured), 1),
        "peak_gib": memory.get("peak_gib"),
        "reserved_gib": memory.get("peak_reserved_gib"),
        "host_rss_peak_gib": memory["rss_peak_gib"],
        "load_seconds": manifest["load"]["seconds"],
        "load_gb_a_rank": round(manifest["load"]["bytes"] / GB, 3),
        "save_seconds": next((round(row["save_seconds"], 3) for row in rows if "save_seconds" in row), None),
        "first_loss": rows[0]["loss"],
        "last_loss": rows[-1]["loss"],
        "val_loss": [row["val_loss"] for row in read_metrics(run) if "val_loss" in row],
    }


def of_peer(name: str, output: Path, ours: dict[str, Any]) -> dict[str, Any]:
    """The same fields from a peer script's RESULT line; it takes its median itself and counts in GB.

    TFLOP/s are counted anew with the N of our row `ours`: the script's own counts the input embedding.
    """
    line = next((line for line in output.read_text().splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(
            f"{output}: no RESULT line; the peer failed, which a record does not hide: leave it out and say so"
        )
    found = json.loads(line.removeprefix("RESULT "))
    flops_a_token = ours["tflops_4n"] * 1e12 * ours["ranks"] / ours["tokens_per_second"]
    return {
        "name": name,
        "who": found["peer"],
        "ranks": found["world"],
        "method": found["method"],
        "seq_len": found["seq"],
        "blocks_a_pass": found["mb"],
        "step_seconds": {"median": found["step_s"]},
        "tokens_per_second": found["tok_s"],
        "tflops_4n": round(found["tok_s"] / found["world"] * flops_a_token / 1e12, 1),
        "peak_gib": round(found["peak_gb"] * GB / GIB, 2),
        "reserved_gib": round(found["reserved_gb"] * GB / GIB, 2),
        "load_seconds": found["load_s"],
        "save_seconds": found["save_s"],
        "first_loss": found["loss"][0],
        "last_loss": found["loss"][-1],
    }


def make(arguments: argparse.Namespace) -> None:
    commit = provenance.commit()
    if not commit or commit.endswith("+changes"):
        raise SystemExit("record: the tree has uncommitted changes, or no commit is known; commit first")
    peers = [pair.partition("=") for pair in arguments.peer]
    ours = [of_run(run, arguments.skip) for run in arguments.runs]
    record = {
        "title": arguments.title,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "versions": read_manifest(arguments.runs[0])["versions"],
        "hardware": read_manifest(arguments.runs[0])["hardware"],
        "rows": ours + [of_peer(name, Path(output), ours[0]) for name, _, output in peers],
    }
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def tables(arguments: argparse.Namespace) -> None:
    text = [
        "# Benchmarks",
        "",
        "Made from the records in this folder by `python scripts/record.py tables docs/benchmarks`.",
        "",
    ]
    for path in sorted(arguments.folder.glob("*.json")):
        record = json.loads(path.read_text())
        if record.get("kind") == "bench":
            text += _bench(path.name, record)
        elif record.get("kind") == "paper":
            commits = Counter(row.get("commit", record["commit"])[:10] for row in record["cells"])
            cells = " and ".join(f"{count} cells at commit `{commit}`" for commit, count in commits.items())
            head = [f"## {record['title']}", "", f"{record['device']}; {cells}; record [{path.name}]({path.name})."]
            text += [*head, "", run_grid.tables_of(record), ""]
        elif record.get("kind") == "memory grid":
            head = ["## Memory, predicted and measured", "", f"Record [{path.name}]({path.name}).", ""]
            text += [*head, memory_grid.table(record), ""]
        elif record.get("kind") == "analyze":
            text += _analyze_table(path.name, record)
        elif record.get("kind") == "subspaces":
            text += [*_head("Updates of four runs of the grid", path.name, record), *subspaces.table(record), ""]
        elif record.get("kind") == "fp32 losses":
            text += [*_head("Losses in bf16 beside fp32", path.name, record), fp32_losses.table(record["runs"]), ""]
        elif record.get("kind") == "launchers":
            text += [*_head("One job by three launchers", path.name, record), *launchers.table(record["rows"]), ""]
        elif record.get("kind") == "real rows":
            head = _head("Real rows under tensor parallelism", path.name, record)
            text += [*head, *real_rows.table(record["runs"]), ""]
        elif record.get("kind") == "attention":
            text += [*_head("Attention of packed rows", path.name, record), *bench_attention.table(record["rows"]), ""]
        elif record.get("kind") == "overhead":
            text += _overhead_table(path.name, record)
        elif record.get("kind") == "products":
            text += _products_table(path.name, record)
        elif record.get("kind") == "serving":
            text += [*_head("Latency and switching", path.name, record), *bench_serving.table(record), ""]
        elif "title" in record:
            text += _table(path.name, record)
        if "signals" in record:
            text += _signal_table(path.name, record)
        elif "kills" in record and "runs" in record:
            text += _kill_table(path.name, record)
        elif "faults" in record:
            text += _fault_table(path.name, record)
        elif "link" in record:
            text += _link_table(path.name, record)
    (arguments.folder / "README.md").write_text("\n".join(text).rstrip() + "\n")


def _table(file: str, record: dict[str, Any]) -> list[str]:
    versions, hardware = record["versions"], record["hardware"]
    lines = [
        f"## {record['title']}",
        "",
        f"{hardware['device']}; torch {versions['torch']}, deepspeed {versions['deepspeed']}, transformers "
        f"{versions['transformers']}; commit `{record['commit'][:10]}`; record [{file}]({file}).",
        "",
        "| run | who | ranks | tokens/s | TFLOP/s a GPU | step, s (quartiles) | peak / reserved GiB | load s | "
        "save s |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in record["rows"]:
        step = row["step_seconds"]
        spread = " ({:.3f}-{:.3f})".format(*step["quartiles"]) if "quartiles" in step else ""
        memory = f"{row['peak_gib']:.1f} / {row['reserved_gib']:.1f}" if row["peak_gib"] else "-"
        save = f"{row['save_seconds']:.2f}" if row["save_seconds"] is not None else "-"
        lines.append(
            f"| {row['name']} | {row['who']} | {row['ranks']} | {row['tokens_per_second']:,.0f} | "
            f"{row['tflops_4n']:.0f} "
            f"| {step['median']:.3f}{spread} | {memory} | {row['load_seconds']:.1f} | {save} |"
        )
    return [*lines, ""]


def _bench(file: str, record: dict[str, Any]) -> list[str]:
    """As `lora-scale bench table` prints it."""
    device, commit = record["hardware"].get("device"), str(record["commit"])[:10]
    head = [f"## {record['title']} ({file})", "", f"{device}; commit `{commit}`; record [{file}]({file}).", ""]
    return [*head, tables_of_bench.markdown([record]), ""]


def _head(title: str, file: str, record: dict[str, Any]) -> list[str]:
    """What was done, and to which commit."""
    said = f"{record['what']}; {record['hardware']}; commit `{record['commit'][:10]}`; record [{file}]({file})."
    return [f"## {title}", "", said[0].upper() + said[1:], ""]


def _overhead_table(file: str, record: dict[str, Any]) -> list[str]:
    """Of scripts/bench_overhead.py."""
    lines = _head("What it costs a step to be told of", file, record)
    lines += ["| model | GPUs | settings | a step without, s | with, s | more |", "|---|--:|---|--:|--:|--:|"]
    for row in record["rows"]:
        without, told = (row["medians"][way] for way in ("without", "with"))
        settings = f"`{' '.join(row['settings'])}`"
        lines.append(
            f"| {row['model']} | {row['ranks']} | {settings} | {without:.4f} | {told:.4f} | {row['overhead']:+.2%} |"
        )
    return [*lines, ""]


def _products_table(file: str, record: dict[str, Any]) -> list[str]:
    lines = _head("Products alone, sustained", file, record)
    lines += ["| product | ms | TFLOP/s | MHz | W |", "|---|--:|--:|--:|--:|"]
    for row in record["rows"]:
        rate = f"{row['tflops']:.0f}" if row["tflops"] else "-"
        clock, watts = (statistics.median(row[key]) for key in ("mhz", "watts"))
        lines.append(f"| {row['what']} | {row['ms']:.4f} | {rate} | {clock:,.0f} | {watts:.0f} |")
    return [*lines, ""]


def _signal_table(file: str, record: dict[str, Any]) -> list[str]:
    lines = _head("Signals at random moments", file, record)
    lines += [
        "| signal | times | runs | before its job's first step | exit codes of the two ranks | seconds to the end "
        "| faults |",
        "|---|--:|--:|--:|---|--:|--:|",
    ]
    for row in record["signals"]:
        codes = ", ".join(f"{codes} ({times})" for codes, times in row["exit_codes"].items())
        median, most = statistics.median(row["seconds_to_end"]), max(row["seconds_to_end"])
        lines.append(
            f"| {row['signal']} | {row['times']} | {row['runs']} | {row['before_a_step_of_its_job']} | {codes} | "
            f"{median:.1f}, at most {most:.1f} | {len(row['faults'])} |"
        )
    return [*lines, ""]


def _kill_table(file: str, record: dict[str, Any]) -> list[str]:
    return [
        *_head("Kills at random moments", file, record),
        "| kills | runs | before a save | went on from a checkpoint | half checkpoints cleared away | faults |",
        "|--:|--:|--:|--:|--:|--:|",
        f"| {record['kills']} | {record['runs']} | {record['kills_before_a_step']} | {len(record['resumed_from'])} | "
        f"{record['leftovers']} | {len(record['faults'])} |",
        "",
    ]


def _analyze_table(file: str, record: dict[str, Any]) -> list[str]:
    """Lines of scripts/measure_analyze.py."""
    lines = _head("What `lora-scale analyze` takes", file, record)
    lines += [
        "| base | GB | adapted modules | r | seconds | of a processor | peak memory, GiB | planted singular values, "
        "off by | planted products with W, off by |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in record["rows"]:
        lines.append(
            f"| {row['shape']} | {row['base_bytes'] / GB:,.0f} | {row['modules']} | {row['r']} | "
            f"{row['seconds']:,.0f} | {row['cpu_seconds']:,.0f} | {row['peak_rss_gib']:.2f} | "
            f"{row['values_off']:.0e} | {row['from_update_off']:.0e} |"
        )
    return [*lines, ""]


def _fault_table(file: str, record: dict[str, Any]) -> list[str]:
    """A row a fault: medians where it was put in several times; steps lost is from the fault to the checkpoint."""
    lines = [
        f"## Faults on several hosts ({file})",
        "",
        f"{record['what']}; commit `{record['commit'][:10]}`; record [{file}]({file}).",
        "",
        "| fault | times | seconds to the error | orphans | goes on | steps run again | losses as undisturbed |",
        "|---|--:|--:|--:|---|--:|---|",
    ]
    for fault in dict.fromkeys(row["fault"] for row in record["faults"]):
        rows = [row for row in record["faults"] if row["fault"] == fault]
        seconds = [row["seconds_to_error"] for row in rows if row["seconds_to_error"] is not None]
        again = [max(0, row["at_step"] - row["resumed_from"]) for row in rows if row["resumed_from"] is not None]
        lines.append(
            f"| {fault} | {len(rows)} | {f'{statistics.median(seconds):.1f}' if seconds else '-'} | "
            f"{sum(row['orphans'] for row in rows)} | {', '.join(dict.fromkeys(row['resumed'] for row in rows))} | "
            f"{f'{statistics.median(again):.0f}' if again else '-'} | "
            f"{'yes' if all(row['equal'] for row in rows) else 'NO'} |"
        )
    return [*lines, ""]


def _link_table(file: str, record: dict[str, Any]) -> list[str]:
    lines = _head(f"What crosses the link between hosts ({file})", file, record)
    lines += [
        "| `base_sharding` | base, MB | adapter's fp32 gradients, MB | MB a step on the card |",
        "|---|--:|--:|--:|",
    ]
    for row in record["link"]:
        sizes = (f"{row[key] / 1e6:.3f}" for key in ("base_bytes", "gradient_bytes", "bytes_a_step"))
        lines.append(f"| {row['base_sharding']} | {' | '.join(sizes)} |")
    return [*lines, ""]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("make")
    one.add_argument("runs", nargs="+", type=Path)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--title", required=True)
    one.add_argument("--skip", type=int, default=3, help="steps left out at the start")
    one.add_argument("--peer", action="append", default=[], help="NAME=FILE with a RESULT line")
    one.set_defaults(do=make)
    all_of_them = verbs.add_parser("tables")
    all_of_them.add_argument("folder", type=Path)
    all_of_them.set_defaults(do=tables)
    arguments = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    main()
