"""One case: its command, its run under a time limit, and its row of the record, whichever side it is of.

All figures of both sides are taken here in the same way, from the seconds of each step.
"""

import json
import re
import shlex
import shutil
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_scale.commands.benching import materials, processes
from lora_scale.commands.benching.cases import MODELS, OURS, Case
from lora_scale.spec.errors import CheckpointError, LoraScaleError, UsageError
from lora_scale.storage.runlog import read_manifest, read_metrics, read_resolved_config

SKIPPED = 3  # steps at the start: compilation, caches, the first allocation of everything
GIB = 1 << 30
ALONE = ("peft_single",)  # scripts that know no ranks
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Bench:
    """Where everything is, and how many steps are measured."""

    work: Path
    steps: int
    gpus: int  # of this machine; 0: ranks are processes on a CPU

    def run_dir(self, name: str) -> Path:
        return self.work / "runs" / name

    def log(self, name: str) -> Path:
        return self.work / "logs" / f"{name}.txt"


def check_steps(steps: int, cases: Iterable[Case]) -> None:
    """A UsageError where a run would come to its second epoch, in which ours and peers' scripts take other rows."""
    most = materials.ROWS // max(case.blocks for case in cases) - SKIPPED
    if steps > most:
        raise UsageError(f"--steps is {steps}; there are rows for {most} after the first {SKIPPED}")


def checkpoint(case: Case, bench: Bench) -> Path:
    """The case's model, written where it is not there."""
    return materials.checkpoint(*MODELS[case.model], bench.work / "models")


def measure(name: str, case: Case, bench: Bench) -> Row:
    """The row of a case; where there are no figures, `failed` says why and `said` what the program said last."""
    row: Row = {"name": name, "who": case.who, "model": case.model, "ranks": case.gpus, "note": case.note}
    row |= {"seq_len": case.seq_len, "blocks_a_step": case.blocks, "blocks_a_pass": case.micro}
    row |= {"settings": list(case.settings)}
    if bench.gpus < case.gpus and (bench.gpus or case.model != "tiny"):
        return row | {"failed": f"needs {case.gpus} GPUs; {bench.gpus} here"}
    try:
        folder = checkpoint(case, bench)
        command = (_peer if case.peer else _ours)(name, case, folder, bench)
    except LoraScaleError as error:
        return row | {"failed": str(error)}
    bench.log(name).parent.mkdir(parents=True, exist_ok=True)
    bench.log(name).unlink(missing_ok=True)
    row["command"] = shlex.join(["python", *(word.removeprefix(f"{materials.ROOT}/") for word in command[1:])])
    began = time.monotonic()
    ranks = 0 if case.peer in ALONE else case.gpus
    code = processes.run(command, ranks, bench.log(name), case.limit, materials.ROOT)
    row["seconds_in_all"] = round(time.monotonic() - began, 1)
    if code != 0:
        why = f"not over after {case.limit:g} s" if code is None else f"exit code {code}"
        return row | {"failed": why, "said": last_words(bench.log(name))}
    try:
        found = _peers_figures(bench.log(name)) if case.peer else _our_figures(bench.run_dir(name))
    except (LoraScaleError, KeyError, ValueError, IndexError) as error:
        return row | {"failed": f"no figures: {error}", "said": last_words(bench.log(name))}
    return row | found | _speed(found["every_step_seconds"], case, materials.parameters(folder), found)


def _ours(name: str, case: Case, folder: Path, bench: Bench) -> list[str]:
    """`lora-scale train` of a fresh run directory."""
    run_dir, file = bench.run_dir(name), bench.work / "runs" / f"{name}.yaml"
    shutil.rmtree(run_dir, ignore_errors=True)
    train = {"max_steps": bench.steps + SKIPPED, "global_batch_size": case.blocks, "micro_batch_size": case.micro}
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(materials.config(folder, case.seq_len, run_dir, bench.work, **train), indent=1))
    command = [sys.executable, "-m", "lora_scale", "train", str(file), *case.settings]
    return [*command, "--ignore-plan"]


