"""What the tests of generation run on ranks, and the same by transformers + PEFT in one process."""

from pathlib import Path
from typing import Any

import torch
from training import start, train

from lora_scale.adapters import peft
from lora_scale.parallel import checkpoint, generation, serving
from lora_scale.parallel import grid as grids
from lora_scale.parallel.generation import Sampling
from lora_scale.parallel.world import World
from lora_scale.spec import configfile
from lora_scale.storage import encoder, prompts
from lora_scale.storage.folder import open_folder

GENERATED = 2  # steps before rows are continued


def on_ranks(here: World, cases: dict[str, dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, ...]]]]:
    """Token ids of every prompt, by case and adapter; "base" is none, and comes first, last and between."""
    found = {}
    for name, case in cases.items():
        print(name, flush=True)
        cfg = configfile.of_model(case["model"], case["overrides"])
        folder = open_folder(case["model"])
        adapters = {name: (Path(path), peft.read_adapter(Path(path))) for name, path in case["adapters"].items()}
        grid = grids.make(cfg.parallel, here)
        served = serving.serve(cfg, folder, adapters, grid, on_host=case.get("on_host", False))
        tokenizer = encoder.tokenizer(folder.path)
        rows = prompts.read(Path(case["rows"]), tokenizer, None)
        sampling = Sampling(**case["sampling"])
        found[name] = {}
        for adapter in ("base", *adapters, "base again"):
            served.adapters.use(adapter if adapter in adapters else None)
            done = generation.generate(served.model, tokenizer, rows, case["ends"], sampling, grid)
            found[name][adapter] = [one.ids for one in done]
    return found


def reference(model: str, adapters: dict[str, str], rows: str, new_tokens: int) -> dict[str, list[tuple[int, ...]]]:
    """Greedy tokens by transformers and PEFT, fp32, one process, one prompt at a time, whatever they are."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokenizer, found = encoder.tokenizer(Path(model)), {}
    for name, path in {"base": None, **adapters, "base again": None}.items():
        theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        theirs.generation_config.eos_token_id = None
        theirs = (theirs if path is None else PeftModel.from_pretrained(theirs, path)).eval()
        found[name] = []
        for row in prompts.read(Path(rows), tokenizer, None):
            ids = torch.tensor([row.ids])
            mask = torch.ones_like(ids)
            out = theirs.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
            found[name].append(tuple(out[0, ids.shape[1] :].tolist()))
    return found


def both(here: World, cases: dict[Any, Any], trees: dict[Any, Any]) -> tuple[Any, Any]:
    return on_ranks(here, cases), while_training(here, trees)


def while_training(here: World, trees: dict[Any, dict[str, Any]]) -> dict[Any, tuple[list[float], Any, str]]:
    """Losses of every run, and, where rows are continued after GENERATED steps, the row and a checkpoint of then."""
    found, step = {}, GENERATED
    for name, tree in trees.items():
        print(name, flush=True)
        job = start(here, tree)
        first = train(job, 0, step)
        row, path = None, ""
        if job.samples:
            row, folder = job.evaluate(step), Path(tree["run_dir"])
            saved = checkpoint.save(job.engine, job.state(step, 0), folder, job.write_adapter_config, job.key)
            path = str(saved)
        rest = train(job, step, job.data.plan.total_steps - step)
        found[name] = first.losses + rest.losses, row, path
        job.engine.ds.destroy()
    return found
