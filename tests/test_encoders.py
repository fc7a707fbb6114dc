"""Encoders with a classification head through the same engine: equal to one process of transformers + PEFT."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model_state_dict
from ranks import run_ranks
from tiny_tokenizer import write_tokenizer
from torch import Tensor, nn
from training import STEPS, Trace, _our_name, _reference_steps, assert_equal, config, random_factors
from transformers import AutoConfig, AutoModelForSequenceClassification

from lora_scale.adapters import peft
from lora_scale.adapters.lora import adapted_layers
from lora_scale.parallel import classes, load, setup
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError, DataError
from lora_scale.storage.dataset import Documents
from lora_scale.storage.folder import open_folder

CLASSES, VOCAB = 3, 96
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
    "pad_token_id": 2,
    "num_labels": CLASSES,
}
DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
}
FAMILIES: dict[str, dict[str, Any]] = {"roberta": {"type_vocab_size": 1}, "deberta-v2": DEBERTA, "bert": {}}
ATTENTION = {"roberta": ["query", "value"], "deberta-v2": ["query_proj", "value_proj"], "bert": ["query", "value"]}
HEAD = {"roberta": ["classifier.dense", "classifier.out_proj"], "deberta-v2": ["classifier"], "bert": ["classifier"]}
# name: (family, what differs); the first two are what the paper ran
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "roberta": ("roberta", {}),
    "deberta-v2": ("deberta-v2", {"recompute": "all"}),
    "roberta, frozen head": ("roberta", {"lora__modules_to_save": []}),
    "bert": ("bert", {"parallel__zero_stage": 0}),
    "deberta-v2, frozen head": ("deberta-v2", {"lora__modules_to_save": [], "parallel__base_engine": "deepspeed"}),
}


def folder_of(path: Path, family: str) -> Path:
    """A random encoder with its head, biases and norms drawn too, so that every one of them matters."""
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(family, **SIZES, **FAMILIES[family]))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1  # norms stay near 1, attention soft
    model.save_pretrained(path)
    return write_tokenizer(path, VOCAB)


def rows_of(path: Path) -> Path:
    draw = torch.Generator().manual_seed(0)
    with path.open("w") as file:
        for _ in range(60):
            ids = torch.randint(3, VOCAB, (int(torch.randint(4, 20, (), generator=draw)),), generator=draw).tolist()
            number = int(torch.randint(CLASSES, (), generator=draw))
            file.write(json.dumps({"input_ids": [*ids, number], "labels": [-100] * len(ids) + [number]}) + "\n")
    return path


def trees(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    rows, found = rows_of(folder / "rows.jsonl"), {}
    for number, name in enumerate(names):
        family, changes = CASES[name]
        if not (folder / family).exists():
            folder_of(folder / family, family)
        usual: dict[str, Any] = {
            "lora__target_modules": ATTENTION[family],
            "lora__modules_to_save": HEAD[family],
            "data__packing": False,
        }
        if family == "deberta-v2":
            usual["model__attention"] = "eager"  # transformers has no other for it
        found[name] = config(folder / family, rows, folder / f"run-{number}", **{**usual, **changes})
    return found


@pytest.mark.ranks
@pytest.mark.parametrize(
    "names", [list(CASES)[:3], pytest.param(list(CASES)[3:], marks=pytest.mark.long)], ids=["each", "more"]
)
def test_two_ranks_equal_one_process_of_peft(names: list[str], tmp_path: Path) -> None:
    """ZeRO-3 over two ranks; losses, norms, every gradient of factors and head."""
    cases = trees(tmp_path, names)
    traces = run_ranks(2, "training:run_cases", cases, folder=tmp_path / "ranks")[0]
    for name, tree in cases.items():
        assert_equal(traces[name], reference(tree))


def reference(tree: dict[str, Any]) -> Trace:
    from peft import LoraConfig, get_peft_model

    cfg = RunConfig.model_validate(tree)
    encoder = AutoModelForSequenceClassification.from_pretrained(cfg.model.path, dtype=torch.float32)
    for module in encoder.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    saved = list(cfg.lora.modules_to_save)
    lora = LoraConfig(
        r=cfg.lora.r,
        lora_alpha=cfg.lora.lora_alpha,
        target_modules=list(cfg.lora.target_modules),
        modules_to_save=saved or None,
    )
    model = get_peft_model(encoder, lora)
    named = {
        _our_name(name).replace(".modules_to_save.default", ""): p
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    drawn = random_factors({name: tuple(p.shape) for name, p in named.items()})
    for name, value in drawn.items():
        named[name].data.copy_(value)
    return _reference_steps(Told(model.train()), cfg, named, STEPS, None)


class Told(nn.Module):
    """Answers as a causal model would: the class's logits at the position before its token, which the model never
    sees."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        found = self.model(input_ids=input_ids[:, :-1])
        found.logits = F.pad(found.logits[:, None], (0, 0, input_ids.shape[1] - 2, 1))
        return found


