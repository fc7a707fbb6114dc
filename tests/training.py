"""What training tests share: a tiny run through the product's own set-up, and the same run by Hugging Face + PEFT in
one process.

The reference takes every document by itself, so that equality also says that packed documents do not see each other.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_scale.adapters.dropout import DropoutContext
from lora_scale.adapters.lora import adapt, file_name
from lora_scale.parallel import checkpoint, masters, setup
from lora_scale.parallel import data as run_data
from lora_scale.parallel import grid as grids
from lora_scale.parallel.world import World
from lora_scale.spec.config import RunConfig
from lora_scale.spec.families import roles
from lora_scale.spec.schedule import learning_rate
from lora_scale.storage import prepared
from lora_scale.storage.console import Console
from lora_scale.storage.folder import open_folder
from lora_scale.storage.steps import StepPlan

STEPS = 8  # warm-up, clipping, decay, several epochs: a state that goes wrong does so in the first of them


def write_rows(path: Path, count: int = 60, seed: int = 0, vocab: int = 96, longest: int = 20) -> Path:
    """Random ready-made token rows, each with a few untrained tokens at its start."""
    draw = torch.Generator().manual_seed(seed)
    with path.open("w") as file:
        for _ in range(count):
            length = int(torch.randint(4, longest, (), generator=draw))
            ids = torch.randint(3, vocab, (length,), generator=draw).tolist()
            file.write(json.dumps({"input_ids": ids, "labels": [-100, -100, *ids[2:]]}) + "\n")
    return path


def config(model: Path, rows: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """A tiny run as a nested dict; `changes` are dotted keys with __ for the dots."""
    tree: dict[str, Any] = {
        "model": {"path": str(model)},
        "data": {"train": str(rows), "seq_len": 48},
        "run_dir": str(run_dir),
        "precision": "fp32",
        "recompute": "none",
        "seed": 3,
        "lora": {"r": 4, "lora_alpha": 8.0, "target_modules": ["q", "k", "v", "o"]},
        "train": {"max_steps": STEPS, "global_batch_size": 6, "lr": 3e-3, "warmup_steps": 2, "max_grad_norm": 0.05},
    }
    for dotted, value in changes.items():
        node = tree
        *parents, leaf = dotted.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


@dataclass
class Trace:
    """Losses and norms of each step, and the first step's gradients (clipped), by parameter name."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    values: dict[str, Tensor]  # after the last step


