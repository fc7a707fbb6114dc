#!/usr/bin/env python3
"""Measure what an adapter costs when it is used: switching between many, and latency beside the base and PEFT.

    python scripts/make_checkpoint.py 1b bench/1b
    python scripts/bench_serving.py switch  --model bench/1b --adapters 100 --out docs/benchmarks/NAME.json
    python scripts/bench_serving.py latency --model bench/1b --out docs/benchmarks/NAME.json
    python scripts/bench_serving.py generate --model bench/1b --out docs/benchmarks/NAME.json
    torchrun --nproc_per_node 2 scripts/bench_serving.py latency --model bench/1b --tp 2 --out ...
    torchrun --nproc_per_node 2 scripts/bench_serving.py generate --model bench/1b --zero-stage 3 --out ...

Random factors: neither time depends on their values. Times are from before the call until the device is idle, median
and quartiles over the counted passes. `latency` is the LoRA paper's Table 1: one forward pass over BATCHxTOKENS, and
one more token after them with a key-value cache; the base is measured first and last, which shows the noise. PEFT runs
in one process only, with its factors in fp32 (its default, which also computes them in fp32) and in the base's dtype.
`generate`: tokens a second of greedy generation with a key-value cache, transformers' beside `lora-scale generate`'s.
Under ZeRO-3 nothing is merged: a rank has no whole weight. --way picks among the ways. A tree with uncommitted changes
is refused with --out.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from lora_scale.adapters.peft import Adapter
from lora_scale.adapters.targets import features, select_targets
from lora_scale.parallel import generation, load, serving, setup, world
from lora_scale.parallel import grid as grids
from lora_scale.parallel.generation import Sampling
from lora_scale.spec import configfile
from lora_scale.spec.config import LoraConfig, RunConfig
from lora_scale.storage import provenance
from lora_scale.storage.folder import ModelFolder, open_folder
from lora_scale.storage.prompts import Prompt

Times = dict[str, Any]
NEW = 64  # tokens that `generate` writes after each prompt
OURS, AGAIN = "ours, not merged", "base again"
PEFTS = {"PEFT, fp32 factors": False, "PEFT, factors as the base": True}  # whether factors have the base's dtype
WAYS = ("base", "merged", OURS, *PEFTS, AGAIN)


def adapters_of(folder: ModelFolder, cfg: RunConfig, lora: LoraConfig, count: int) -> dict[str, tuple[Path, Adapter]]:
    """As many adapters of the same targets, with random factors in bf16."""
    skeleton = load.empty(folder, cfg)
    sizes = {name: features(skeleton.get_submodule(name)) for name in select_targets(skeleton, lora)}
    draw = torch.Generator().manual_seed(0)
    found = {}
    for number in range(count):
        factors = {}
        for name, (n_in, n_out) in sizes.items():
            factors[f"{name}.lora_A"] = (torch.randn(lora.r, n_in, generator=draw) * 0.01).bfloat16()
            factors[f"{name}.lora_B"] = (torch.randn(n_out, lora.r, generator=draw) * 0.01).bfloat16()
        found[f"adapter-{number}"] = Path("-"), Adapter({"r": lora.r, "lora_alpha": 2 * lora.r}, factors)
    return found


def timed(work: Callable[[], object], passes: int, warm_up: int = 5) -> Times:
    """Milliseconds of a call until the device is idle."""
    times = []
    for number in range(warm_up + passes):
        _wait()
        began = time.perf_counter()
        work()
        _wait()
        if number >= warm_up:
            times.append(1e3 * (time.perf_counter() - began))
    low, _, high = statistics.quantiles(times, n=4)
    return {"median_ms": round(statistics.median(times), 4), "quartiles_ms": [round(low, 4), round(high, 4)]}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@torch.no_grad()
def switch(args: argparse.Namespace, cfg: RunConfig, grid: grids.Grid) -> dict[str, Any]:
    """Milliseconds and bytes of one switch, adapters on the device and on the host; and that it has switched."""
    folder = open_folder(args.model)
    adapters = adapters_of(folder, cfg, lora_of(args), args.adapters)
    rows = []
    for on_host in (False, True) if torch.cuda.is_available() else (False,):  # a CPU is the host
        served = serving.serve(cfg, folder, adapters, grid, on_host=on_host)
        ids = torch.arange(32, device=grid.world.device)[None]

        def logits(name: str | None, served: serving.Served = served, ids: Tensor = ids) -> Tensor:
            served.adapters.use(name)
            return served.model(input_ids=ids, use_cache=False).logits

        names, number, moved = list(adapters), 0, set()
        before = [logits(name) for name in (None, names[0], names[-1])]
        assert not torch.equal(before[0], before[1]) and not torch.equal(before[1], before[2]), "nothing is switched"

        def next_one(served: serving.Served = served, moved: set[int] = moved, names: list[str] = names) -> None:
            nonlocal number
            number += 1
            moved.add(served.adapters.use(names[number % len(names)]))

        times = timed(next_one, args.passes)
        again = [logits(name) for name in (None, names[0], names[-1])]
        assert all(torch.equal(a, b) for a, b in zip(before, again, strict=True)), "a switch has left something behind"
        (nbytes,) = moved
        adapter = served.adapters.nbytes(names[0])
        kept = "host" if on_host else "device"
        rows.append({"kept_on": kept, "copied_bytes": nbytes, "adapter_bytes": adapter, "passes": args.passes} | times)
    return {"adapters": args.adapters, "rows": rows}


@torch.no_grad()
def latency(args: argparse.Namespace, cfg: RunConfig, grid: grids.Grid) -> dict[str, Any]:
    """Rows of every way x setting."""
    folder, rows = open_folder(args.model), []
    for way, model in ways(args, cfg, grid, folder):
        for setting in args.setting or ["1x128", "16x256"]:
            batch, tokens = map(int, setting.split("x"))
            ids = torch.randint(model.config.vocab_size, (batch, tokens), device=grid.world.device)  # type: ignore[union-attr, operator, call-overload]
            cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
            row: dict[str, Any] = {"way": way, "batch": batch, "tokens": tokens, "passes": args.passes}
            row["forward"] = timed(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1), args.passes)  # noqa: B023

            def one_more() -> None:
                model(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True)  # noqa: B023
                cache.crop(-1)  # noqa: B023

            rows.append(row | {"next_token": timed(one_more, args.passes)})
            if grid.world.is_first:
                print(json.dumps(rows[-1]), flush=True)
    return {"rows": rows}


def generate(args: argparse.Namespace, cfg: RunConfig, grid: grids.Grid) -> dict[str, Any]:
    """New tokens a second, NEW a prompt, greedy: by ours and by transformers' own, on the model of each way."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    vocabulary = open_folder(args.model).config["vocab_size"]
    rows = []
    for way, model in ways(args, cfg, grid, open_folder(args.model)):
        for setting in args.setting or ["1x128", "16x256"]:
            batch, tokens = map(int, setting.split("x"))
            ids = torch.randint(vocabulary, (batch, tokens), generator=torch.Generator().manual_seed(0))
            prompts = [Prompt(number, "", tuple(row), None) for number, row in enumerate(ids.tolist(), 1)]
            made: list[int] = []

            def by_us() -> None:
                found = generation.generate(model, tokenizer, prompts, (), Sampling(NEW, batch), grid)  # noqa: B023
                made[:] = [len(one.ids) for one in found]  # noqa: B023

            def by_transformers() -> None:
                here = ids.to(grid.world.device)  # noqa: B023
                with torch.no_grad():
                    seen = torch.ones_like(here)
                    words = {"max_new_tokens": NEW, "do_sample": False, "use_cache": True}  # what is served says no
                    out = model.generate(input_ids=here, attention_mask=seen, **words)  # type: ignore[operator] # noqa: B023
                made[:] = [out.shape[1] - here.shape[1]] * len(out)  # noqa: B023

            sides = {"ours": by_us} if grid.world.size > 1 else {"ours": by_us, "transformers": by_transformers}
            for by, work in sides.items():
                took = timed(work, args.passes, warm_up=1)
                rate = round(1e3 * sum(made) / took["median_ms"], 1)
                rows.append({"way": way, "by": by, "batch": batch, "tokens": tokens, "new": sum(made)})
                rows[-1] |= {"passes": args.passes, "tokens_per_second": rate} | took
                if grid.world.is_first:
                    print(json.dumps(rows[-1]), flush=True)
    return {"rows": rows}