def documents(ids: list[int], trained: list[int]) -> Documents:
    """Documents of three tokens each."""
    offsets, none = np.arange(0, len(ids) + 1, 3), np.array([])
    marks = np.array(trained, dtype=bool)
    return Documents(Path("x"), np.array(ids), marks, offsets, offsets[:-1], 0, 8, len(ids) // 3, 3, none, none)


@pytest.mark.parametrize(
    ("ids", "trained", "message"),
    [
        ([5, 6, 1, 7, 8, 9], [0, 0, 1, 0, 1, 1], "document 1 trains 2 tokens, but an encoder learns one class of each"),
        ([5, 1, 6], [0, 1, 0], "document 0 trains 1 tokens, but an encoder learns one class of each"),
        ([5, 6, 3], [0, 0, 1], "document 0 has class 3, but .* has 3: 0 to 2"),
    ],
)
def test_documents_without_one_class_are_refused(
    ids: list[int], trained: list[int], message: str, tmp_path: Path
) -> None:
    folder = open_folder(folder_of(tmp_path, "bert"))
    with pytest.raises(DataError, match=message):
        classes.check_documents(documents(ids, trained), folder)
    classes.check_documents(documents([5, 6, 2], [0, 0, 1]), folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "prelayer"}, "method is prelayer, but .* is an encoder that classifies; set method=lora"),
        ({"data__packing": True}, "data.packing is true"),
        ({"parallel__tensor_parallel_size": 2}, "parallel.tensor_parallel_size is more than 1"),
        ({"recompute": "auto"}, "recompute is auto"),
        ({}, "parallel.base_engine is flat"),
    ],
)
def test_what_is_not_built_for_encoders_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    tree = config(
        folder_of(tmp_path, "bert" if changes else "deberta-v2"),
        tmp_path / "rows",
        tmp_path / "run",
        **{"data__packing": False, **changes},
    )
    with pytest.raises(ConfigError, match=message):
        load.read_config(open_folder(tmp_path), RunConfig.model_validate(tree))


@pytest.mark.parametrize(
    ("name", "task_type"), [("roberta", None), ("roberta, frozen head", None), ("bert", "SEQ_CLS")]
)
def test_peft_loads_an_adapter_of_an_encoder(name: str, task_type: str | None, tmp_path: Path) -> None:
    """With its head, whole or in parts, and without; PEFT takes SEQ_CLS only with the whole one."""
    (tree,) = trees(tmp_path, [name]).values()
    cfg = RunConfig.model_validate(tree)
    model, _, _ = setup.build_model(cfg, open_folder(cfg.model.path))
    layers = adapted_layers(model)
    found = peft.adapter_config(model, layers, cfg.lora, "x")
    assert found["task_type"] == task_type and found["modules_to_save"] == (list(cfg.lora.modules_to_save) or None)
    encoder = AutoModelForSequenceClassification.from_pretrained(cfg.model.path, dtype=torch.float32)
    values = {
        f"{n}.{f}": torch.randn(getattr(layer, f).shape) for n, layer in layers.items() for f in ("lora_A", "lora_B")
    }
    for module in cfg.lora.modules_to_save:
        parameters = encoder.get_submodule(module).named_parameters()
        values |= {f"{module}.{leaf}": torch.randn(parameter.shape) for leaf, parameter in parameters}
    (tmp_path / "adapter").mkdir()
    peft.write_adapter(tmp_path / "adapter", values, found)
    loaded = PeftModel.from_pretrained(encoder, tmp_path / "adapter")
    theirs = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    assert theirs.keys() == {peft.key(parameter) for parameter in values}
    assert all(torch.equal(theirs[peft.key(parameter)], value) for parameter, value in values.items())
