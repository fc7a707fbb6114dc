"""The modules a plan counts are those that `adapters.targets` adapts, and as many parameters as PEFT would train."""

from typing import Any

import pytest
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from tiny_models import TINY, tiny_model

from lora_scale.adapters.targets import select_targets
from lora_scale.spec import cost, named, targets
from lora_scale.spec.config import LoraConfig
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.shapes import architecture

CHOICES: list[dict[str, Any]] = [
    {},
    {"target_modules": ["q"]},
    {"target_modules": ["q", "k", "v", "o"], "r": 3},
    {"target_modules": ["all-linear"], "r": 5},
    {"target_modules": [r"re:.*\.1\..*"], "r": 2},
    {"target_modules": ["all-linear"], "r": 4, "rank_pattern": {r".*\.0\..*": 7}},
]


@pytest.mark.parametrize("choice", CHOICES, ids=str)
@pytest.mark.parametrize("model_type", TINY)
def test_the_same_modules_and_ranks_as_the_adapters(model_type: str, choice: dict[str, Any]) -> None:
    cfg = LoraConfig(**choice)
    model = tiny_model(model_type, device="meta")
    adapted = {name: r for name, (r, _) in select_targets(model, cfg).items()}
    assert targets.ranks(architecture(model.config.to_dict()), cfg) == adapted
    assert adapted, "proves nothing"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers so
@pytest.mark.parametrize("model_type", [name for name in TINY if name not in ("qwen3_moe", "mixtral")])
def test_as_many_trainable_parameters_as_peft(model_type: str) -> None:
    model = tiny_model(model_type, device="meta")
    shapes = targets.adapter_shapes(
        architecture(model.config.to_dict()), LoraConfig(r=3, target_modules=("all-linear",))
    )
    fan_in_fan_out = model_type == "gpt2"
    peft = get_peft_model(model, PeftConfig(r=3, target_modules="all-linear", fan_in_fan_out=fan_in_fan_out))
    assert cost.numel(shapes) == sum(p.numel() for p in peft.parameters() if p.requires_grad)


@pytest.mark.parametrize(("r", "millions"), [(1, 4.72), (4, 18.87), (8, 37.75)])
def test_gpt3_has_the_papers_trainable_counts(r: int, millions: float) -> None:
    shapes = targets.adapter_shapes(architecture(named.shape("gpt3-175b")), LoraConfig(r=r))
    assert round(cost.numel(shapes) / 1e6, 2) == millions
    assert cost.numel(shapes) == 2 * 96 * r * (12288 + 12288)


@pytest.mark.parametrize(
    ("model_type", "entry", "message"),
    [
        ("llama", "c_attn", "'c_attn', which names no linear layer of this llama; there are the roles q, k, v, o, mlp"),
        ("llama", "attention", "and the layers q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head"),
        ("mixtral", "mlp", "there are the roles q, k, v, o, all-linear"),
        ("llama", "re:(", "which is no regular expression: missing )"),
    ],
)
def test_an_entry_that_names_nothing(model_type: str, entry: str, message: str) -> None:
    model = architecture(tiny_model(model_type, device="meta").config.to_dict())
    with pytest.raises(ConfigError) as error:
        targets.ranks(model, LoraConfig(target_modules=(entry,)))
    assert message in str(error.value)


def test_a_fused_matrix_is_said() -> None:
    gpt2, llama = (architecture(tiny_model(name, device="meta").config.to_dict()) for name in ("gpt2", "llama"))
    assert (
        targets.fused(gpt2, LoraConfig()) == "gpt2 keeps q, k and v in one matrix: adapting q and v adapts attn.c_attn"
    )
    assert targets.fused(gpt2, LoraConfig(target_modules=("q", "k", "v"))) is None
    assert targets.fused(gpt2, LoraConfig(target_modules=("o",))) is None
    assert targets.fused(llama, LoraConfig()) is None
