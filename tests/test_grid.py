"""Grids of ranks: parts read as the grid says, replicas that stay equal, checkpoints that fit any grid, a base kept by
each node, and faults of tensor parallelism that a test must see."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from grid_cases import FAULTS
from ranks import run_ranks
from tiny import tiny_folder
from training import Trace, assert_equal, config, reference, write_rows

from lora_scale.adapters.lora import draw_a
from lora_scale.spec.config import RunConfig

pytestmark = pytest.mark.ranks

HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("llama"), **HEADS, attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


def tree_of(model: Path, rows: Path, run_dir: Path, tp: int = 1, **changes: Any) -> dict[str, Any]:
    common = {"train__global_batch_size": 4, "parallel__tensor_parallel_size": tp}
    return config(model, rows, run_dir, **{**common, **changes})


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def faulty(model: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two tensor-parallel ranks with dropout and clipping, right and with each fault, and the reference."""
    folder = tmp_path_factory.mktemp("faults")
    tree = tree_of(model, rows, folder / "run", 2, lora__dropout=0.2, parallel__zero_stage=0, data__packing=False)
    found = run_ranks(2, "grid_cases:with_faults", tree, folder=folder / "ranks")[0]
    alone = config(model, rows, folder / "run", lora__dropout=0.2, train__global_batch_size=4, data__packing=False)
    return {"tree": tree, "reference": reference(alone, steps=2), **found}


def drawn_as_one_process_would(tree: dict[str, Any], values: dict[str, torch.Tensor]) -> bool:
    cfg = RunConfig.model_validate(tree)
    return all(
        torch.equal(value, draw_a(cfg.seed, name.removesuffix(".lora_A"), *value.shape, cfg.lora.init_A))
        for name, value in values.items()
        if name.endswith("lora_A")
    )


def test_without_a_fault_all_is_equal(faulty: dict[str, Any]) -> None:
    trace, values = faulty["right"]
    assert_equal(trace, faulty["reference"])
    assert drawn_as_one_process_would(faulty["tree"], values)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_seen(name: str, faulty: dict[str, Any]) -> None:
    trace, values = faulty[name]
    if name == "each rank draws its own factors":
        assert not drawn_as_one_process_would(faulty["tree"], values)
        return
    with pytest.raises(AssertionError, match=r"is off by|are not close"):
        assert_equal(trace, faulty["reference"])


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "tp", "stage", "engine"),
    [(2, 2, 0, "flat"), (4, 2, 3, "flat"), (4, 2, 3, "deepspeed"), (4, 4, 0, "flat")],
)
def test_each_rank_holds_its_slice_and_the_group_reads_every_byte_once(
    ranks: int, tp: int, stage: int, engine: str, rows: Path, tmp_path: Path
) -> None:
    """Matrices of 2 MiB, so that columns are exchanged, and small ones, that are read piece by piece. Over four
    tensor-parallel ranks a shard of rows is short too: the whole matrix is one row of an exchange."""
    sizes = {**HEADS, "hidden_size": 256, "intermediate_size": 2048, "attention_bias": True, "mlp_bias": True}
    folder = tiny_folder(tmp_path / "model", **sizes, dtype=torch.float32)
    tree = tree_of(folder, rows, tmp_path / "run", tp, parallel__zero_stage=stage, parallel__base_engine=engine)
    found = run_ranks(ranks, "grid_cases:loaded_parts", tree, folder=tmp_path / "ranks")
    copies = 1 if stage == 3 else ranks // tp
    assert [one["wrong"] for one in found] == [[]] * ranks
    for name, (_, _, numel) in found[0]["spans"].items():
        for shard in range(tp):
            kept = sorted(set(one["spans"][name][:2] for one in found if one["shard"] == shard))
            owned = [i for first, last in kept for i in (first, last) if first < last]
            assert [0, *owned[1:-1:2]] == owned[::2] and owned[-1] == numel, (name, kept)
    weights = found[0]["weights"]
    assert 1.0 <= sum(one["counted"] for one in found) / (copies * weights) <= 1.02  # norms are read by both
    large = [size for one in found for size in one["sizes"] if size >= 1 << 19]
    share = 0.75 if engine == "flat" and stage == 3 else 0.8  # a piece ends within a matrix: two shorter runs
    assert sum(large) > share * copies * weights, "the heavy matrices are read in long runs"


# --- replicas, checkpoints -------------------------------------------------------------------------------------------


def test_replicas_stay_equal_to_the_bit(model: Path, rows: Path, tmp_path: Path) -> None:
    trees = {
        f"{stage} {sharding}": tree_of(
            model,
            rows,
            tmp_path / "run",
            2,
            train__max_steps=4,
            parallel__zero_stage=stage,
            parallel__adapter_sharding=sharding,
        )
        for stage, sharding in ((0, "auto"), (3, "replicate"), (3, "zero"))
    }
    everyone = run_ranks(4, "grid_cases:replicas", trees, folder=tmp_path / "ranks")
    for name in trees:
        hashes = defaultdict(list)
        for rank in everyone:
            for run, digest in rank[name].items():
                hashes[run].append(digest)
        assert all(len(set(digests)) == 1 for digests in hashes.values()), name
        assert any(len(digests) == 4 for digests in hashes.values()) or name == "3 zero", name


