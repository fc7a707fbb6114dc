"""A base in fp8 blocks: every rank's part of it is the reference dequantisation, bit for bit; others are refused."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from click.testing import CliRunner
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from tiny_fp8 import CUT, WHOLE, dequantised_folder, fp8_folder, read, value, write_index
from torch import Tensor
from training import config, start, train, write_rows

from lora_scale.commands.merge import command as merge
from lora_scale.commands.plan import command as plan
from lora_scale.parallel import grid, load, masters, reading, verify
from lora_scale.parallel.world import World
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ModelError
from lora_scale.spec.layout import Placement
from lora_scale.spec.splits import Part, Split
from lora_scale.storage.folder import ModelFolder, fingerprint, open_folder


def part_of(folder: ModelFolder, names: list[str], place: Placement, dtype: torch.dtype) -> dict[str, Tensor]:
    """What a rank keeps of some matrices; every one is cut along the same dim."""
    wanted = {}
    for entry in (folder.tensors[name] for name in names):
        shape = entry.shape
        split = None if place.split is None else Split(place.split.dim, (Part(shape[place.split.dim]),))
        here = replace(place, split=split)
        partition = -(-math.prod(here.shape(shape)) // here.zero_size)
        target = torch.full((partition,), float("nan"), dtype=dtype)
        wanted[entry.name] = reading.Wanted([entry], here, target)
    reading.read(list(wanted.values()), torch.device("cpu"), grid.alone(), lambda done, total: None)
    return {name: one.target for name, one in wanted.items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fp8_folder(tmp_path_factory.mktemp("fp8") / "cut", **CUT)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_part_of_any_matrix_is_the_reference_to_the_bit(base: Path, dtype: torch.dtype) -> None:
    """ZeRO-3 partitions of tensor-parallel slices, by rows and by columns, in reads that end anywhere; padding
    is zero."""
    stored, folder = read(base), open_folder(base)
    names = sorted(name for name in stored if name.endswith("proj.weight"))
    assert len(names) == 14 and all(f"{name}_scale_inv" in stored for name in names)
    whole = {name: value(stored, name, dtype) for name in names[:7]}  # of one layer
    with mock.patch.object(reading, "FP8_CHUNK", 1000):
        for dim, tp, zero in ((None, 1, 1), (None, 1, 3), (-1, 2, 1), (-1, 5, 2), (-2, 4, 3), (-2, 1, 7)):
            split = None if dim is None else Split(dim, (Part(0),))
            for tp_rank in range(tp):
                places = [Placement(split, tp_rank, tp, rank, zero) for rank in range(zero)]
                found = [part_of(folder, [*whole], place, dtype) for place in places]
                for name, t in whole.items():
                    cut = None if dim is None else Split(dim, (Part(t.shape[dim]),))
                    shard = masters.Shard(cut, tp_rank, tp).of(t).reshape(-1)
                    mine = torch.cat([part[name] for part in found])
                    assert torch.equal(mine[: len(shard)], shard), (name, dim, tp, zero)
                    assert not mine[len(shard) :].any()


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16], ids=["DeepSeek's scales", "Qwen's scales"])
def test_whole_blocks_equal_what_transformers_dequantises(scales: torch.dtype, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    folder = fp8_folder(tmp_path / "model", "qwen3", scales, head_dim=64, **WHOLE)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    cfg = RunConfig.model_validate(config(folder, tmp_path / "no", tmp_path / "run", precision="bf16"))
    model = load.empty(open_folder(folder), cfg)
    loaded = load.fill(model, open_folder(folder), torch.device("cpu"), None, {}, grid.alone())
    expected = dict(theirs.named_parameters())
    wrong = [name for name, p in model.named_parameters() if not torch.equal(p, expected.pop(name))]
    assert not wrong and not expected and not loaded.unused


def parts_and_losses(here: World, trees: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What this rank keeps of every base weight, the bytes it read, and the losses; small reads, columns exchanged."""
    found = {}
    with mock.patch.object(reading, "FP8_CHUNK", 1000), mock.patch.object(reading, "SHORT", 1 << 12):
        for name, tree in trees.items():
            job = start(here, tree)
            kept = {key: part.clone() for key, part in job.loaded.partitions.items()}
            found[name] = kept, job.loaded.nbytes, job.folder.nbytes, train(job, 0, 3).losses
            job.engine.ds.destroy()
    return found


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("ranks", "stage", "tp"),
    [pytest.param(1, 3, 1, marks=pytest.mark.long), (2, 3, 1), (2, 0, 2)],
    ids=["1", "2", "tp 2"],
)
def test_a_run_equals_that_on_the_dequantised_base_to_the_bit(
    ranks: int, stage: int, tp: int, base: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    changes = {"precision": "bf16", "parallel__zero_stage": stage, "parallel__tensor_parallel_size": tp}
    folders = {"fp8": base, "plain": dequantised_folder(base, tmp_path / "plain", torch.bfloat16)}
    trees = {name: config(folder, rows, tmp_path / "run", **changes) for name, folder in folders.items()}
    for found in run_ranks(ranks, "test_fp8:parts_and_losses", trees, folder=tmp_path / "ranks"):
        (kept, nbytes, stored, losses), (expected, _, _, wanted) = found["fp8"], found["plain"]
        assert [name for name in expected if not torch.equal(kept.pop(name), expected[name])] == []
        assert not kept and losses == wanted and losses[0] != losses[1]
        assert nbytes < 1.15 * stored / ranks, "each rank reads its own bytes, norms and scales"


def test_the_fingerprint_sees_a_scale(base: Path, tmp_path: Path) -> None:
    copy = fp8_folder(tmp_path / "copy", **CUT)
    assert fingerprint(open_folder(copy)) == fingerprint(open_folder(base)), "the same bytes in another place"
    changed(copy, lambda tensors: tensors[SCALES].mul_(1.5))
    assert fingerprint(open_folder(copy)) != fingerprint(open_folder(base))


def test_plan_counts_bf16_in_memory_and_fp8_on_disk(base: Path, tmp_path: Path) -> None:
    said = []
    for folder in (base, dequantised_folder(base, tmp_path / "plain", torch.bfloat16)):
        path = tmp_path / f"{folder.name}.yaml"
        path.write_text(json.dumps(config(folder, tmp_path / "rows", tmp_path / "run", precision="bf16")))
        done = CliRunner().invoke(plan, [str(path), "--json"])
        assert done.exit_code == 0, done.output
        said.append(json.loads(done.output))
    stored = sum(t.numel() * t.element_size() for t in read(base).values())
    assert f"files agree; {stored / 1e3:.1f} kB in fp8 blocks, dequantised in memory" in said[0].pop("model")
    assert "fp8" not in said[1].pop("model")
    assert said[0] == said[1]


def test_merge_is_refused(base: Path, tmp_path: Path) -> None:
    from lora_scale.adapters import peft

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    factors = {
        "model.layers.0.self_attn.q_proj.lora_A": torch.ones(2, 160),
        "model.layers.0.self_attn.q_proj.lora_B": torch.ones(160, 2),
    }
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    peft.write_adapter(adapter, factors, settings, "fp32", fingerprint(open_folder(base)))
    done = CliRunner().invoke(merge, [str(adapter), "--base", str(base), "--out", str(tmp_path / "out")])
    assert isinstance(done.exception, ModelError), done.output
    assert "is stored in fp8 blocks: a sum would have to be rounded to fp8 again" in str(done.exception)
    compared = verify.compare(open_folder(base), adapter, peft.read_adapter(adapter), "fp32")
    assert compared.equal and compared.moved > 0


def changed(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """Change the tensors of the first file, and the index with them."""
    file = min(folder.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    write_index(folder)
    return folder


Q, SCALES = "model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.gate_proj.weight_scale_inv"
REFUSED: dict[str, tuple[dict[str, Any] | Callable[[dict[str, Tensor]], Any], str]] = {
    "no scales": (lambda t: t.pop(SCALES), f"{Q} is fp8, but there is no {SCALES}; download it again"),
    "scales of another size": (
        lambda t: t.update({SCALES: t[SCALES][:1].clone()}),
        f"{SCALES} has shape (1, 2), but {Q} (200, 160) in blocks of 128 x 128 needs (2, 2); config.json belongs to "
        "another model",
    ),
    "scales as exponents": (
        lambda t: t.update({SCALES: t[SCALES].to(torch.float8_e8m0fnu)}),
        f"{SCALES} is F8_E8M0, not F32 or BF16; use its bf16 release",
    ),
    "another fp8": (
        lambda t: t.update({Q: t[Q].float().to(torch.float8_e5m2)}),
        f"{Q} is F8_E5M2; use a checkpoint in bf16, fp16 or fp32",
    ),
    "no blocks": (
        {"weight_block_size": None},
        "is quantised with fp8 (fp8 without weight_block_size), which is not read yet; use its bf16 release",
    ),
    "no word of it": ({}, f"{Q} is F8_E4M3; use a checkpoint in bf16, fp16 or fp32"),
}


@pytest.mark.parametrize(("change", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_this_form_is_refused_by_name(change: Any, message: str, base: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(base, tmp_path / "model"))
    if callable(change):
        changed(folder, change)
    else:
        settings = json.loads((folder / "config.json").read_text())
        settings["quantization_config"] = change and settings["quantization_config"] | change
        (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError) as error:
        open_folder(folder)
    assert message in str(error.value)
