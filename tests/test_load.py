"""Loading: each rank reads its own bytes once, every value arrives, and a fault reaches all ranks as one message."""

import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import tiny_folder
from torch import nn
from training import config, write_rows

from lora_scale.parallel import flat, grid, load, memory, metrics, recompute, setup, transport, zero3
from lora_scale.parallel.deepspeed_config import ds_config
from lora_scale.parallel.world import World, on_every_rank, on_rank_zero
from lora_scale.spec.config import ParallelConfig, RunConfig
from lora_scale.spec.errors import LoraScaleError, ModelError
from lora_scale.storage.folder import ModelFolder, fingerprint, open_folder

pytestmark = pytest.mark.ranks

# (model type, dtype in the files, precision of the model, changes to its config)
FORMS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("llama", "bfloat16", "bf16", {}),
    ("llama", "float32", "bf16", {"tie_word_embeddings": True}),
    ("qwen2", "float16", "fp32", {}),
    ("gemma3_text", "bfloat16", "bf16", {}),
    ("phi3", "bfloat16", "fp32", {}),
    ("gpt2", "float32", "fp32", {}),
    ("falcon", "bfloat16", "bf16", {}),
]


Partitioner = zero3.Partitioner | flat.FlatBase | None


def _partitioner(tree: dict[str, Any], model: nn.Module) -> Partitioner:
    cfg = RunConfig.model_validate(tree)
    if cfg.parallel.zero_stage != 3:
        return None
    if cfg.parallel.base_engine == "flat":
        model.requires_grad_(False)
        way = transport.Collective(dist.group.WORLD)
        return flat.FlatBase(recompute.decoder_layers(model), way, torch.device("cpu"))
    return zero3.Partitioner(ds_config(cfg, 1, 1000, 1000, []), load.dtype_of(cfg), dist.group.WORLD)


def _fill(model: nn.Module, folder: ModelFolder, here: World, partitioner: Partitioner) -> load.Loaded:
    return load.fill(model, folder, here.device, partitioner, {}, grid.make(ParallelConfig(), here))


def loaded_equals_transformers(here: World, trees: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    """For each folder the names that differ from `from_pretrained` after a gather, parameters and buffers; must be
    none."""
    import deepspeed
    from transformers import AutoModelForCausalLM

    wrong = {}
    for name, tree in trees.items():
        cfg = RunConfig.model_validate(tree)
        folder = open_folder(cfg.model.path)
        model = load.empty(folder, cfg)
        base = _partitioner(tree, model)
        _fill(model, folder, here, base)
        theirs = AutoModelForCausalLM.from_pretrained(cfg.model.path, dtype=load.dtype_of(cfg))
        expected = dict(theirs.named_parameters())
        assert [n for n, _ in model.named_parameters()] == list(expected)
        wrong[name] = _different(base, expected) if isinstance(base, flat.FlatBase) else []
        with deepspeed.zero.GatheredParameters([p for p in model.parameters() if hasattr(p, "ds_id")]):
            here_whole = [
                (n, p) for n, p in model.named_parameters() if p.numel() or not isinstance(base, flat.FlatBase)
            ]
            wrong[name] += [n for n, p in here_whole if not torch.equal(p, expected[n])]
        buffers = dict(theirs.named_buffers())
        wrong[name] += [
            n for n, b in model.named_buffers() if b.dtype != buffers[n].dtype or not torch.equal(b, buffers[n])
        ]
    return wrong


def _different(base: flat.FlatBase, expected: dict[str, nn.Parameter]) -> list[str]:
    """Names of the parameters that differ in their gathered unit."""
    wrong = []
    for unit in base.units:
        whole = torch.empty(unit.piece * base.transport.size, dtype=torch.uint8)
        base.transport.gather(whole, unit.offset, unit.piece, unit.shared)
        wrong += [m.name for m in unit.members if not torch.equal(m.of(whole), expected[m.name])]
    return wrong


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_tensor_equals_from_pretrained(ranks: int, tmp_path: Path) -> None:
    trees = {}
    for model_type, stored, precision, changes in FORMS:
        name = f"{model_type} {stored} in {precision}"
        folder = tiny_folder(tmp_path / name.replace(" ", "-"), model_type, getattr(torch, stored), **changes)
        ways = ((3, "flat"), (3, "deepspeed"), (0, "flat")) if model_type == "llama" else ((3, "flat"),)
        for stage, engine in ways:
            changed = {"precision": precision, "parallel__zero_stage": stage, "parallel__base_engine": engine}
            trees[f"{name}, stage {stage}, {engine}"] = config(
                folder, tmp_path / "no.jsonl", tmp_path / "run", **changed
            )
    for found in run_ranks(ranks, "test_load:loaded_equals_transformers", trees, folder=tmp_path / "ranks"):
        assert found == {name: [] for name in trees}


def bytes_of_loading(here: World, tree: dict[str, Any]) -> dict[str, Any]:
    """What the kernel says this process read (rchar) for headers, fingerprint and weights; and anonymous memory
    meanwhile."""
    cfg = RunConfig.model_validate(tree)
    load.empty(open_folder(cfg.model.path), cfg)  # imports and caches
    before, anonymous = metrics.bytes_read(), memory.host_memory()["RssAnon"]
    folder = open_folder(cfg.model.path)
    on_rank_zero(lambda: fingerprint(folder))
    model = load.empty(folder, cfg)
    partitioner = _partitioner(tree, model)
    with _Peak() as peak:
        loaded = _fill(model, folder, here, partitioner)
    kept = sum(t.numel() * t.element_size() for t in loaded.partitions.values())
    digest = hash(tuple(float(t.double().sum()) for t in loaded.partitions.values()))
    return {
        "read": metrics.bytes_read() - before,
        "weights": folder.nbytes,
        "kept": kept,
        "extra": peak.value - anonymous - kept,
        "digest": digest,
    }


class _Peak:
    """The largest RssAnon seen by a thread that looks every 2 ms."""

    value = 0

    def __enter__(self) -> "_Peak":
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._over.is_set():
            self.value = max(self.value, memory.host_memory()["RssAnon"])
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@pytest.mark.parametrize(
    ("ranks", "stage", "engine"),
    [(1, 3, "flat"), (2, 3, "flat"), (3, 3, "flat"), (4, 3, "flat"), (3, 3, "deepspeed"), (2, 0, "flat")],
)
def test_bytes_are_read_once(ranks: int, stage: int, engine: str, tmp_path: Path) -> None:
    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 4000}
    folder = tiny_folder(tmp_path / "model", "llama", **shape)
    changes = {"parallel__zero_stage": stage, "parallel__base_engine": engine}
    tree = config(folder, tmp_path / "no.jsonl", tmp_path / "run", precision="bf16", **changes)
    found = run_ranks(ranks, "test_load:bytes_of_loading", tree, folder=tmp_path / "ranks")
    copies = 1 if stage == 3 else ranks
    together = sum(one["read"] for one in found) / found[0]["weights"] / copies
    assert 1.0 <= together <= 1.02, f"{ranks} ranks read {together:.4f} of the weights"
    assert all(one["extra"] < 64 << 20 for one in found), "loading took memory beside the partition"
    if stage == 3:
        assert len({one["digest"] for one in found}) == ranks, "two ranks hold the same values"


