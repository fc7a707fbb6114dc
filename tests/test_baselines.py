"""The methods of the paper's Tables 4 and 15: against independent references, across a stop, and counted."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from tiny import tiny_folder
from tiny_models import tiny_config
from torch import Tensor, nn
from training import Trace, _reference_steps, assert_equal, config, random_factors, start, train, write_rows
from transformers import AutoModelForCausalLM

from lora_scale.parallel import checkpoint, setup
from lora_scale.parallel.world import World
from lora_scale.spec import baselines, cost, states
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.named import shape
from lora_scale.spec.shapes import architecture
from lora_scale.storage.folder import open_folder

STEPS, PREFIX, WIDTH = 3, 3, 5
# name: (base, what differs); stages and recompute are spread over the methods so that one launch sees them all
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bitfit": ("llama", {"method": "bitfit"}),
    "bitfit, gpt2": ("gpt2", {"method": "bitfit", "parallel__zero_stage": 2}),
    "preembed": ("llama", {"method": "preembed"}),
    "prelayer": ("llama", {"method": "prelayer", "recompute": "all"}),
    "prelayer, gpt2": ("gpt2", {"method": "prelayer", "parallel__zero_stage": 0}),
    "adapter-h": ("llama", {"method": "adapter-h", "recompute": "all"}),
    "adapter-h, gpt2": ("gpt2", {"method": "adapter-h", "parallel__zero_stage": 1}),
    "adapter-l": ("llama", {"method": "adapter-l"}),
    "lora+preembed": ("llama", {"method": "lora+preembed"}),
    "lora+preembed, gpt2": ("gpt2", {"method": "lora+preembed", "parallel__zero_stage": 1}),
    "lora+prelayer": ("llama", {"method": "lora+prelayer", "recompute": "all"}),
    "lora+prelayer, deepspeed": ("llama", {"method": "lora+prelayer", "parallel__base_engine": "deepspeed"}),
}
RESUMED = list(baselines.METHODS)


def trees(folder: Path, **common: Any) -> dict[str, dict[str, Any]]:
    rows = write_rows(folder / "rows.jsonl")
    usual = {"baseline__prefix_tokens": PREFIX, "baseline__bottleneck": WIDTH, "train__max_steps": STEPS} | common
    return {
        name: config(folder / base, rows, folder / f"run-{number}", **usual, **changes)
        for number, (name, (base, changes)) in enumerate(CASES.items())
    }


def run_and_resume(here: World, cases: dict[str, dict[str, Any]], resumed: list[str]) -> dict[str, Any]:
    """Every case's trace; those of `resumed` are saved before the last step, and a fresh set-up does it again."""
    found = {}
    for name, tree in cases.items():
        job, folder = start(here, tree), Path(tree["run_dir"])
        trace = train(job, 0, STEPS - 1)
        if name in resumed:
            path = checkpoint.save(job.engine, job.state(STEPS - 1, 0), folder, job.write_adapter_config, job.key)
        last = train(job, STEPS - 1, 1)
        job.engine.ds.destroy()
        again = None
        if name in resumed:
            fresh = start(here, tree, randomise=False)
            state = checkpoint.read_state(path)
            checkpoint.check_resumable(state, fresh.state(STEPS - 1, 0), path)
            checkpoint.restore(fresh.engine, path, state, fresh.key)
            again = train(fresh, STEPS - 1, 1)
            fresh.engine.ds.destroy()
        trace.losses += last.losses
        trace.norms += last.norms
        found[name] = (trace, last, again)
    return found


@pytest.mark.ranks
@pytest.mark.parametrize(
    "names",
    [
        [*baselines.METHODS, "bitfit, gpt2"],
        pytest.param(
            ["prelayer, gpt2", "adapter-h, gpt2", "lora+preembed, gpt2", "lora+prelayer, deepspeed"],
            marks=pytest.mark.long,
        ),
    ],
    ids=["each", "more"],
)
def test_training_equals_a_reference_and_survives_a_stop(names: list[str], tmp_path: Path) -> None:
    """One launch for both: starting ranks is what takes long. The last step after a resume is the same to the bit."""
    for base in ("llama", "gpt2"):
        tiny_folder(tmp_path / base, base)
    cases = {name: tree for name, tree in trees(tmp_path).items() if name in names}
    found = run_ranks(2, "test_baselines:run_and_resume", cases, RESUMED, folder=tmp_path / "ranks")[0]
    for name, (trace, last, again) in found.items():
        assert_equal(trace, reference(cases[name]))
        if again is not None:
            assert again.losses == last.losses, f"{name}: a resumed run differs"
            assert all(torch.equal(value, again.values[tensor]) for tensor, value in last.values.items()), name
    assert {name for name, (_, _, again) in found.items() if again} == set(names) & set(RESUMED)