def _peer(name: str, case: Case, folder: Path, bench: Bench) -> list[str]:
    assert case.blocks == case.gpus * case.micro, f"{name}: peers' scripts do not accumulate"
    rows = materials.rows_in_order(case.seq_len, bench.work)
    words = {"seq": case.seq_len, "mb": case.micro, "steps": bench.steps + SKIPPED, "rows": rows, "tag": name}
    options = [word for key, value in words.items() for word in (f"--{key}", str(value))]
    return [sys.executable, materials.script(f"peers/{case.peer}.py"), str(folder), *options, *case.settings]


def _our_figures(run_dir: Path) -> Row:
    """Of a run directory: seconds by step, memory of the first rank at its peak, losses."""
    manifest, config = read_manifest(run_dir), read_resolved_config(run_dir)
    rows = [row for row in read_metrics(run_dir) if "loss" in row]
    if not rows:
        raise CheckpointError(f"{run_dir} has no step")
    phases = {phase for row in rows for phase in row["phase_seconds"]}
    return {
        "every_step_seconds": [row["seconds"] for row in rows],
        "losses": [row["loss"] for row in rows],
        "method": config["method"],
        "recompute": config["recompute"],
        "peak_gib": _largest(rows, "peak_gib"),
        "reserved_gib": _largest(rows, "peak_reserved_gib"),
        "load_seconds": manifest["load"]["seconds"],
        "device": manifest["hardware"]["device"],
        "attention": manifest["attention"],
        "phase_seconds": {
            phase: round(statistics.median(row["phase_seconds"].get(phase, 0.0) for row in rows[SKIPPED:]), 4)
            for phase in sorted(phases)
        },
        "planned_peak_gib": _planned(manifest),
    }


def _largest(rows: Sequence[Row], figure: str) -> float | None:
    return max((row["memory"][figure] for row in rows if figure in row["memory"]), default=None)


def _planned(manifest: Row) -> float | None:
    planned = manifest.get("plan", {}).get("this_run")
    return round(planned["allocated"] / GIB, 2) if planned else None


def _peers_figures(log: Path) -> Row:
    """Of the line RESULT {json} that a peer's script prints; it counts memory in GB, and 0 where there is no GPU."""
    line = next((line for line in log.read_text().splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise CheckpointError("the script printed no RESULT")
    found = json.loads(line.removeprefix("RESULT "))
    peak, reserved = (round(found[key] * 1e9 / GIB, 3) or None for key in ("peak_gb", "reserved_gb"))
    return {
        "every_step_seconds": found["step_times"],
        "losses": found["loss"],
        "method": found["method"],
        "peer": found["peer"],
        "peak_gib": peak,
        "reserved_gib": reserved,
        "load_seconds": found.get("load_s", found["init_s"]),
        "device": found["device"],
    }


def _speed(seconds: list[float], case: Case, parameters: tuple[int, int], found: Row) -> Row:
    """Medians over the steps after the skipped ones. `tflops_4n` is 4 N tokens/s a GPU (6 N where every weight trains)
    with N all parameters of the base, as peers' scripts count and the gates mean it; beside it the figure of
    metrics.jsonl, where N is without the input embedding (spec.cost)."""
    measured = seconds[SKIPPED:]
    step, tokens = statistics.median(measured), case.blocks * case.seq_len
    low, _, high = statistics.quantiles(measured, n=4)
    per_gpu = (6 if found["method"] == "full" else 4) * tokens / step / case.gpus / 1e12
    memory = found["peak_gib"], found["reserved_gib"]
    return {
        "steps": {"measured": len(measured), "skipped": SKIPPED},
        "tokens_a_step": tokens,
        "step_seconds": {"median": round(step, 6), "quartiles": [round(low, 6), round(high, 6)]},
        "tokens_per_second": round(tokens / step, 1),
        "parameters": parameters[0],
        "tflops_4n": round(per_gpu * parameters[0], 4),
        "tflops_4n_without_embedding": round(per_gpu * parameters[1], 4),
        "reserved_over_peak": round(memory[1] / memory[0], 4) if all(memory) else None,
    }


def last_words(log: Path, count: int = 3) -> list[str]:
    """The last lines that name an error; where there are none, the last lines."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"\w(Error|Exception): |\berror: ", line)]
    return [line[:400] for line in (errors or lines)[-count:]]


def figure(row: Row, name: str) -> float | None:
    """A figure of a row; None where the row has none."""
    value = row.get(name)
    return value["median"] if isinstance(value, dict) else value


def is_ours(row: Row) -> bool:
    return row["who"] == OURS
