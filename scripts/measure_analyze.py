#!/usr/bin/env python3
"""How long `lora-scale analyze` takes, and how much memory, on a whole base of 100B shape, and whether it is right.

    python scripts/measure_analyze.py /tmp/analyze --out docs/benchmarks/NAME.json
    python scripts/measure_analyze.py /tmp/analyze --layers 1 --layers 2

Writes `make_checkpoint.py`'s base with random q and v projections; the tensors that are not read are holes in files of
full size, so that 201 GB take 21 GB of a disk, and seconds say nothing of a disk's speed. The adapter's updates are
planted: known singular values, the left directions those that W makes of the right ones, so that ||U^T W V||_F is
||W V||_F. Runs the command as a user would, compares, deletes the base, and writes a record. A tree with uncommitted
changes is refused where --out is given.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import make_checkpoint  # noqa: E402
import torch  # noqa: E402
from safetensors import safe_open  # noqa: E402

from lora_scale.adapters import peft  # noqa: E402
from lora_scale.storage import provenance  # noqa: E402
from lora_scale.storage.folder import open_folder  # noqa: E402

TARGETS = ("q_proj", "v_proj")
PROGRAM = "scripts/measure_analyze.py"
WHAT = (
    "the command on all q and v projections of so many layers, random weights, files of full size whose other tensors "
    "are holes, and an adapter with planted updates; one thread of a machine shared with other work; nothing here says "
    "how fast a disk is"
)


def plant(base: Path, adapter: Path, r: int) -> dict[str, tuple[torch.Tensor, float]]:
    """Write an adapter; of each module its update's singular values and ||U^T W V||_F, from the whole W."""
    generator, factors, known = torch.Generator().manual_seed(0), {}, {}
    values = torch.linspace(2.0, 1.0, r)
    for name, entry in open_folder(base).tensors.items():
        module = name.removesuffix(".weight")
        if not module.endswith(TARGETS):
            continue
        with safe_open(entry.file, "pt") as file:
            weight = file.get_tensor(name).float()
        right = torch.linalg.qr(torch.randn(weight.shape[1], r, generator=generator))[0]
        made = weight @ right
        factors[f"{module}.lora_A"] = right.T.contiguous()
        factors[f"{module}.lora_B"] = torch.linalg.qr(made)[0] * values
        known[module] = values, made.norm().item()
    config = {"peft_type": "LORA", "r": r, "lora_alpha": r, "bias": "none", "target_modules": list(TARGETS)}
    adapter.mkdir(parents=True)
    peft.write_adapter(adapter, factors, config)
    return known


def measure(folder: Path, preset: str, layers: int | None, r: int) -> dict[str, Any]:
    """One row: what a run takes, and how far the JSON that it writes is from what was planted, relative."""
    base, adapter = folder / "base", folder / "adapter"
    wanted = ["--layers", str(layers)] if layers else []
    make_checkpoint.main([preset, str(base), *wanted, "--only", *TARGETS, "--jobs", "2"])
    known = plant(base, adapter, r)
    nbytes = sum(file.stat().st_size for file in open_folder(base).files)
    command = [sys.executable, "-m", "lora_scale", "analyze", str(adapter), "--base", str(base)]
    begin, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, "--out", str(folder / "page.html")], check=True)
    seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    found = {row["module"]: row for row in json.loads((folder / "page.json").read_text())["modules"]}
    assert found.keys() == known.keys(), f"{len(found)} modules on the page, {len(known)} planted"
    spectra, alike, errors = [], [], []
    for module, (values, norm) in known.items():
        (spectrum,), (row,) = found[module]["spectra"].values(), found[module]["correlations"].values()
        spectra.append(((torch.tensor(spectrum["values"]) - values).abs() / values).max().item())
        alike.append(abs(row["from_update"] - norm) / norm)
        errors.append(row["error"])
    return {
        "shape": f"llama-{nbytes / 2e9:.1f}b",
        "base_bytes": nbytes,
        "modules": len(known),
        "r": r,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_rss_gib": round(after.ru_maxrss / 2**20, 2),
        "values_off": max(spectra),
        "from_update_off": max(alike),
        "stated_error": max(errors),
        "threads": torch.get_num_threads(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a place for the base; made, and deleted at the end")
    parser.add_argument("--preset", default="100b", choices=make_checkpoint.PRESETS)
    parser.add_argument("--layers", type=int, action="append", help="a run on so many layers (default: on all)")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    commit = provenance.commit_of_record(PROGRAM, args.out is not None)
    rows = []
    for layers in args.layers or [None]:
        args.folder.mkdir()  # never one that has something in it
        try:
            rows.append(measure(args.folder, args.preset, layers, args.r))
        finally:
            shutil.rmtree(args.folder)
        print(json.dumps(rows[-1]), flush=True)
    if args.out:
        record = {"kind": "analyze", **provenance.head(WHAT, PROGRAM, commit), "rows": rows}
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