def reference(tree: dict[str, Any]) -> Trace:
    """The method once more, written with hooks and torch's own layers, one document at a time."""
    cfg = RunConfig.model_validate(tree)
    shapes = trained(cfg)
    start = random_factors(shapes)
    model = AutoModelForCausalLM.from_pretrained(cfg.model.path, dtype=torch.float32).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.requires_grad_(False)
    named = REFERENCES[cfg.method](model, {name: nn.Parameter(value) for name, value in start.items()})
    return _reference_steps(model, cfg, named, STEPS, None)


def trained(cfg: RunConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what our model trains, on meta; names as `training.everything` gives them."""
    model, _, _ = setup.build_model(cfg, open_folder(cfg.model.path))
    named = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return {name.replace(".base_layer.", "."): tuple(p.shape) for name, p in named}


Named = dict[str, nn.Parameter]


def bitfit(model: nn.Module, given: Named) -> Named:
    """The layer's own bias trains; a layer without one gets one. Ours is what is added to the base's."""
    named = {}
    for name, shift in given.items():
        module = model.get_submodule(name.removesuffix(".shift"))
        before = 0.0 if module.bias is None else module.bias.data
        module.bias = named[name] = nn.Parameter(before + shift.data)
    return named


def put(prefix: Tensor, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    hidden, *rest = args
    return (torch.cat([prefix[None], hidden[:, len(prefix) :]], dim=1), *rest)


def prefix(model: nn.Module, given: Named) -> Named:
    """A document alone begins with its placeholders: the first rows of every layer's input are replaced."""
    for name, vectors in given.items():
        layer = model.get_submodule(name.removesuffix(".prefix"))
        layer.register_forward_pre_hook(functools.partial(put, vectors))
    return given


def preembed(model: nn.Module, given: Named) -> Named:
    """PEFT's prompt tuning, given the document without its placeholders; it returns logits for its own vectors too."""
    from peft import PromptTuningConfig, get_peft_model

    (vectors,) = given.values()
    tuned = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX))
    weight = tuned.prompt_encoder["default"].embedding.weight
    weight.data.copy_(vectors.data)
    plain = type(model).forward

    def forward(*, input_ids: Tensor, use_cache: bool) -> Any:
        model.forward = functools.partial(plain, model)
        try:
            return tuned(input_ids=input_ids[:, PREFIX:], use_cache=use_cache)
        finally:
            model.forward = forward

    model.forward = forward
    return dict.fromkeys(given, weight)


def bottlenecks(model: nn.Module, given: Named) -> Named:
    for name in given:
        if name.endswith(".down"):
            site = name.removesuffix(".down")
            parts = {end.rpartition(".")[2]: p for end, p in given.items() if end.rpartition(".")[0] == site}
            model.get_submodule(site).register_forward_hook(functools.partial(bottleneck, parts))
    return given


def bottleneck(parts: Named, module: nn.Module, args: Any, y: Tensor) -> Tensor:
    h = y
    if "norm_weight" in parts:
        h = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        h = h * parts["norm_weight"] + parts["norm_bias"]
    h = h @ parts["down"].T + parts["down_bias"]
    h = h.clamp(min=0.0) if "norm_weight" in parts else F.gelu(h)
    return y + h @ parts["up"].T + parts["up_bias"]


def with_factors(model: nn.Module, given: Named) -> Named:
    """The vectors as they are alone, and PEFT's LoRA in the model."""
    from peft import LoraConfig, inject_adapter_in_model

    vectors = {name: p for name, p in given.items() if name.endswith(".prefix")}
    modules = {name.rpartition(".")[0] for name in given.keys() - vectors}
    conv1d = model.config.model_type == "gpt2"
    lora = LoraConfig(r=4, lora_alpha=8.0, target_modules=sorted(modules), fan_in_fan_out=conv1d)
    # PEFT's go in before GPT-2 adds its positions, ours after that
    named = (prefix if conv1d or len(vectors) > 1 else preembed)(model, vectors)
    inject_adapter_in_model(lora, model)
    for name in given.keys() - vectors:
        module, _, factor = name.rpartition(".")
        named[name] = getattr(model.get_submodule(module), factor)["default"].weight
        named[name].data.copy_(given[name].data)
    for parameter in named.values():
        parameter.requires_grad_(True)  # PEFT freezes all but its own
    return {name: named[name] for name in given}


REFERENCES = {
    "bitfit": bitfit,
    "preembed": preembed,
    "prelayer": prefix,
    "adapter-h": bottlenecks,
    "adapter-l": bottlenecks,
    "lora+preembed": with_factors,
    "lora+prelayer": with_factors,
}


