"""Variants of LoRA on two ranks are PEFT's in one process: losses, gradients, what a checkpoint of them holds."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from ranks import run_ranks
from tiny import tiny_folder
from tiny_models import tiny_model
from torch import Tensor, nn
from training import Trace, _our_name, _reference_steps, assert_equal, config, random_factors, write_rows
from transformers import AutoModelForCausalLM
from variant_cases import Run

from lora_scale import cli
from lora_scale.adapters import trained
from lora_scale.adapters.frozen import freeze_linears
from lora_scale.adapters.lora import adapt
from lora_scale.parallel import overlap
from lora_scale.spec.config import LoraConfig as OurConfig
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.families import roles
from lora_scale.spec.schedule import learning_rate
from lora_scale.storage import prepared
from lora_scale.storage.folder import open_folder
from lora_scale.storage.steps import StepPlan

STEPS = 4


def peft_steps(cfg: RunConfig, ratio: float) -> dict[str, Tensor]:
    """The factors after the run's steps by PEFT, its own optimizer for LoRA+, and transformers."""
    model = AutoModelForCausalLM.from_pretrained(cfg.model.path, dtype=torch.float32)
    targets = [f"{role}_proj" for role in cfg.lora.target_modules]
    model = get_peft_model(model, LoraConfig(r=cfg.lora.r, lora_alpha=cfg.lora.lora_alpha, target_modules=targets))
    named = {_our_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    for name, value in random_factors({name: tuple(p.shape) for name, p in named.items()}).items():
        named[name].data.copy_(value)
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=ratio, loraplus_weight_decay=cfg.train.weight_decay
    )
    ratios = [group["lr"] for group in optimizer.param_groups]
    folder = open_folder(cfg.model.path)
    blocks, _ = prepared.blocks_of_run(cfg, folder.path, folder.config["vocab_size"])
    plan = StepPlan(blocks, cfg.train.global_batch_size, 1, 0, 1, cfg.seed, None, STEPS)
    for number in range(STEPS):
        step = plan.step(number)
        for batch in step.micro_batches:  # one document a block, padded at its end, which a causal model does not see
            logits = model(input_ids=torch.from_numpy(batch.input_ids), use_cache=False).logits
            loss = F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(batch.labels).flatten(), reduction="sum")
            (loss / step.target_tokens).backward()
        torch.nn.utils.clip_grad_norm_(named.values(), cfg.train.max_grad_norm)
        for group, own in zip(optimizer.param_groups, ratios, strict=True):
            group["lr"] = learning_rate(number, STEPS, cfg.train) * own
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in named.items()}


@pytest.mark.ranks
def test_lora_plus(tmp_path: Path) -> None:
    model, rows = tiny_folder(tmp_path / "model"), write_rows(tmp_path / "rows.jsonl")
    changes: dict[str, Any] = {"train__max_steps": STEPS, "train__weight_decay": 0.1, "data__packing": False}
    trees = {
        f"stage {stage}": config(
            model, rows, tmp_path / "run", train__loraplus_lr_ratio=8.0, parallel__zero_stage=stage, **changes
        )
        for stage in (3, 0)
    }
    cfg = RunConfig.model_validate(trees["stage 3"])
    theirs, plain = peft_steps(cfg, 8.0), peft_steps(cfg, 1.0)
    for name, trace in run_ranks(2, "training:run_cases", trees, folder=tmp_path / "ranks")[0].items():
        assert trace.values.keys() == theirs.keys()
        for factor, wanted in theirs.items():
            error = (trace.values[factor] - wanted).norm() / wanted.norm()
            assert error <= 1e-5, f"{name}: {factor} is off by {error:.1e}"  # fp32 sums in another order
    moved = max((theirs[f] - plain[f]).norm() / plain[f].norm() for f in theirs if f.endswith("lora_B"))
    assert moved > 1e-2, "the ratio changes nothing: the comparison would be empty"


