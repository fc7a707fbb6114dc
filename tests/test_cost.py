"""Bytes and operations: properties that hold for every size, the literature's figures, and DeepSpeed's own tensors."""

import json
from pathlib import Path
from typing import Any

import deepspeed_memory
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from tiny import tiny_folder

from lora_scale.spec import cost, memory, named, states
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.layout import Placement, zero_span
from lora_scale.spec.shapes import architecture
from lora_scale.spec.states import Grid

LLAMA = architecture(named.shape("llama-7.2b"))
GPT3 = architecture(named.shape("gpt3-175b"))


def run_config(ranks: int = 1, **changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "model": {"path": "x"},
        "data": {"train": "x", "seq_len": changes.pop("seq_len", 1024)},
        "run_dir": "x",
        "lora": changes.pop("lora", {}),
        "parallel": {"zero_stage": changes.pop("stage", 3), "base_engine": changes.pop("engine", "deepspeed")},
        "train": {
            "max_steps": 2,
            "micro_batch_size": (micro := changes.pop("micro", 1)),
            "global_batch_size": micro * ranks * changes.pop("accumulation", 1),
        },
    }
    return RunConfig.model_validate(tree | changes)


def test_gpt3_in_the_papers_units() -> None:
    """350 GB are the weights in 16 bits, 35 MB the adapter; 2.8 TB is Adam in mixed precision (the paper: 1.2)."""
    trained = cost.numel(states.trained_shapes(GPT3, run_config(lora={"r": 4})))
    assert round(2 * cost.total(GPT3) / 1e9) == 349
    assert round(cost.MIXED_ADAM * cost.total(GPT3) / 1e12, 1) == 2.8
    assert cost.export_bytes(trained) == 36 * 2**20
    assert cost.checkpoint_bytes(trained) == (72 + 144) * 2**20


@pytest.mark.parametrize("name", ["llama-7.2b", "gpt2-small", "qwen3-235b-a22b", "mixtral-8x22b"])
def test_n_counts_what_a_token_is_multiplied_with(name: str) -> None:
    """By hand: every matrix but the looked-up tables, experts at k of E, and the vectors that scale or shift."""
    model = architecture(named.shape(name))
    lookups = sum(p.numel for p in model.parameters if p.kind in ("table", "positions"))
    idle = sum(p.numel for p in model.parameters if p.kind == "experts")
    idle -= idle // max(1, model.experts) * model.experts_per_token
    output = model.vocabulary * model.hidden if model.tied else 0
    assert cost.computing(model) == cost.total(model) - lookups + output - idle


def test_active_parameters_of_mixtures_are_as_published() -> None:
    """Published with the input embedding: 39B and 22B."""
    for name, billions in (("mixtral-8x22b", 39), ("qwen3-235b-a22b", 22)):
        model = architecture(named.shape(name))
        assert round((cost.computing(model) + model.vocabulary * model.hidden) / 1e9) == billions


def test_flops() -> None:
    n = cost.total(LLAMA) - 32000 * 4096
    assert cost.flops_per_token(LLAMA, run_config()) == 4 * n
    assert cost.flops_per_token(LLAMA, run_config(method="full")) == 6 * n
    # DESIGN.md section 8 has 2,384 tokens/s on 2 GPUs at 480 TFLOP/s a GPU, with N the total
    assert round(cost.tflops(4 * 100_691_363_840, 2384 / 2)) == 480
    # the scores and values of one document: sum over its tokens of 4 d keys, three times (forward, backward twice)
    length = 100
    by_hand = sum(3 * 4 * 32 * 4096 * keys for keys in range(1, length + 1)) / length
    assert cost.attention_flops_per_token(LLAMA, (length + 1) / 2) == pytest.approx(by_hand)
    assert cost.mfu(4e9, 1000.0, 989.4) == pytest.approx(4e12 / 989.4e12)


shapes_of_tensors = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple), min_size=1, max_size=12)


@given(
    frozen=shapes_of_tensors, trained=shapes_of_tensors, ranks=st.integers(1, 9), stage=st.sampled_from([0, 1, 2, 3])
)
@settings(max_examples=200, deadline=None)
def test_states_of_any_sizes(frozen: Any, trained: Any, ranks: int, stage: int) -> None:
    """All ranks together hold at least the tensors, and more only by padding and by what a stage replicates."""
    held = states.states([frozen], trained, run_config(ranks, stage=stage), Grid(ranks))
    numel, padding = cost.numel(trained), len(trained) * ranks + 4 * ranks
    assert held.total == held.base + held.trained + held.master + held.gradients + held.adam + held.bucket
    if stage == 0:
        assert (held.base, held.trained, held.master) == (2 * cost.numel(frozen), 4 * numel, 0)
        assert (held.gradients, held.adam) == (4 * numel, 8 * numel)
        return
    assert 8 * numel <= held.adam * ranks < 8 * (numel + padding)
    assert held.master * 2 == held.adam
    if stage == 3:
        assert 4 * numel <= held.trained * ranks < 4 * (numel + padding)
        spans = [zero_span(cost.numel([s]), Placement(zero_rank=0, zero_size=ranks)) for s in frozen]
        assert held.base == 2 * sum(stop - start for start, stop in spans), (
            "the first rank's partitions are never short"
        )
    else:
        assert held.base == 2 * cost.numel(frozen)
        assert 4 * numel <= held.trained < 4 * (numel + padding)
        assert held.gradients >= 4 * numel / ranks