@pytest.mark.parametrize("method", baselines.METHODS)
@pytest.mark.parametrize("base", ["llama", "gpt2", "qwen2", "gemma2", "phi3", "falcon"])
def test_a_plan_counts_what_is_built(base: str, method: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(tiny_config(base).to_json_string())
    cfg = run_config(tmp_path, method)
    from transformers import AutoConfig

    from lora_scale.adapters import baselines as modules
    from lora_scale.parallel import recompute

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    modules.insert(model, cfg, recompute.decoder_layers(model))
    built = sorted(tuple(p.shape) for p in model.parameters() if p.requires_grad)
    planned = architecture(tiny_config(base).to_dict())
    assert sorted(baselines.shapes(planned, cfg)) == built
    assert cost.numel(states.trained_shapes(planned, cfg)) == baselines.numel(planned, cfg)


def run_config(model: Path | str, method: str, **baseline: int) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"path": str(model)},
            "data": {"train": "rows.jsonl"},
            "run_dir": "run",
            "method": method,
            "train": {"max_steps": 1},
            "baseline": {"prefix_tokens": PREFIX, "bottleneck": WIDTH, **baseline},
        }
    )


@pytest.mark.parametrize(
    ("method", "sizes", "millions"),
    [
        ("preembed", {"prefix_tokens": 256 + 8}, 3.2),
        ("adapter-h", {"bottleneck": 1}, 7.1),
        ("adapter-h", {"bottleneck": 8}, 40.1),
        ("bitfit", {}, 13.0),  # the paper has 14.2, which its description does not give; docs/paper.md
        ("prelayer", {"prefix_tokens": 8 + 8}, 18.9),  # the paper has 20.2
    ],
)
def test_counts_on_gpt3_are_the_papers(method: str, sizes: dict[str, int], millions: float) -> None:
    """Table 4's first column, but for two of its figures."""
    found = baselines.numel(architecture(shape("gpt3-175b")), run_config("m", method, **sizes))
    assert round(found / 1e6, 1) == millions


@pytest.mark.parametrize("alone", ["preembed", "prelayer"])
def test_factors_beside_vectors_count_as_both(alone: str) -> None:
    gpt3, both = architecture(shape("gpt3-175b")), run_config("m", f"lora+{alone}", prefix_tokens=8 + 4)
    lora = run_config("m", "lora")
    vectors = baselines.numel(gpt3, run_config("m", alone, prefix_tokens=8 + 4))
    assert baselines.numel(gpt3, both) == cost.numel(states.trained_shapes(gpt3, lora)) + vectors
    assert round(cost.numel(states.trained_shapes(gpt3, lora)) / 1e6, 1) == 37.7


@pytest.mark.parametrize("key, value", [("dropout", 0.1), ("bias", "all"), ("use_dora", True), ("pissa", 4)])
def test_factors_beside_vectors_are_plain(key: str, value: Any) -> None:
    tree = run_config("m", "lora+prelayer").model_dump(mode="json")
    tree["lora"] |= {key: value}
    with pytest.raises(ValueError, match=rf"lora\.{key} is {value} and method is lora\+prelayer, which trains plain"):
        RunConfig.model_validate(tree)


def test_counts_are_pefts() -> None:
    """Prompt tuning, and the biases that LoRA with bias="all" trains beside its factors."""
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    planned = architecture(tiny_config("gpt2").to_dict())

    def theirs(peft_config: Any) -> int:
        model = AutoModelForCausalLM.from_config(tiny_config("gpt2"))
        return sum(p.numel() for p in get_peft_model(model, peft_config).parameters() if p.requires_grad)

    prompt = theirs(PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX))
    assert prompt == baselines.numel(planned, run_config("m", "preembed"))
    lora = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    biases = theirs(LoraConfig(bias="all", **lora)) - theirs(LoraConfig(bias="none", **lora))
    assert biases == baselines.numel(planned, run_config("m", "bitfit"))


def test_a_model_without_places_for_bottlenecks_is_refused() -> None:
    planned = architecture(tiny_config("mixtral").to_dict())
    with pytest.raises(ConfigError, match="needs 4 places in this mixtral, and 2 are known"):
        baselines.numel(planned, run_config("m", "adapter-h"))


def test_the_prefix_must_leave_room() -> None:
    with pytest.raises(ValueError, match=r"baseline\.prefix_tokens is 1023; data\.seq_len = 1024 must leave room"):
        run_config("m", "prelayer", prefix_tokens=1023)
    assert run_config("m", "bitfit", prefix_tokens=4000).baseline.prefix_tokens == 4000