def test_a_checkpoint_fits_every_grid(model: Path, rows: Path, tmp_path: Path) -> None:
    step = 5
    saving = tree_of(model, rows, tmp_path / "run", 2, train__max_steps=8)
    trace = run_ranks(2, "grid_cases:save", saving, step, folder=tmp_path / "save")[0]
    path = str(tmp_path / "run" / f"step-{step:06d}")
    for ranks, layouts in ((1, ((1, 3),)), (4, ((1, 3), (2, 3), (4, 0)))):
        trees = {
            f"{ranks // tp}x{tp} stage {stage}": {
                **tree_of(model, rows, tmp_path / "other", tp, train__max_steps=8, parallel__zero_stage=stage)
            }
            for tp, stage in layouts
        }
        found = run_ranks(ranks, "grid_cases:go_on", trees, path, folder=tmp_path / f"on-{ranks}")[0]
        for name, losses in found.items():
            wanted = torch.tensor(trace.losses[step:])
            torch.testing.assert_close(
                torch.tensor(losses), wanted, rtol=1e-5, atol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_the_adapter_at_the_start_is_the_same_file_on_every_grid(model: Path, rows: Path, tmp_path: Path) -> None:
    files = []
    for ranks in (1, 2):
        tree = tree_of(model, rows, tmp_path / f"run-{ranks}", ranks)
        run_ranks(ranks, "grid_cases:save_at_once", tree, folder=tmp_path / f"ranks-{ranks}")
        folder = tmp_path / f"run-{ranks}" / "step-000000"
        files.append({path.name: path.read_bytes() for path in folder.glob("adapter_*")})
    assert files[0] == files[1]
    assert json.loads(files[0]["adapter_config.json"])["r"] == 4


# --- a base kept by each node ----------------------------------------------------------------------------------------


def test_a_base_on_each_node_changes_no_loss_and_moves_no_base_between_nodes(rows: Path, tmp_path: Path) -> None:
    """Four ranks as two nodes of two."""
    single = tiny_folder(tmp_path / "single", **HEADS)
    double = tiny_folder(tmp_path / "double", **HEADS, intermediate_size=192)
    ways = {
        "node": {"parallel__base_sharding": "node"},
        "node, adapter partitioned": {"parallel__base_sharding": "node", "parallel__adapter_sharding": "zero"},
        "node, recompute": {"parallel__base_sharding": "node", "recompute": "all"},
        "node, by DeepSpeed": {"parallel__base_sharding": "node", "parallel__base_engine": "deepspeed"},
        "one node reads": {"parallel__base_sharding": "node", "parallel__load_from": "one_node"},
        "one node reads, by DeepSpeed": {
            "parallel__base_sharding": "node",
            "parallel__load_from": "one_node",
            "parallel__base_engine": "deepspeed",
        },
        "world": {},
    }
    trees = {name: tree_of(single, rows, tmp_path / "run", **changes) for name, changes in ways.items()}
    traces = run_ranks(4, "training:run_cases", trees, folder=tmp_path / "train", per_node=2)[0]
    wanted: Trace = reference(trees["world"])
    for name, trace in traces.items():
        assert_equal(trace, wanted)
        assert trace.losses == pytest.approx(traces["world"].losses, rel=1e-6), name
    counted = {
        f"{size} {name}": tree_of(folder, rows, tmp_path / "run", **ways[name])
        for size, folder in (("single", single), ("double", double))
        for name in ("node", "world")
    }
    moved = run_ranks(4, "grid_cases:between_nodes", counted, folder=tmp_path / "count", per_node=2)[0]
    assert moved["single node"] == moved["double node"], moved
    assert moved["single world"] < moved["double world"], "what the counter would see if the base moved"
    adapter = 4 * sum(value.numel() for value in traces["node"].values.values())
    assert moved["single node"] <= 4 * adapter + (1 << 10), (moved, adapter)


def test_one_node_reads_for_all(model: Path, rows: Path, tmp_path: Path) -> None:
    """Four ranks as two nodes of two: the second node reads nothing and keeps the same."""
    ways = {"parallel__base_sharding": "node", "parallel__load_from": "one_node"}
    found = run_ranks(
        4,
        "grid_cases:kept_parts",
        tree_of(model, rows, tmp_path / "run", **ways),
        folder=tmp_path / "ranks",
        per_node=2,
    )
    assert [one["read"] > 0 for one in found] == [True, True, False, False]
    assert found[0]["parts"] == found[2]["parts"] and found[1]["parts"] == found[3]["parts"]
    assert found[0]["parts"] != found[1]["parts"]


def test_local_ranks_that_make_no_nodes_are_refused(model: Path, rows: Path, tmp_path: Path) -> None:
    tree = tree_of(model, rows, tmp_path / "run", parallel__base_sharding="node")
    with pytest.raises(AssertionError, match=r"local ranks are \[1, 1\]: each node's must be 0, 1, 2, ... in a row"):
        run_ranks(2, "grid_cases:with_wrong_local_ranks", tree, folder=tmp_path / "ranks")