@given(units=st.lists(shapes_of_tensors, min_size=1, max_size=5), ranks=st.integers(1, 9))
@settings(max_examples=200, deadline=None)
def test_a_flat_base_of_any_sizes(units: Any, ranks: int) -> None:
    """All pieces together are the units, each tensor and each piece aligned; a vector by itself is on every rank."""
    held = states.states(units, [(2, 3)], run_config(ranks, engine="flat"), Grid(ranks, adapter_over=1))
    alone = [unit for unit in units if len(unit) == 1 and len(unit[0]) == 1]
    cut = [unit for unit in units if unit not in alone]
    nbytes, tensors = 2 * sum(map(cost.numel, cut)), sum(map(len, cut))
    spread = held.base - 2 * sum(map(cost.numel, alone))
    assert nbytes <= spread * ranks <= nbytes + 512 * (tensors + ranks * len(cut))
    assert (held.trained, held.master, held.gradients, held.adam, held.bucket) == (24, 0, 24, 48, 0)


def test_full_fine_tuning_costs_18_bytes_a_parameter_in_all() -> None:
    """DESIGN.md section 6: 16, or 18 with fp32 gradients, which is what DeepSpeed is told to keep here."""
    held = states.model_states(LLAMA, cost.full_fine_tuning(run_config(8)), Grid(8))
    assert (held.total - held.bucket) * 8 == pytest.approx(18 * cost.total(LLAMA), rel=1e-5)


def test_the_counterfactual_of_stage_0_has_somewhere_to_keep_its_fp32_copy() -> None:
    assert cost.full_fine_tuning(run_config(stage=0)).parallel.zero_stage == 1
    assert cost.full_fine_tuning(run_config(stage=0, precision="fp32")).parallel.zero_stage == 0


@pytest.mark.parametrize(("global_batch", "ranks", "words"), [(8, 3, "6 or 9"), (2, 4, "for example 4"), (8, 4, None)])
def test_accumulation(global_batch: int, ranks: int, words: str | None) -> None:
    cfg = run_config(1, accumulation=global_batch)
    if words is None:
        assert cost.accumulation_steps(cfg, ranks) == global_batch // ranks
        return
    with pytest.raises(ConfigError, match=words):
        cost.accumulation_steps(cfg, ranks)


def held_by_deepspeed(here: Any, folder: str, changes: dict[str, Any]) -> dict[str, int]:
    """On each rank: bytes of the storages behind DeepSpeed's tensors after a backward pass, by category."""
    return deepspeed_memory.held(here, Path(folder), run_config(here.size, **changes))


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (3, {"parallel": {}}),
        pytest.param(3, {"parallel": {"adapter_sharding": "zero"}, "lora": {"r": 3}}, marks=pytest.mark.long),
        pytest.param(3, {"stage": 3, "lora": {"r": 3}}, marks=pytest.mark.long),
        pytest.param(5, {"stage": 2, "lora": {"r": 3}}, marks=pytest.mark.long),
        (3, {"stage": 1, "lora": {"r": 3}}),
        pytest.param(2, {"stage": 0, "lora": {"r": 3}}, marks=pytest.mark.long),
        pytest.param(3, {"stage": 3, "method": "full"}, marks=pytest.mark.long),
        pytest.param(3, {"stage": 3, "method": "full", "precision": "fp32"}, marks=pytest.mark.long),
        pytest.param(3, {"stage": 2, "method": "full"}, marks=pytest.mark.long),
        pytest.param(3, {"stage": 2, "method": "full", "precision": "fp32"}, marks=pytest.mark.long),
        pytest.param(3, {"stage": 1, "method": "full"}, marks=pytest.mark.long),
        pytest.param(2, {"stage": 0, "method": "full", "precision": "fp32"}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_states_are_what_deepspeed_holds(ranks: int, changes: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", hidden_size=36, intermediate_size=50, num_attention_heads=6, head_dim=6)
    held = run_ranks(ranks, "test_cost:held_by_deepspeed", str(folder), changes, folder=tmp_path / "ranks")
    model = architecture(json.loads((folder / "config.json").read_text()))
    cfg, grid = run_config(ranks, **changes), Grid(ranks)
    if flat := states.keeps_base_flat(cfg):
        grid = states.grid_of(model, cfg, ranks)
    parts = memory.parts_of(model, cfg)
    for rank in held:
        by_product = {name.removeprefix("product's "): n for name, n in rank.items() if name.startswith("product's ")}
        assert sum(by_product.values()) == rank["everything"], "the product's categories are not all that there is"
        assert by_product.pop("gathered") == (memory.gathered(cfg, parts.layers, parts.frozen, grid) if flat else 0)
        padding = by_product.pop("base") - rank["base"]  # frozen tensors begin at multiples of 512 bytes
        assert 0 <= padding < 512 * 64 and (padding == 0 or changes.get("method") != "full")
        assert by_product == {name: rank[name] for name in by_product}
        assert rank["microseconds a parameter"] < 200  # some ten of the processor's own time
    names = ("base", "trained", "master", "gradients", "adam", "bucket")
    largest = {category: max(rank[category] for rank in held) for category in (*names, "unexplained")}
    found = states.model_states(model, cfg, grid)
    assert largest == {name: getattr(found, name) for name in names} | {"unexplained": 0}
