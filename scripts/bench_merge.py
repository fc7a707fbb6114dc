#!/usr/bin/env python3
"""Measure `lora-scale merge` on a random checkpoint: memory, speed beside a plain copy and beside PEFT, and kills.

    python scripts/bench_merge.py /tmp/bench --preset 1b --kills 20 --out docs/benchmarks/NAME.json

Peak memory is the largest RssAnon in /proc, looked at every 5 ms: pages of files, which the kernel can drop, are not in
it. PEFT's way is from_pretrained, merge_and_unload, save_pretrained in the base's dtype, as its documentation has it.
A kill is a SIGKILL at a random moment of the writing; the same command then goes on, and every finished result is
compared by SHA-256 with that of an uninterrupted merge. A tree with uncommitted changes is refused.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from math import prod
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import make_checkpoint  # noqa: E402
import torch  # noqa: E402

from lora_scale import cli  # noqa: E402
from lora_scale.adapters import peft  # noqa: E402
from lora_scale.storage import provenance  # noqa: E402
from lora_scale.storage.folder import fingerprint, open_folder  # noqa: E402
from lora_scale.storage.staging import unfinished  # noqa: E402

ROOT = Path(__file__).parent.parent
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
"""


def write_adapter(folder: Path, base: Path, r: int) -> None:
    """All linear layers of a Llama, both factors random; written as `export` writes it."""
    draw, factors = torch.Generator().manual_seed(0), {}
    for name, entry in open_folder(base).tensors.items():
        module = name.removesuffix(".weight")
        if module.endswith("_proj"):
            factors[f"{module}.lora_A"] = torch.randn(r, entry.shape[1], generator=draw) * 0.02
            factors[f"{module}.lora_B"] = torch.randn(entry.shape[0], r, generator=draw) * 0.02
    ends = sorted({name.split(".")[-2] for name in factors})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 2 * r, "target_modules": ends}
    folder.mkdir()
    peft.write_adapter(folder, factors, config, "fp32", fingerprint(open_folder(base)))


def measured(command: list[str]) -> dict[str, Any]:
    """Wall seconds, processor seconds and peak RssAnon of one process; what it printed."""
    start, before = time.perf_counter(), os.times()
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    peak = 0
    while child.poll() is None:
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
        except OSError:
            break
        rows = [line for line in status.splitlines() if line.startswith("RssAnon")]
        peak = max([peak, *(int(row.split()[1]) * 1024 for row in rows)])
        time.sleep(0.005)
    said, _ = child.communicate()
    after = os.times()
    if child.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{said}")
    return {
        "seconds": round(time.perf_counter() - start, 2),
        "processor_seconds": round(after.children_user - before.children_user, 2)
        + round(after.children_system - before.children_system, 2),
        "peak_anonymous_mib": round(peak / 2**20, 1),
        "said": said,
    }


def digests(folder: Path) -> dict[str, str]:
    found = {}
    for file in sorted(folder.iterdir()):
        with file.open("rb") as stream:
            found[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


def copy(base: Path, out: Path) -> float:
    """GB/s of cp and sync."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(base), str(out)], check=True)
    for file in out.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
    rate = sum(file.stat().st_size for file in out.iterdir()) / 1e9 / (time.perf_counter() - start)
    shutil.rmtree(out)
    return rate


def start(arguments: list[str]) -> int:
    """`lora-scale merge ...` in a fork, which has its imports from here: 20 kills then cost no 20 imports."""
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        cli.main(arguments)
    except SystemExit as end:
        os._exit(int(end.code or 0))
    os._exit(99)


def kill_and_go_on(
    arguments: list[str], out: Path, kills: int, seconds: float, wanted: dict[str, str]
) -> dict[str, Any]:
    """SIGKILLs at random moments of the writing, the same command again after each."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import lora_scale.commands.merge  # noqa: F401

    draw, done, results, kept = random.Random(1), 0, 0, []
    while done < kills or not results:
        pid, ended = start(arguments), 0
        while not ended and not unfinished(out).exists():
            ended = os.waitpid(pid, os.WNOHANG)[0]
            time.sleep(0.002)
        end = time.monotonic() + draw.uniform(0.0, seconds)
        while not ended and (done == kills or time.monotonic() < end):
            ended = os.waitpid(pid, os.WNOHANG)[0]
            time.sleep(0.002)
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            done += 1
        if unfinished(out).exists():
            kept.append(len(list(unfinished(out).glob("*.safetensors"))))
        if out.exists():
            assert digests(out) == wanted, f"after {done} kills the result differs"
            shutil.rmtree(out)
            results += 1
    return {"kills": done, "results_compared": results, "whole_files_after_each_kill": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path, help="a folder with room for three copies of the checkpoint")
    parser.add_argument("--preset", default="1b", choices=make_checkpoint.PRESETS)
    parser.add_argument("--files", type=int, default=6)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    commit = provenance.commit()
    if args.out and (not commit or commit.endswith("+changes")):
        raise SystemExit("bench_merge: the tree has uncommitted changes, or no commit is known; commit first")
    args.place.mkdir(parents=True, exist_ok=True)
    base, adapter, out = args.place / "base", args.place / "adapter", args.place / "out"
    if not base.exists():
        make_checkpoint.main([args.preset, str(base), "--files", str(args.files), "--jobs", "1"])
        write_adapter(adapter, base, args.r)
    torch.set_num_threads(1)  # forks must find no threads of OpenMP
    folder = open_folder(base)
    command = [sys.executable, "-m", "lora_scale", "merge", str(adapter), "--base", str(base), "--out", str(out)]
    record: dict[str, Any] = {
        "what": "lora-scale merge of a random Llama-shaped bf16 checkpoint and an adapter on all linear layers: peak "
        "RssAnon (imports included), seconds, GB/s of the base beside cp with fsync, PEFT's merge_and_unload, and "
        "SIGKILLs at random moments of the writing",
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "hardware": f"{os.cpu_count()} CPU cores, shared with other work",
        "versions": provenance.versions(),
        "parameters": sum(prod(entry.shape) for entry in folder.tensors.values()),
        "weights_bytes": folder.nbytes,
        "largest_file_bytes": max(file.stat().st_size for file in folder.files),
        "adapter": {"r": args.r, "modules": len(peft.read_adapter(adapter).modules)},
        "copy_gb_per_second": round(max(copy(base, out) for _ in range(2)), 2),
    }
    record["imports_only_anonymous_mib"] = measured([*command[:4], "--help"])["peak_anonymous_mib"]
    wanted: dict[str, str] = {}
    for threads in args.threads:
        run = measured([*command, "--threads", str(threads)])
        took = next(line for line in run.pop("said").splitlines() if line.startswith("took"))
        wanted = wanted or digests(out)
        assert digests(out) == wanted, f"{threads} threads write other bytes"
        shutil.rmtree(out)
        record[f"merge_{threads}_threads"] = run | {"took": took}
        print(threads, run, took, flush=True)
    run = measured([sys.executable, "-c", PEFT, str(base), str(adapter), str(out)])
    run.pop("said")
    shutil.rmtree(out)
    record["peft_merge_and_unload"] = run
    print("peft", run, flush=True)
    writing = float(took.split()[1])
    record["killed"] = kill_and_go_on([*command[3:], "--threads", "2"], out, args.kills, writing, wanted)
    print(json.dumps(record, indent=1))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