def fails(here: World, tree: dict[str, Any]) -> str:
    """The message of a load in which one rank alone meets a fault; every rank must get one, soon."""
    cfg = RunConfig.model_validate(tree)
    folder = open_folder(cfg.model.path)
    model = load.empty(folder, cfg)
    partitioner = _partitioner(tree, model)
    on_rank_zero(lambda: None)  # every rank has read the headers
    if here.is_first:
        largest = max(folder.files, key=lambda path: path.stat().st_size)
        with largest.open("r+b") as file:
            file.truncate(largest.stat().st_size - 1000)
    on_rank_zero(lambda: None)
    begin = time.monotonic()
    try:
        on_every_rank(lambda: _fill(model, folder, here, partitioner))
    except LoraScaleError as error:
        assert time.monotonic() - begin < 100
        return str(error)
    return "no error"


def test_a_fault_on_one_rank_reaches_all(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "llama", hidden_size=128, intermediate_size=256)
    tree = config(folder, tmp_path / "no.jsonl", tmp_path / "run")
    messages = run_ranks(2, "test_load:fails", tree, folder=tmp_path / "ranks")
    assert all("was changed or cut after its header was read" in message for message in messages), messages


def test_buffers_that_nobody_computes_are_refused(tmp_path: Path) -> None:
    folder = open_folder(tiny_folder(tmp_path / "model"))
    cfg = RunConfig.model_validate(config(folder.path, tmp_path / "no.jsonl", tmp_path / "run"))
    model = load.empty(folder, cfg)
    model.model.register_buffer("mystery", torch.empty(3, device="meta"), persistent=False)  # type: ignore[union-attr]
    with pytest.raises(ModelError, match=r"buffer model\.mystery .* cannot be computed"):
        load.rebuild_buffers(model)


def test_gradient_checkpointing_is_on_in_train_mode(tmp_path: Path) -> None:
    """from_pretrained leaves a model in eval mode, where recompute is silently off."""
    write_rows(tmp_path / "rows.jsonl")
    tree = config(tiny_folder(tmp_path / "model"), tmp_path / "rows.jsonl", tmp_path / "run", recompute="all")
    cfg = RunConfig.model_validate(tree)
    model, _, _ = setup.build_model(cfg, open_folder(cfg.model.path))
    assert model.training
    assert all(module.training for module in model.modules())


@pytest.mark.long
def test_memory_of_loading_a_large_checkpoint(tmp_path: Path) -> None:
    """At least 4 GB over 4 ranks: anonymous memory above that before loading is the own partition and less than 256
    MiB."""
    folder = tmp_path / "model"
    script = Path(__file__).parent.parent / "scripts" / "make_checkpoint.py"
    subprocess.run([sys.executable, str(script), "8b", str(folder), "--layers", "9"], check=True)
    tree = config(folder, tmp_path / "no.jsonl", tmp_path / "run", precision="bf16")
    found = run_ranks(4, "test_load:bytes_of_loading", tree, folder=tmp_path / "ranks")
    weights = found[0]["weights"]
    figures = {
        "weights_bytes": weights,
        "read_over_weights": sum(one["read"] for one in found) / weights,
        "kept_bytes": [one["kept"] for one in found],
        "anonymous_above_partition_mib": [round(one["extra"] / 2**20, 1) for one in found],
    }
    print(figures)
    assert weights >= 4e9
    assert 1.0 <= figures["read_over_weights"] <= 1.02
    assert max(figures["anonymous_above_partition_mib"]) < 256
    assert len({one["digest"] for one in found}) == 4, "two ranks hold the same values"
