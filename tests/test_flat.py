"""The flat base: a gathered unit is what the files say, each is gathered once a pass, and no parameter holds anything
between steps."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import tiny_folder
from training import assert_equal, config, reference, run_cases, start, train, write_rows
from transformers import AutoModelForCausalLM

from lora_scale.parallel import load, transport
from lora_scale.parallel.world import World

pytestmark = pytest.mark.ranks

# Model type, changes to its config, gathers of a step and of an evaluation. A step of llama: embedding, 5 layers and
# output layer, less the first layer, which is there from the backward pass before; back through 4, since the output
# layer and the last layer are there. GPT-2 has two tables before its layers, which drive the first layer out, and
# gathers the tied one again for the output.
FORMS: list[tuple[str, dict[str, Any], list[int]]] = [
    ("llama", {"num_hidden_layers": 5}, [6 + 4, 6]),
    ("gpt2", {"n_layer": 3}, [6 + 2, 6]),
    ("qwen3_moe", {"num_hidden_layers": 3}, [4 + 2, 4]),
]
PINNING = ("qwen3_moe", "falcon")  # layers whose own operations save views of their weights


def gathers(here: World, trees: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each run: names of tensors that differ from `from_pretrained`'s while their module computes; gathers of the
    second step and of an evaluation; what parameters hold after each."""
    return {name: _gathers(here, tree) for name, tree in trees.items()}


def _gathers(here: World, tree: dict[str, Any]) -> dict[str, Any]:
    job = start(here, tree)
    gathering = job.engine.module.gathering
    theirs = AutoModelForCausalLM.from_pretrained(job.cfg.model.path, dtype=load.dtype_of(job.cfg))
    expected, wrong, seen = dict(theirs.named_parameters()), set(), set()
    held = [member for unit in gathering.base.units for member in unit.members]

    def compare(module: Any, *_: Any) -> None:
        for unit in gathering.base.units:
            for member in unit.members if module in unit.modules else []:
                name = member.name.replace(".base_layer", "")
                seen.add(name)
                if not torch.equal(member.parameter, expected[name]):
                    wrong.add(name)

    for unit in gathering.base.units:
        for module in unit.modules:
            module.register_forward_pre_hook(compare)
    counts, whole = [], 0
    for action in (lambda: train(job, 0, 1), lambda: train(job, 1, 1), lambda: job.engine.evaluate(_batches(job))):
        before = gathering.gathers
        action()
        counts.append(gathering.gathers - before)
        whole += sum(member.parameter.numel() for member in held)
    job.engine.ds.destroy()
    matrices = {name for name, tensor in expected.items() if tensor.dim() > 1}
    return {"wrong": sorted(wrong), "missed": sorted(matrices - seen), "counts": counts[1:], "whole": whole}


def one_sided(here: World, trees: dict[str, dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Runs whose pieces lie in files that every rank has mapped, in the place of GPUs' memory."""
    count = iter(range(1000))

    def symmetric(nbytes: int, device: torch.device, group: Any) -> tuple[torch.Tensor, Any]:
        paths = [str(folder / f"{number}-{rank}") for number in [next(count)] for rank in range(here.size)]
        mine = torch.from_file(paths[here.rank], shared=True, size=nbytes, dtype=torch.uint8)
        dist.barrier(group)
        peers = [torch.from_file(path, shared=True, size=nbytes, dtype=torch.uint8) for path in paths]
        return mine, SimpleNamespace(get_buffer=lambda rank, *_: peers[rank])

    with (
        mock.patch.object(transport, "symmetric", symmetric),
        mock.patch.object(transport, "choose", lambda world, group, wanted: (transport.OneSided(group), "")),
        mock.patch.object(transport.Collective, "gather", side_effect=AssertionError("nothing is to be gathered")),
    ):
        return {"gathers": gathers(here, trees), "traces": run_cases(here, trees)}


def _batches(job: Any) -> Any:
    return job.data.plan.step(0).micro_batches[:1]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl")


def test_units_are_what_the_files_say_and_are_gathered_once_a_pass(rows: Path, tmp_path: Path) -> None:
    trees, counts = {}, {}
    for model_type, changes, wanted in FORMS:
        folder = tiny_folder(tmp_path / model_type, model_type, dtype=torch.float32, **changes)
        for recompute in ("all", "none"):
            name = f"{model_type}, recompute {recompute}"
            trees[name] = config(folder, rows, tmp_path / "run", recompute=recompute, train__micro_batch_size=3)
            counts[name] = wanted
    for found in run_ranks(2, "test_flat:gathers", trees, folder=tmp_path / "ranks"):
        assert found == {name: {"wrong": [], "missed": [], "counts": counts[name], "whole": 0} for name in trees}


def test_saved_views_of_weights_are_found_again(rows: Path, tmp_path: Path) -> None:
    """Without recompute the buffers have held other units between forward and backward."""
    trees = {}
    for model_type in PINNING:
        folder = tiny_folder(tmp_path / model_type, model_type, dtype=torch.float32, num_hidden_layers=4)
        trees[model_type] = config(
            folder, rows, tmp_path / "run", lora__target_modules=["q", "v"], train__max_steps=4, data__packing=False
        )
    for name, trace in run_ranks(2, "training:run_cases", trees, folder=tmp_path / "ranks")[0].items():
        assert_equal(trace, reference(trees[name], steps=4))


def test_one_sided_reads_give_the_same(rows: Path, tmp_path: Path) -> None:
    """Three ranks, so that a weight can lie in one piece, in two or in all."""
    folder = tiny_folder(tmp_path / "model", dtype=torch.float32, num_hidden_layers=4)
    tree = config(folder, rows, tmp_path / "run", train__max_steps=4, train__micro_batch_size=2)
    (tmp_path / "shared").mkdir()
    everyone = run_ranks(3, "test_flat:one_sided", {"run": tree}, tmp_path / "shared", folder=tmp_path / "ranks")
    for found in everyone:
        assert found["gathers"]["run"] == {"wrong": [], "missed": [], "counts": [5 + 3, 5], "whole": 0}
    assert_equal(everyone[0]["traces"]["run"], reference(tree, steps=4))