IDS = torch.arange(2 * 9).view(2, 9) * 7 % 61
SAVED = 2  # steps before the checkpoint
LAYOUTS: dict[str, dict[str, Any]] = {
    **{f"ZeRO-{stage}": {"parallel__zero_stage": stage} for stage in (3, 2, 1, 0)},
    **{
        f"tensor parallel{and_stage}": {"parallel__tensor_parallel_size": 2, "parallel__zero_stage": stage}
        for stage, and_stage in ((3, ""), (1, ", ZeRO-1"), (0, ", ZeRO-0"))
    },
    "ZeRO-3 of all": {"parallel__base_engine": "deepspeed", "parallel__adapter_sharding": "zero"},
    "sequence parallel": {"parallel__tensor_parallel_size": 2, "parallel__sequence_parallel": True},
}
ALONE = [name for name in LAYOUTS if name.startswith("ZeRO")]


def tree_of(model: Path, rows: Path, run: Path, **changes: Any) -> dict[str, Any]:
    fixed: dict[str, Any] = {"train__max_steps": STEPS, "train__warmup_steps": 0, "data__packing": False}
    return config(model, rows, run, **fixed, **changes)


def with_peft(cfg: RunConfig, values: dict[str, Tensor], **more: Any) -> tuple[nn.Module, Trace]:
    """The run by PEFT with a LoraConfig of `more`, begun at `values`; the trained model, and the trace."""
    model = AutoModelForCausalLM.from_pretrained(cfg.model.path, dtype=torch.float32)
    suffixes = roles(model.config.model_type)
    targets = sorted({end for role in cfg.lora.target_modules for end in suffixes[role]})
    conv = model.config.model_type == "gpt2"
    told = {"r": cfg.lora.r, "lora_alpha": cfg.lora.lora_alpha, **more}
    lora = LoraConfig(target_modules=targets, fan_in_fan_out=conv, **told)
    model = get_peft_model(model, lora)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    named = {our_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    assert named.keys() == values.keys()
    with torch.no_grad():
        for name, p in named.items():
            if cfg.lora.pissa is not None and name.endswith("lora_A"):  # a pair of vectors may have either sign
                rows = zip(p, values[name], strict=True)
                assert all(min((a - b).norm(), (a + b).norm()) <= 1e-4 * a.norm() for a, b in rows), name
            p.copy_(values[name])
    return model, _reference_steps(model.train(), cfg, named, STEPS, None)


def our_name(peft_name: str) -> str:
    name = _our_name(peft_name).replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")
    name = name.replace(".lora_magnitude_vector.default.weight", ".lora_magnitude_vector")
    return name.replace(".trainable_tokens_delta.default", ".trainable_tokens_delta")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


Group = tuple[dict[str, dict[str, Any]], dict[str, Any]]
"""The same run on several layouts by their names, and what PEFT's LoraConfig is told for it."""


def check(ranks: int, groups: dict[str, Group], place: Path) -> dict[tuple[str, str], Run]:
    """In one launch: each run as on the group's other layouts and as PEFT; gone on with from its checkpoint to the same
    bits, and from another layout's; a run that starts from its last checkpoint has its values; and that checkpoint,
    loaded by PEFT on the untouched base, gives the logits of PEFT's trained model. The runs, by (group, layout)."""
    trees = {(group, name): tree for group, (found, _) in groups.items() for name, tree in found.items()}
    # tensor parallel runs last: a process in which DeepSpeed has once seen an mpu takes no engine without one
    trees = dict(sorted(trees.items(), key=lambda item: item[1].get("parallel", {}).get("tensor_parallel_size", 1)))
    runs = run_ranks(
        ranks, "variant_cases:begin_save_go_on", trees, SAVED, folder=place / "ranks", timeout=600 + 30 * len(trees)
    )[0]
    for group, (found, more) in groups.items():
        check_group(group, found, more, {name: runs[group, name] for name in found}, place)
    return runs


def check_group(
    group: str, trees: dict[str, dict[str, Any]], more: dict[str, Any], runs: dict[str, Run], place: Path
) -> None:
    first = next(iter(runs.values()))
    cfg = RunConfig.model_validate(next(iter(trees.values())))
    theirs, trace = with_peft(cfg, first.begun, **more)
    wanted, untrained = logits(theirs), logits(plain(cfg))
    assert (wanted - untrained).abs().max() > 1e-2 * untrained.abs().max(), f"{group}: training changes nothing"
    tolerance = 1e-5 * wanted.abs().max()
    for name, run in runs.items():
        where = f"{group}, {name}"
        assert all(torch.equal(run.begun[key], value) for key, value in first.begun.items()), (
            f"{where} begins elsewhere"
        )
        assert_equal(run.trace, trace)
        assert all(torch.equal(run.resumed[key], value) for key, value in run.trace.values.items()), where
        if run.again is not None:
            assert all(torch.equal(run.again[key], value) for key, value in run.trace.values.items()), where
        assert run.moved is None or same_rest(run.moved, trace), f"{where}, from another layout's checkpoint"
        assert (logits(PeftModel.from_pretrained(plain(cfg), str(run.final))) - wanted).abs().max() <= tolerance, where
    out = place / f"exported {group}"
    with pytest.raises(SystemExit) as end:
        cli.main(["export", str(first.final), "--out", str(out), "--base", cfg.model.path, "--verify"])
    assert not end.value.code
    assert (logits(PeftModel.from_pretrained(plain(cfg), str(out))) - wanted).abs().max() <= tolerance, group


def same_rest(moved: Trace, whole: Trace) -> bool:
    """Losses to 1e-5 and norms to 5e-5, as `assert_equal` takes them; without the moments they differ by far more."""
    pairs = [*zip(moved.losses, whole.losses[SAVED:], strict=True)]
    norms = [*zip(moved.norms, whole.norms[SAVED:], strict=True)]
    return all(abs(a - b) <= 1e-5 * b for a, b in pairs) and all(abs(a - b) <= 5e-5 * b for a, b in norms)


def plain(cfg: RunConfig) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(cfg.model.path, dtype=torch.float32)


def pissa(place: Path, how: str | int, layouts: Sequence[str]) -> Group:
    model, rows = tiny_folder(place / "model", dtype=torch.float32), write_rows(place / "rows.jsonl")
    trees = {name: tree_of(model, rows, place / f"{name} {how}", lora__pissa=how, **LAYOUTS[name]) for name in layouts}
    return trees, {"init_lora_weights": "pissa"}


NEW = [90, 5, 96, 40]  # one is the padding token, one is in no row: the output layer alone gives it a gradient
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    "all biases and the head": ("gpt2", {"bias": "all", "modules_to_save": ["lm_head"]}),
    "biases of adapted layers": ("qwen2", {"bias": "lora_only"}),
    "DoRA": ("llama", {"use_dora": True}),
    "DoRA with biases": ("gpt2", {"use_dora": True, "bias": "lora_only"}),
    "head and embeddings": ("llama", {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "embeddings of places": ("gpt2", {"modules_to_save": ["wpe", "wte"], "r": 16}),
    "layers of blocks": ("qwen2", {"modules_to_save": ["gate_proj", "down_proj"]}),
    "new tokens": ("llama", {"trainable_token_indices": NEW, "use_dora": True}),
    "new tokens at both ends": ("gemma3_text", {"trainable_token_indices": NEW}),
}
TIED = ("new tokens at both ends",)


def parts(place: Path, case: str, layouts: Sequence[str]) -> Group:
    """The vocabulary is cut into unequal pieces, and the padding token is not of the first."""
    kind, changes = PARTS[case]
    changed = {"tie_word_embeddings": case in TIED, "vocab_size": 97, "pad_token_id": 90}
    model = tiny_folder(place / "model", kind, torch.float32, **changed)
    rows, ours = write_rows(place / "rows.jsonl"), {f"lora__{key}": value for key, value in changes.items()}
    return {name: tree_of(model, rows, place / name, **LAYOUTS[name], **ours) for name in layouts}, changes


@pytest.mark.ranks
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
def test_variants_are_pefts(tmp_path: Path) -> None:
    biases, modules = "all biases and the head", "head and embeddings"
    groups = {
        "pissa": pissa(tmp_path / "pissa", "full", ["ZeRO-3", "tensor parallel"]),
        biases: parts(tmp_path / "biases", biases, ["ZeRO-3", "sequence parallel"]),
        modules: parts(tmp_path / "modules", modules, ["tensor parallel"]),
        "new tokens": parts(tmp_path / "tokens", "new tokens", ["ZeRO-3 of all", "tensor parallel"]),
        "new tokens at both ends": parts(tmp_path / "ends", "new tokens at both ends", ["sequence parallel"]),
    }
    check(2, groups, tmp_path)


@pytest.mark.long
@pytest.mark.ranks
@pytest.mark.timeout(3000)
@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_variant_on_every_layout(ranks: int, tmp_path: Path) -> None:
    """PiSSA by iterations: a thousand find the exact components of so small weights. Four ranks share two copies."""
    layouts = {1: ALONE, 2: list(LAYOUTS), 4: [name for name in LAYOUTS if name not in ALONE]}[ranks]
    groups = {f"pissa {how}": pissa(tmp_path / f"pissa {how}", how, layouts[::3]) for how in ("full", 1000)}
    groups |= {case: parts(tmp_path / case, case, layouts) for case in PARTS}
    runs = check(ranks, groups, tmp_path)
    if ranks == 2:  # what tensor parallelism saved, in one process
        back = {case: (groups[case][0]["ZeRO-3"], runs[case, "sequence parallel"].middle) for case in PARTS}
        found = run_ranks(1, "variant_cases:all_go_on", back, SAVED, folder=tmp_path / "alone")[0]
        assert all(same_rest(trace, runs[case, "ZeRO-3"].trace) for case, trace in found.items())


def test_only_what_makes_its_input_again_reads_it_from_memory_that_is_overwritten() -> None:
    def block(**changes: Any) -> nn.Module:
        lora = OurConfig(r=2, target_modules=("q_proj",), **changes)
        model = nn.ModuleDict({f"{name}_proj": nn.Linear(6, 6) for name in "qkv"})
        adapt(model, lora, seed=0)
        freeze_linears(model)
        return model

    assert overlap.reads_in_parts(block())
    assert not overlap.reads_in_parts(block(use_dora=True))
    principal = block()
    principal["q_proj"].begin_at(torch.ones(2, 6), torch.ones(6, 2), keep_whole=False)
    assert not overlap.reads_in_parts(principal)


@pytest.mark.parametrize(
    ("tied", "changes", "message"),
    [
        (False, {"modules_to_save": ("lm_haed",)}, "matches no module; did you mean lm_head?"),
        (
            True,
            {"modules_to_save": ("lm_head",)},
            "names lm_head, which shares its weight with model.embed_tokens; leave",
        ),
        (False, {"modules_to_save": ("q_proj",)}, "q_proj, which lora.target_modules adapts; leave one out"),
        (
            False,
            {"modules_to_save": ("input_layernorm",)},
            "is a LlamaRMSNorm, which cannot train here; Linear, Embeddi",
        ),
        (False, {"bias": "all"}, "lora.bias is all, but no layer of this model has a bias; set lora.bias=none"),
        (False, {"trainable_token_indices": (5, 64)}, "has 64, but the embedding has rows 0 to 63; give the base rows"),
        (
            False,
            {"trainable_token_indices": (5,), "modules_to_save": ("embed_tokens",)},
            "names model.embed_tokens, of which lora.trainable_token_indices has rows; leave one out",
        ),
    ],
)
def test_what_cannot_train_is_named(tied: bool, changes: dict[str, Any], message: str) -> None:
    model = tiny_model("llama", device="meta", tie_word_embeddings=tied)
    lora = OurConfig(r=2, **changes)
    with pytest.raises(ConfigError, match=re.escape(message)):
        trained.mark(model, lora, adapt(model, lora, seed=0))


def test_a_token_named_twice() -> None:
    tree = config(Path("model"), Path("rows"), Path("run"), lora__trainable_token_indices=[5, 7, 5])
    with pytest.raises(ValueError, match="trainable_token_indices has 5 more than once; leave the others out"):
        RunConfig.model_validate(tree)