VERBS = {"switch": switch, "latency": latency, "generate": generate}


def ways(
    args: argparse.Namespace, cfg: RunConfig, grid: grids.Grid, folder: ModelFolder
) -> Iterator[tuple[str, nn.Module]]:
    """(name, model) of each way to run it; one model at a time is in memory."""
    adapters = adapters_of(folder, cfg, lora_of(args), 1)
    chosen = args.way or WAYS
    if "base" in chosen or "merged" in chosen:
        plain = serving.serve(cfg, folder, {}, grid).model
        if "base" in chosen:
            yield "base", plain
        if "merged" in chosen and not _is_partitioned(cfg, grid):
            merge(plain, adapters, cfg, grid, folder)
            yield "merged", plain
        del plain
    if OURS in chosen:
        served = serving.serve(cfg, folder, adapters, grid)
        served.adapters.use(next(iter(adapters)))
        yield OURS, served.model
        del served
    for label, as_base in PEFTS.items():
        if label in chosen and grid.world.size == 1:
            yield label, with_peft(args, cfg, grid, as_base)
    if AGAIN in chosen:
        yield AGAIN, serving.serve(cfg, folder, {}, grid).model


def _is_partitioned(cfg: RunConfig, grid: grids.Grid) -> bool:
    return cfg.parallel.zero_stage == 3 and grid.dp_size > 1