def random_factors(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """A and B both non-zero: with B = 0 every gradient of A is exactly zero, and half the factors would go untested."""
    draw = torch.Generator().manual_seed(11)
    return {name: torch.randn(shape, generator=draw) * 0.2 for name, shape in shapes.items()}


def start(here: World, tree: dict[str, Any], *, randomise: bool = True, resume: Path | None = None) -> setup.Job:
    """The product's own set-up of a run; then, but for full fine-tuning and for adapters that do not start anew,
    everything that trains drawn non-zero. Or the run goes on from a checkpoint."""
    cfg = RunConfig.model_validate(tree)
    screen = Console(rank=1)  # silent
    folder, identity = setup.open_base(cfg, screen)
    grid = _grid(cfg.parallel, here)
    data = run_data.read_data(cfg, folder, grid)
    begin = setup.find_init_adapter(cfg, folder, identity) if resume is None else None
    model, dropout, _ = setup.build_model(cfg, folder, begin, resume)
    job = setup.start_engine(cfg, model, dropout, folder, identity, data, grid, screen, begin)
    if resume is not None:
        checkpoint.restore(job.engine, resume, checkpoint.read_state(resume), job.key)
    elif randomise and cfg.method != "full" and cfg.init_adapter is None:
        parts = job.engine.parts()
        values = random_factors({p.name: p.whole_shape for p in parts})
        zeros = {name: torch.zeros_like(value) for name, value in values.items()}
        masters.restore(job.engine.ds, parts, {masters.VALUE: values, **dict.fromkeys(masters.MOMENTS, zeros)}, step=0)
    return job


# Made once for all cases of a launch: each group of gloo has threads that wake a hundred times a second, and after some
# cases there would be nothing but them.
_grid = cache(grids.make)


def train(job: setup.Job, first: int = 0, steps: int | None = None, begins: bool = True) -> Trace:
    """Steps through the engine, each begun before the last is waited for, as `lora-scale train` does it, or not;
    gradients are read off Adam's first moment after the first step: 0.1 g (beta_1 = 0.9)."""
    trace = Trace([], [], {}, {})
    total = job.data.plan.total_steps
    last = first + (total if steps is None else steps) - 1
    for number in range(first, last + 1):
        finish = job.engine.start_step(job.data.plan.step(number), number, learning_rate(number, total, job.cfg.train))
        if begins and first < number < last:
            job.engine.begin(job.data.plan.step(number + 1), number + 1)
        result = finish()
        trace.losses.append(result.loss)
        trace.norms.append(result.grad_norm)
        if number == 0:
            trace.gradients = {name: t * 10 for name, t in everything(job, "exp_avg").items()}
    trace.values = everything(job, masters.VALUE)
    return trace


def everything(job: setup.Job, what: str) -> dict[str, Tensor]:
    """All trainable tensors on rank 0; an empty dict on the others. Collective."""
    found = {name: t for name, t in masters.gather(job.engine.ds, job.engine.parts(), what) if t is not None}
    return {name.replace(".base_layer.", "."): t.clone() for name, t in found.items()}


def run_cases(here: World, cases: dict[str, dict[str, Any]]) -> dict[str, Trace]:
    """Many runs inside one launch of ranks."""
    traces = {}
    for name, tree in cases.items():
        print(name, flush=True)  # into the rank's log
        job = start(here, tree)
        traces[name] = train(job)
        job.engine.ds.destroy()
    return traces


def begun_or_not(here: World, cases: dict[str, dict[str, Any]]) -> dict[str, tuple[bool, int]]:
    """Whether runs are the same to the bit when steps are begun early, and how often the device was waited for."""
    from deepspeed.accelerator import get_accelerator

    found, waits, accelerator = {}, [], get_accelerator()
    accelerator.synchronize = lambda *_: waits.append(1)  # type: ignore[method-assign]
    for name, tree in cases.items():
        traces = []
        for begins in (True, False):
            job = start(here, tree)
            waits.clear()
            traces.append(train(job, begins=begins))
            waited = len(waits)
            job.engine.ds.destroy()
        one, other = traces
        same = one.losses == other.losses and one.norms == other.norms
        found[name] = same and all(torch.equal(one.values[key], other.values[key]) for key in other.values), waited
    return found


def reference(tree: dict[str, Any], steps: int = 0, dtype: torch.dtype = torch.float32) -> Trace:
    """The same run, or its first steps, by transformers + PEFT + torch's own AdamW and clipping: one process, one
    document at a time. `dtype` is the base's; factors are fp32."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    cfg = RunConfig.model_validate(tree)
    chosen = cfg.model.attention
    attention = "sdpa" if chosen in ("auto", "documents") else chosen  # each document is taken by itself
    model = AutoModelForCausalLM.from_pretrained(cfg.model.path, dtype=dtype, attn_implementation=attention)
    name_of: Callable[[str], str] = str
    context: DropoutContext | None = None
    if cfg.lora.dropout:  # PEFT's own masks are random: our layers on the plain model stand in for its
        context = DropoutContext(cfg.seed)
        adapt(model, cfg.lora, cfg.seed, context)
        name_of = file_name
    elif cfg.method == "lora":
        suffixes = roles(model.config.model_type)
        targets = sorted({end for role in cfg.lora.target_modules for end in suffixes.get(role, (role,))})
        conv = model.config.model_type == "gpt2"
        peft = LoraConfig(r=cfg.lora.r, lora_alpha=cfg.lora.lora_alpha, target_modules=targets, fan_in_fan_out=conv)
        model = get_peft_model(model, peft)
        name_of = _our_name
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    named = {name_of(name): p for name, p in model.named_parameters() if p.requires_grad}
    if cfg.method == "lora":
        for name, value in random_factors({name: tuple(p.shape) for name, p in named.items()}).items():
            named[name].data.copy_(value)
    return _reference_steps(model.train(), cfg, named, steps or cfg.train.max_steps or STEPS, context)


def _reference_steps(
    model: nn.Module, cfg: RunConfig, named: dict[str, nn.Parameter], steps: int, context: DropoutContext | None
) -> Trace:
    folder = open_folder(cfg.model.path)
    blocks, _ = prepared.blocks_of_run(cfg, folder.path, folder.config.get("vocab_size"))
    plan = StepPlan(blocks, cfg.train.global_batch_size, 1, 0, 1, cfg.seed, cfg.train.epochs, cfg.train.max_steps)
    optimizer = torch.optim.AdamW(named.values(), lr=cfg.train.lr, weight_decay=0.0)
    trace = Trace([], [], {}, {})
    for number in range(steps):
        step = plan.step(number)
        total = torch.zeros(())
        for batch in step.micro_batches:
            for block in range(len(batch.input_ids)):
                total = total + _documents_loss(model, batch, block, step.target_tokens, context, number)
        norm = nn.utils.clip_grad_norm_(named.values(), cfg.train.max_grad_norm)
        trace.losses.append(total.item())
        trace.norms.append(float(norm))
        if number == 0:
            trace.gradients = {name: p.grad.clone() for name, p in named.items() if p.grad is not None}
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, plan.total_steps, cfg.train)
        optimizer.step()
        optimizer.zero_grad()
    trace.values = {name: p.detach().clone() for name, p in named.items()}
    return trace


def _documents_loss(
    model: nn.Module, batch: Any, block: int, targets: int, context: DropoutContext | None, number: int
) -> Tensor:
    """The block's documents one after the other, each alone in the model; backward done, the summed loss / targets
    returned."""
    loss = torch.zeros(())
    ids, labels, owner = (torch.from_numpy(a[block]) for a in (batch.input_ids, batch.labels, batch.sample_ids))
    for document in owner.unique():
        here = owner == document
        if document < 0 or not (labels[here] != -100).any():
            continue
        if context is not None:
            context.set(number, owner[here][None], torch.from_numpy(batch.position_ids[block])[here][None])
        logits = model(input_ids=ids[here][None], use_cache=False).logits[0]
        part = F.cross_entropy(logits.float(), labels[here], ignore_index=-100, reduction="sum") / targets
        part.backward()
        loss = loss + part.detach()
    return loss


def _our_name(peft_name: str) -> str:
    return (
        peft_name.removeprefix("base_model.model.")
        .replace(".lora_A.default.weight", ".lora_A")
        .replace(".lora_B.default.weight", ".lora_B")
    )


def assert_equal(ours: Trace, theirs: Trace, tolerance: float = 1e-5) -> None:
    """Losses and norms relative, gradients per tensor ||g - g_ref|| <= tolerance ||g_ref||; no reference gradient is
    zero.

    The tolerance: fp32 sums in another order (ranks, blocks) differ by some 1e-7 a step, which AdamW's division can
    enlarge.
    """
    assert ours.gradients.keys() == theirs.gradients.keys()
    for name, wanted in theirs.gradients.items():
        assert wanted.norm() > 0, f"{name}: the reference gradient is zero, so the test would prove nothing"
        error = (ours.gradients[name] - wanted).norm() / wanted.norm()
        assert error <= tolerance, f"gradient of {name} is off by {error:.2e}"
    torch.testing.assert_close(torch.tensor(ours.losses), torch.tensor(theirs.losses), rtol=tolerance, atol=0)
    torch.testing.assert_close(torch.tensor(ours.norms), torch.tensor(theirs.norms), rtol=5 * tolerance, atol=0)


def deviations(ours: Trace, theirs: Trace) -> dict[str, float]:
    """The largest relative errors of losses, norms and gradients, what `assert_equal` asserts about; a gradient that is
    missing or whose reference is zero counts as infinitely wrong."""
    wrong = float("inf")
    pairs = [(ours.gradients.get(name), wanted) for name, wanted in theirs.gradients.items()]
    gradients = [wrong if g is None or not w.norm() else float((g - w).norm() / w.norm()) for g, w in pairs]

    def relative(found: list[float], wanted: list[float]) -> float:
        if len(found) != len(wanted):
            return wrong
        return max(abs(a - b) / abs(b) if a == a else wrong for a, b in zip(found, wanted, strict=True))

    extra = ours.gradients.keys() != theirs.gradients.keys()
    return {
        "losses": relative(ours.losses, theirs.losses),
        "norms": relative(ours.norms, theirs.norms),
        "gradients": wrong if extra else max(gradients),
    }
