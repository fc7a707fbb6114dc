"""Memory by moment and category: against measured runs, by hand, under tensor parallelism; answers and ways out."""

import json
from pathlib import Path
from typing import Any

import pytest

from lora_scale.spec import cost, memory, named, planning, servers, states
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.memory import GIB, Work
from lora_scale.spec.shapes import architecture
from lora_scale.spec.states import Grid

ROOT = Path(__file__).parent.parent
LLAMA = architecture(named.shape("llama-7.2b"))


def run_config(ranks: int = 1, **changes: Any) -> RunConfig:
    micro = changes.pop("micro", 1)
    tree: dict[str, Any] = {
        "model": {"path": "x"},
        "data": {"train": "x", "seq_len": changes.pop("seq_len", 1024)},
        "run_dir": "x",
        "parallel": {"zero_stage": changes.pop("stage", 3), "base_engine": changes.pop("engine", "flat")},
        "train": {"max_steps": 2, "micro_batch_size": micro, "global_batch_size": micro * ranks},
    }
    return RunConfig.model_validate(tree | changes)


def records() -> dict[str, dict[str, Any]]:
    """Every measured run of ours, by name."""
    found = [json.loads(path.read_text()) for path in (ROOT / "docs/benchmarks").glob("*.json")]
    rows = [row for record in found if "title" in record for row in record.get("rows", [])]
    return {row["name"]: row for row in rows if row.get("who") == "lora_scale" and row.get("peak_gib")}


@pytest.mark.parametrize(
    ("name", "shape", "masked"),
    [
        ("lora-recompute-1gpu", "llama-7.2b", False),  # the first four are calibrated on, so this says only that the
        ("lora-1gpu", "llama-7.2b", False),  # calibration still holds
        ("lora-recompute-2gpu", "llama-7.2b", False),
        ("lora-2gpu", "llama-7.2b", False),
        ("smollm2-1gpu", "smollm2-135m", True),  # these two are not
        ("smollm2-2gpu", "smollm2-135m", True),
    ],
)
def test_measured_peaks(name: str, shape: str, masked: bool) -> None:
    """The bounds asked for: peak within 3%, what is above the states within 10% or 0.5 GiB, reserved within 8%."""
    row = records()[name]
    # as they were run: transformers' own modules, DeepSpeed's own gathering
    changes = {"kernels": "none", "engine": "deepspeed", "micro": row["blocks_a_pass"], "seq_len": row["seq_len"]}
    cfg = run_config(row["ranks"], recompute=row["recompute"], **changes)
    model, grid = architecture(named.shape(shape)), Grid(row["ranks"])
    found, exact = (
        memory.memory(model, cfg, grid, Work(masked=masked)),
        states.model_states(model, cfg, grid).total / GIB,
    )
    assert found.allocated / GIB == pytest.approx(row["peak_gib"], rel=0.03)
    assert found.allocated / GIB - exact == pytest.approx(row["peak_gib"] - exact, rel=0.1, abs=0.5)
    assert (found.allocated + found.waste) / GIB == pytest.approx(row["reserved_gib"], rel=0.08)


def test_moments_by_hand() -> None:
    """llama-7.2b, 2 x 512 tokens in bf16, without a mask."""
    tokens, one_layer = 1024, 4 * 4096 + 8 + 2 * 2 * 8 + 2 * (2 * 4096 + 2 * 1024) + 4 * 32 + 4 * 14336
    cfg = {"micro": 2, "seq_len": 512}
    nothing = memory.memory(LLAMA, run_config(recompute="none", **cfg), Grid(1), Work(masked=False)).moments
    assert list(nothing) == ["loss", "backward", "step"]
    assert nothing["loss"].layers_kept == 32 * tokens * one_layer
    assert nothing["loss"].logits == tokens * (2 * 2 * 4096 + 32000 * 10) and nothing["loss"].gathered == 0
    assert nothing["loss"].outside == tokens * (2 * 4096 + 4)  # the last norm; the embedding is the first one's input
    everything = memory.memory(LLAMA, run_config(2, recompute="all", **cfg), Grid(2), Work(masked=False)).moments
    assert list(everything) == ["loss", "recompute", "step"]
    assert everything["loss"].layer_inputs == 32 * tokens * 4096 * 2 and everything["loss"].layers_kept == 0
    assert everything["loss"].gathered == 2 * 2 * (218_103_808 + 2 * 4096)
    assert everything["recompute"].one_layer == tokens * one_layer
    some = memory.memory(LLAMA, run_config(recompute=8, **cfg), Grid(1), Work(masked=False)).moments
    assert list(some) == ["loss", "backward", "recompute", "step"]
    assert some["loss"].layers_kept * 4 == pytest.approx(nothing["loss"].layers_kept * 3)
    assert some["loss"].layer_inputs * 4 == everything["loss"].layer_inputs


