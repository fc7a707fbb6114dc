"""Parameters computed from config.json are transformers' own, name by name: tiny models of every form, named shapes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from tiny_models import TINY, tiny_config, tiny_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from lora_scale.spec import cost, named
from lora_scale.spec.config import LoraConfig
from lora_scale.spec.errors import ModelError, UsageError
from lora_scale.spec.families import roles
from lora_scale.spec.shapes import BUILDERS, architecture, from_tensors
from lora_scale.spec.targets import adapter_shapes

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    ("llama", {"num_key_value_heads": None}),
    ("mistral", {"head_dim": 24}),
    ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ("gemma2", {"attention_bias": True, "tie_word_embeddings": False}),
    ("phi3", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ("gpt2", {"n_inner": 40, "n_positions": 24, "tie_word_embeddings": False}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    ("falcon", {"new_decoder_architecture": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    ("falcon", {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}),
    ("falcon", {"ffn_hidden_size": 40, "tie_word_embeddings": False}),
    ("bloom", {"tie_word_embeddings": False}),
    ("opt", {"word_embed_proj_dim": 16}),
    ("opt", {"do_layer_norm_before": False, "enable_bias": False}),
    ("opt", {"layer_norm_elementwise_affine": False, "tie_word_embeddings": False}),
    ("opt", {"_remove_final_layer_norm": True}),
    ("gpt_neox", {"attention_bias": False, "tie_word_embeddings": True}),
    ("qwen3_moe", {"mlp_only_layers": [], "decoder_sparse_step": 2, "attention_bias": True}),
    ("mixtral", {"head_dim": 12, "tie_word_embeddings": True}),
]


def theirs(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def ours(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {parameter.name: parameter.shape for parameter in architecture(config).parameters}


@pytest.mark.parametrize(("model_type", "changes"), [*((t, {}) for t in TINY), *VARIANTS])
def test_names_and_shapes_are_transformers(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(model_type, device="meta", **changes)
    model.config.save_pretrained(tmp_path)  # as in a folder: transformers leaves out what is its default
    config = json.loads((tmp_path / "config.json").read_text())
    assert ours(config) == theirs(model)


@pytest.mark.parametrize("model_type", TINY)
def test_kinds_are_what_transformers_builds(model_type: str) -> None:
    model = tiny_model(model_type, device="meta")
    found = architecture(model.config.to_dict())
    linears = {p.module: p for p in found.parameters if p.is_linear}
    built = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    built = {name: m for name, m in built.items() if name != "lm_head" or not found.tied}
    assert linears.keys() == built.keys()
    for name, module in built.items():
        features = module.weight.shape if isinstance(module, Conv1D) else module.weight.shape[::-1]
        assert linears[name].features == tuple(features)
    tables = {p.name for p in found.parameters if p.kind in ("table", "positions")}
    assert tables == {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    assert found.parameters[0].name == next(n for n, p in model.named_parameters() if n in tables)


@pytest.mark.parametrize("model_type", TINY)
def test_what_config_json_may_leave_out_has_transformers_default(model_type: str) -> None:
    """Old folders lack keys that came later."""
    tiny = tiny_config(model_type).to_dict()
    required = {
        "model_type",
        "vocab_size",
        "hidden_size",
        "n_embd",
        "intermediate_size",
        "ffn_dim",
        "n_layer",
        "n_head",
    }
    required |= {"num_hidden_layers", "num_attention_heads", "max_position_embeddings", "n_positions"}
    required |= {"num_experts", "num_local_experts", "moe_intermediate_size", "pad_token_id"}
    for key in [key for key in tiny if key not in required]:
        config = {name: value for name, value in tiny.items() if name != key}
        mine = ours(config)
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
        assert mine == theirs(built), key


@pytest.mark.parametrize("name", named.SHAPES)
def test_named_shapes_have_transformers_count(name: str) -> None:
    config = dict(named.shape(name))
    config["model_type"] = config["model_type"].replace("gpt3", "gpt2")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    shape = architecture(named.shape(name))
    assert cost.total(shape) == sum(p.numel() for p in model.parameters())
    if name != "gpt3-175b":  # q, k and v are apart there, in no class of transformers; tests/test_targets.py has it
        targets = sorted({*roles(shape.model_type)["q"], *roles(shape.model_type)["v"]})
        conv1d = shape.model_type == "gpt2"
        adapted = get_peft_model(
            model, PeftConfig(r=4, target_modules=targets, fan_in_fan_out=conv1d), low_cpu_mem_usage=True
        )
        theirs = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        assert cost.numel(adapter_shapes(shape, LoraConfig(r=4))) == theirs


@pytest.mark.parametrize(
    ("name", "billions"),
    [  # as their names or their papers say; gpt3 by transformers' GPT-2 class, where the LoRA paper has 175,255.8M
        ("gpt3-175b", 174.60), ("llama-3.1-405b", 405.85), ("llama-3.1-70b", 70.55), ("qwen2.5-72b", 72.71),
        ("bloom-176b", 176.25), ("mixtral-8x22b", 140.62), ("qwen3-235b-a22b", 235.09), ("mistral-large-123b", 122.61),
        ("llama-7.2b", 7.24), ("llama-32.5b", 32.53), ("llama-100.7b", 100.69), ("slice-34.0b", 34.00),
        ("slice-22.9b", 22.89),
    ],
)  # fmt: skip
def test_named_shapes_are_the_models_they_name(name: str, billions: float) -> None:
    assert round(cost.total(architecture(named.shape(name))) / 1e9, 2) == billions


def test_gpt3_has_q_and_v_apart_and_the_same_total() -> None:
    shape = named.shape("gpt3-175b")
    apart, fused = architecture(shape), architecture({**shape, "model_type": "gpt2"})
    assert cost.total(apart) == cost.total(fused)
    assert {p.features for p in apart.parameters if p.name.endswith((".q.weight", ".v.weight"))} == {(12288, 12288)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "model_type 'None', whose parameters are not known here; known are bloom, falcon"),
        ({"model_type": "mamba"}, "model_type 'mamba'"),
        ({"model_type": "llama"}, "has no hidden_size, which a model of type llama needs"),
        ({"model_type": "llama", "hidden_size": "4k"}, "has hidden_size = '4k'; it must be a whole number"),
        ({"model_type": "llama", "hidden_size": 32, "num_attention_heads": 0}, "num_attention_heads = 0; it must be"),
        ({"model_type": "llama", "hidden_size": 32, "num_attention_heads": 5}, "32 does not divide by its 5"),
        ({"model_type": "llama", "hidden_size": 32, "num_attention_heads": True}, "num_attention_heads = True"),
    ],
)
def test_a_config_that_does_not_say_enough(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as error:
        architecture(config)
    assert message in str(error.value)


def test_an_unknown_shape_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"did you mean llama-3\.1-70b\?"):
        named.shape("llama-3.1-70")


def test_from_tensors_counts_a_type_without_a_row() -> None:
    config = AutoConfig.for_model("olmo2", **TINY["llama"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert "olmo2" not in BUILDERS
    found = from_tensors(config.to_dict(), theirs(model))
    assert cost.total(found) == sum(p.numel() for p in model.parameters())
    assert {p.module for p in found.parameters if p.is_linear} == {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear)
    }
