"""Tensor parallelism, alone and under ZeRO, against one process of Hugging Face + PEFT: losses, gradients and norms.

In fp32, with both factors non-zero and clipping active. A whole grid of layouts is one launch of ranks for each world
size; CI runs a covering part of it, `-m long` all of it.
"""

import itertools
from math import prod
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from tiny import tiny_folder
from training import STEPS, Trace, assert_equal, config, reference, write_rows

pytestmark = pytest.mark.ranks

_HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4}
# family: changes to its tiny config, so that four ranks can share the heads
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**_HEADS, "attention_bias": True, "mlp_bias": True},
    "mistral": {**_HEADS, "sliding_window": 6},
    "qwen2": _HEADS,
    "qwen3": _HEADS,
    "gemma2": _HEADS,
    "gemma3_text": _HEADS,
    "phi3": _HEADS,
    "gpt2": {},
    "falcon": {"multi_query": True},
    "falcon, grouped": {
        "new_decoder_architecture": True,
        "num_attention_heads": 8,
        "num_kv_heads": 4,
        "bias": True,
    },
    "qwen3_moe": _HEADS,
    "mixtral": _HEADS,
    "gpt_neox": {},
}
LONG = 20  # steps of the whole grid
LAYOUTS = [(1, 2), (2, 1), (2, 2), (1, 4), (4, 1)]  # data parallel x tensor parallel
# ZeRO stage, recompute, dropout of the adapter; and sequence parallel in half of them, with and without each
WAYS = [
    (stage, recompute, dropout, (stage == 3) ^ (recompute == "all") ^ (dropout > 0))
    for stage, recompute, dropout in itertools.product((3, 0), ("all", "none"), (0.0, 0.1))
]
Case = tuple[str, int, int, int, str, float, bool]


def name_of(model: str, dp: int, tp: int, stage: int, recompute: str, dropout: float, sequence: bool) -> str:
    shared = ", sequence parallel" if sequence and tp > 1 else ""
    return f"{model} {dp}x{tp} ZeRO-{stage} recompute {recompute} dropout {dropout}{shared}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {
        name: tiny_folder(folder / name.replace(", ", "-"), name.partition(",")[0], **changes)
        for name, changes in MODELS.items()
    }


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", count=24)  # six steps are an epoch


def tree_of(
    folder: Path,
    rows: Path,
    dp: int,
    tp: int,
    stage: int,
    recompute: str,
    dropout: float,
    sequence: bool,
    steps: int,
) -> dict[str, Any]:
    """One pass a step under ZeRO-3; at stage 0 passes of one block, accumulated, whose collectives hide (overlap)."""
    return config(
        folder,
        rows,
        rows.parent / "run",
        data__packing=False,
        model__attention="eager" if "gemma2" in folder.name else "sdpa",
        train__max_steps=steps,
        train__global_batch_size=4,
        train__micro_batch_size=4 // dp if stage else 1,
        parallel__tensor_parallel_size=tp,
        parallel__sequence_parallel=sequence and tp > 1,
        parallel__overlap=sequence and tp > 1 and stage == 0,
        parallel__zero_stage=stage,
        recompute=recompute,
        lora__dropout=dropout,
    )


def cases_of(world: int, names: list[str]) -> list[Case]:
    grid = [(dp, tp) for dp, tp in LAYOUTS if dp * tp == world]
    return [(name, *layout, *way) for name in names for layout in grid for way in WAYS]


def covering(world: int) -> list[Case]:
    """For Llama all ways together over the layouts; one way for each other family, another one for each."""
    layouts = [layout for layout in LAYOUTS if prod(layout) == world and layout[1] > 1]
    here = {2: (0, 1, 6, 7), 4: (2, 3, 4, 5)}[world]
    found: list[Case] = [("llama", *layouts[i % len(layouts)], *WAYS[i]) for i in here]
    if world == 2:
        others = [name for name in MODELS if name != "llama"]
        found += [(name, 1, 2, *WAYS[i % len(WAYS)]) for i, name in enumerate(others)]
        found.append(("llama", 1, 2, 0, "none", 0.0, True))  # nothing recomputed, nothing dropped, all hidden
    return found


def check(
    world: int, cases: list[Case], folders: dict[str, Path], rows: Path, tmp_path: Path, steps: int = STEPS
) -> None:
    trees = {name_of(*case): tree_of(folders[case[0]], rows, *case[1:], steps=steps) for case in cases}
    traces = run_ranks(world, "training:run_cases", trees, folder=tmp_path / "ranks", timeout=len(cases) * 20 + 60)[0]
    references: dict[tuple[str, float], Trace] = {}
    failures = []
    for case in cases:
        key = (case[0], case[5])
        if key not in references:
            references[key] = reference(tree_of(folders[case[0]], rows, 1, 1, 0, "none", case[5], False, steps))
        try:
            assert_equal(traces[name_of(*case)], references[key])
        except AssertionError as error:
            failures.append(f"{name_of(*case)}: {error}")
    assert not failures, "\n".join(failures)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [2, 4])
def test_equal_to_one_process(world: int, folders: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    check(world, covering(world), folders, rows, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_the_whole_grid(model: str, world: int, folders: dict[str, Path], rows: Path, tmp_path: Path) -> None:
    check(world, cases_of(world, [model]), folders, rows, tmp_path, LONG)