def test_the_last_layers_recompute_frees_what_later_ones_kept() -> None:
    moments = memory.memory(LLAMA, run_config(recompute=8, seq_len=4096), Grid(1), Work(masked=False)).moments
    assert moments["recompute"].layers_kept == 0 < moments["backward"].layers_kept


def test_targets_and_masks() -> None:
    """Logits are there where targets are; a mask is kept by every layer, seq_len elements a token."""
    cfg = run_config(seq_len=512, recompute="none")
    whole, part = (memory.logits(LLAMA, cfg, Work(masked=False, target_share=share)) for share in (1.0, 0.125))
    assert whole == 512 * (2 * 2 * 4096 + 32000 * 10)
    assert part == 64 * (2 * 2 * 4096 + 32000 * 10) + 512 * 2 * 4096  # beside what they are taken from
    cfg = run_config(seq_len=512, recompute="none", kernels="none")
    whole, part = (memory.logits(LLAMA, cfg, Work(masked=False, target_share=share)) for share in (1.0, 0.125))
    assert whole == part * 8 == 512 * 32000 * 12
    cfg = run_config(seq_len=512, recompute="none")
    plain, masked = (
        memory.memory(LLAMA, cfg, Grid(1), Work(masked=m)).moments["loss"].layers_kept for m in (False, True)
    )
    assert masked - plain == 32 * 512 * (2 * 512 + 2 * 2 * (4096 - 1024))  # the mask, and k and v for every query head


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_tensor_parallel_shards_sum_to_the_model(tp: int) -> None:
    cfg = run_config(lora={"r": 8, "target_modules": ["q", "v", "o"]})
    norms = (2 * 32 + 1) * 4096
    frozen = sum(map(cost.numel, states.frozen_units(LLAMA, cfg, tp)))
    assert tp * (frozen - norms) + norms == cost.total(LLAMA)
    whole, shards = (states.trained_shapes(LLAMA, cfg, n) for n in (1, tp))
    for (rows, columns), (rows_here, columns_here) in zip(whole, shards, strict=True):
        factor = "A" if rows == 8 else "B"
        assert (rows_here, columns_here) in {(rows, columns), (rows // tp, columns), (rows, columns // tp)}, factor
    # q, v: A whole and B split; o: A split and B whole
    assert [w == s for w, s in zip(whole[:6], shards[:6], strict=True)] == [True, False, True, False, False, True]


def test_tensor_parallelism_takes_what_it_splits() -> None:
    """Weights, heads, inner features and the vocabulary by tp; norms and the residual whole; nothing is gathered."""
    cfg = run_config(2, recompute="none", seq_len=4096)
    one, two = (memory.memory(LLAMA, cfg, grid, Work(masked=False)) for grid in (Grid(1), Grid(2, tp=2)))
    before, after = one.moments["loss"], two.moments["loss"]
    assert after.base == pytest.approx(before.base / 2, rel=1e-3) and after.gathered == 0
    assert after.outside == before.outside
    assert before.logits == 4096 * 2 * 2 * 4096 + 2048 * 32000 * 10  # in two chunks
    assert after.logits == 4096 * 2 * 2 * 4096 + 4096 * 16000 * 6
    assert before.layers_kept / 2 < after.layers_kept < before.layers_kept * 0.7
    assert two.nccl > 0 == one.nccl


@pytest.mark.parametrize(
    ("ranks", "tp", "shape", "words"),
    [
        (3, 2, "llama-7.2b", "which does not divide this job's 3 ranks"),
        (3, 3, "llama-7.2b", "32 attention heads do not divide; 1, 2, 4, 8 would work"),
        (2, 2, "opt-175b", "how to cut a model of type 'opt' is not known here"),
    ],
)
def test_impossible_grids(ranks: int, tp: int, shape: str, words: str) -> None:
    cfg = run_config(6, parallel={"tensor_parallel_size": tp})
    with pytest.raises(ConfigError, match=words):
        states.grid_of(architecture(named.shape(shape)), cfg, ranks)


def test_the_grid_of_a_config() -> None:
    cfg = run_config(8, parallel={"tensor_parallel_size": 2, "base_sharding": "node"})
    assert states.grid_of(LLAMA, cfg, 8, gpus_per_node=4) == Grid(8, 2, base_over=2, adapter_over=1)
    assert states.grid_of(LLAMA, run_config(8, stage=0), 8) == Grid(8)
    large = run_config(8, lora={"r": 64, "target_modules": ["all-linear"]})
    assert states.grid_of(LLAMA, large, 8) == Grid(8)


def test_adapters_that_are_replicated() -> None:
    """In stage 3, an adapter in groups of one is whole on every rank; so is a base partitioned over one node of two."""
    cfg = run_config(4)
    spread, whole = (states.model_states(LLAMA, cfg, Grid(4, adapter_over=over)) for over in (None, 1))
    assert whole.adam == pytest.approx(4 * spread.adam) and whole.base == spread.base
    assert states.model_states(LLAMA, cfg, Grid(4, base_over=2)).base == pytest.approx(2 * spread.base, rel=1e-5)


def job(shape: str, ranks: int, **changes: Any) -> planning.Job:
    return planning.job_of(architecture(named.shape(shape)), run_config(ranks, **changes), Grid(ranks))


@pytest.mark.parametrize(
    ("shape", "limit", "changes", "first"),
    [
        ("llama-7.2b", 22, {"recompute": "none", "seq_len": 4096}, ("recompute=all",)),
        ("llama-7.2b", 25, {"micro": 8, "seq_len": 4096}, ("train.micro_batch_size=4",)),
        ("llama-100.7b", 139, {}, ("2 GPUs",)),
        ("llama-100.7b", 139, {"recompute": "none", "seq_len": 4096}, ("recompute=all", "2 GPUs")),
    ],
)
def test_ways_out_do_fit(shape: str, limit: float, changes: dict[str, Any], first: tuple[str, ...]) -> None:
    asked = job(shape, 1, **changes)
    assert planning.predicted(asked).needed > limit * GIB
    ways = planning.ways_out(asked, limit)
    assert set(ways[0].changes) == set(first) and all(way.needed <= limit * GIB for way in ways)


def test_no_way_out_is_not_made_up() -> None:
    assert planning.ways_out(job("llama-7.2b", 1), 0.5) == []


@pytest.mark.parametrize(("limit", "fits", "words"), [(None, None, "needs"), (20, True, "fits: "), (1, False, "short")])
def test_answers(limit: float | None, fits: bool | None, words: str) -> None:
    row = planning.plan(job("llama-7.2b", 1))
    said = planning.answer(row["this_run"], 1, limit)
    assert said.fits is fits and words in said.sentence
    needed = row["this_run"]["needed"] / GIB
    assert planning.answer(row["this_run"], 1, needed + 0.1).sentence.startswith("fits tightly: ")


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ({"r": 8}, None),
        ({"r": 40}, "lora.r is 40: vLLM serves rank 16 by default; start it with --max-lora-rank 64"),
        ({"r": 600}, "takes ranks up to 512, and this one has r = 600"),
        ({"rank_pattern": {"q_proj": 32}}, "rank_pattern and alpha_pattern are ignored"),
        ({"alpha_pattern": {"q_proj": 32.0}}, "scales all layers by one lora_alpha / r"),
        ({"target_modules": ["lm_head"]}, "reaches the output layer"),
    ],
)
def test_what_vllm_will_not_serve(lora: dict[str, Any], words: str | None) -> None:
    said = servers.warnings(LLAMA, run_config(lora=lora))
    assert said == [] if words is None else words in said[0]