def table(record: dict[str, Any]) -> list[str]:
    """Markdown of several records of this script, by name: forward pass and next token of each way, and a switch."""
    lines = ["| record | way | batch x tokens | forward, ms (quartiles) | next token, ms (quartiles) |"]
    lines.append("|---|---|---|--:|--:|")
    for name, part in record["parts"].items():
        for row in (row for row in part["rows"] if "forward" in row):
            cells = [_spread(row[what]) for what in ("forward", "next_token")]
            lines.append(f"| {name} | {row['way']} | {row['batch']} x {row['tokens']} | {' | '.join(cells)} |")
    lines += ["", "| record | adapters | kept on | bytes of one | bytes copied | a switch, ms (quartiles) |"]
    lines.append("|---|--:|---|--:|--:|--:|")
    for name, part in record["parts"].items():
        for row in (row for row in part["rows"] if "kept_on" in row):
            sizes = f"{row['adapter_bytes']:,} | {row['copied_bytes']:,}"
            lines.append(f"| {name} | {part['adapters']} | {row['kept_on']} | {sizes} | {_spread(row)} |")
    made = [(name, row) for name, part in record["parts"].items() for row in part["rows"] if "tokens_per_second" in row]
    if made:
        lines += ["", "| record | way | by | batch x tokens | new tokens/s | ms (quartiles) |"]
        lines.append("|---|---|---|---|--:|--:|")
    for name, row in made:
        setting = f"{row['batch']} x {row['tokens']}"
        rate = f"{row['tokens_per_second']:,.0f}"
        lines.append(f"| {name} | {row['way']} | {row['by']} | {setting} | {rate} | {_spread(row)} |")
    return lines


def _spread(times: Times) -> str:
    low, high = times["quartiles_ms"]
    return f"{times['median_ms']:.2f} ({low:.2f}-{high:.2f})"


def merge(
    model: nn.Module,
    adapters: dict[str, tuple[Path, Adapter]],
    cfg: RunConfig,
    grid: grids.Grid,
    folder: ModelFolder,
) -> None:
    """Add the first adapter to this rank's part of the weights, as `lora-scale merge` does to files."""
    _, adapter = next(iter(adapters.values()))
    cuts, _ = setup.cut(cfg, load.empty(folder, cfg), folder, grid)
    for name in adapter.modules:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        a, b = (adapter.factors[f"{name}.{key}"].to(weight.device).float() for key in ("lora_A", "lora_B"))
        delta = b @ a * adapter.scaling(name)
        split = cuts.get(f"{name}.weight")
        if split is not None:
            delta = serving.tensor_parallel.cut(delta, split, grid.tp_rank, grid.tp_size)
        weight.data.copy_((weight.data.float() + delta).to(weight.dtype))


def with_peft(args: argparse.Namespace, cfg: RunConfig, grid: grids.Grid, as_base: bool) -> nn.Module:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=load.dtype_of(cfg)).to(grid.world.device)
    modules = [f"{role}_proj" for role in args.targets.split(",")]
    peft = PeftConfig(r=args.r, lora_alpha=2 * args.r, target_modules=modules, init_lora_weights=False)
    return get_peft_model(model, peft, autocast_adapter_dtype=not as_base).eval()


def lora_of(args: argparse.Namespace) -> LoraConfig:
    return LoraConfig(r=args.r, lora_alpha=2.0 * args.r, target_modules=tuple(args.targets.split(",")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(VERBS))
    parser.add_argument("--model", type=Path, required=True, help="a model folder")
    parser.add_argument("--adapters", type=int, default=100, help="resident ones, for switch")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--targets", default="q,v", help="roles with commas")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks; start as many")
    parser.add_argument("--zero-stage", type=int, choices=(0, 3), default=0, help="3: the base over all ranks")
    parser.add_argument("--way", action="append", choices=WAYS, help="this one only; may be repeated. Default: all")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--setting", action="append", help="BATCHxTOKENS; may be repeated. Default: 1x128 and 16x256")
    parser.add_argument("--passes", type=int, default=100)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    commit = provenance.commit_of_record("bench_serving", refuse=args.out is not None)
    words = [f"precision={args.precision}", f"parallel.tensor_parallel_size={args.tp}"]
    words.append(f"parallel.zero_stage={args.zero_stage}")
    cfg = configfile.of_model(str(args.model), words)
    here = world.start(world.from_environment(), timeout_minutes=10)
    grid = grids.make(cfg.parallel, here)
    found = VERBS[args.what](args, cfg, grid)
    what = f"{args.what}: {VERBS[args.what].__doc__}"
    record = provenance.head(what, sys.argv[0], commit, world.hardware(here)) | {
        "weights_bytes": open_folder(args.model).nbytes,
        "adapter": {"r": args.r, "targets": args.targets},
        "ranks": here.size,
        **found,
    }
    if here.is_first:
        print(json.dumps(record, indent=1))
        if args.out:
            args.out.write_text(json.dumps(record, indent=1) + "\n")
    world.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
