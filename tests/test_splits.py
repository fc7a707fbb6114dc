"""How each family is cut over tensor-parallel ranks: every heavy parameter, evenly; what cannot be cut is refused."""

from math import prod
from typing import Any

import pytest
from tiny_models import TINY, tiny_config

from lora_scale.spec.errors import ConfigError
from lora_scale.spec.families import FAMILIES
from lora_scale.spec.shapes import architecture
from lora_scale.spec.splits import Part, Split, splits

CUT = [name for name, row in FAMILIES.items() if row.colwise]


def of(model_type: str, ranks: int, **changes: Any) -> dict[str, Split]:
    return splits(architecture(tiny_config(model_type, **changes).to_dict()), ranks)


@pytest.mark.parametrize("model_type", CUT)
def test_every_matrix_is_cut_and_the_shards_are_the_whole(model_type: str) -> None:
    model = architecture(tiny_config(model_type).to_dict())
    found = splits(model, 2)
    for parameter in model.parameters:
        split = found.get(parameter.name)
        if split is None:  # norms, routers, positions: small, and each rank needs all of it
            assert len(parameter.shape) == 1 or parameter.kind in ("positions", "other"), parameter
            continue
        shards = [prod(split.shape(parameter.shape, rank, 2)) for rank in range(2)]
        if all(part.kept == "pieces" for part in split.parts):
            assert shards == [parameter.numel / 2] * 2, parameter
        else:
            assert all(shard > parameter.numel / 2 for shard in shards), parameter


def test_one_rank_cuts_nothing() -> None:
    assert of("llama", 1) == {}
    assert of("opt", 1) == {}


def test_fused_matrices_are_cut_part_by_part() -> None:
    """hidden 32, 4 heads of 8, 2 key heads: q 32, k 16, v 16; and GPT-2's columns."""
    qkv = of("phi3", 2)["model.layers.0.self_attn.qkv_proj.weight"]
    assert qkv == Split(-2, (Part(32), Part(16), Part(16)))
    assert qkv.spans(64, 1, 2) == ((16, 32), (40, 48), (56, 64))
    assert of("phi3", 2)["model.layers.0.mlp.gate_up_proj.weight"] == Split(-2, (Part(48), Part(48)))
    gpt2 = of("gpt2", 2)
    assert gpt2["transformer.h.0.attn.c_attn.weight"] == Split(-1, (Part(32),) * 3)
    assert gpt2["transformer.h.0.attn.c_attn.bias"] == Split(-1, (Part(32),) * 3)
    assert gpt2["transformer.h.0.attn.c_proj.weight"] == Split(-2, (Part(32),))
    assert gpt2["transformer.h.0.attn.c_proj.bias"] == Split(-1, (Part(32, "first"),))


def test_a_single_key_head_is_kept_by_every_rank() -> None:
    split = of("falcon", 4, multi_query=True)["transformer.h.0.self_attention.query_key_value.weight"]
    assert split == Split(-2, (Part(32), Part(8, "whole"), Part(8, "whole")))
    assert split.spans(48, 2, 4) == ((16, 24), (32, 40), (40, 48))
    assert split.shared_spans(2, 4) == [(8, 16), (16, 24)]
    grouped = of("falcon", 2, new_decoder_architecture=True, num_kv_heads=2)
    assert grouped["transformer.h.0.self_attention.query_key_value.weight"] == Split(-2, (Part(64),))


def test_a_vocabulary_need_not_divide() -> None:
    split = of("llama", 4, vocab_size=67, num_key_value_heads=4)["model.embed_tokens.weight"]
    assert [split.shape((67, 32), rank, 4) for rank in range(4)] == [(16, 32), (17, 32), (17, 32), (17, 32)]


@pytest.mark.parametrize(
    ("model_type", "ranks", "changes", "words"),
    [
        (
            "llama",
            2,
            {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3},
            "is 2, by which this model's 9 attention heads do not divide; 1, 3 would work",
        ),
        ("llama", 4, {}, "2 key and value heads do not divide; 1, 2 would work"),
        ("llama", 4, {"num_key_value_heads": 4, "intermediate_size": 50}, "50 features of gate_proj"),
        ("llama", 2, {"vocab_size": 1}, "1 tokens of vocabulary"),
        ("qwen3_moe", 2, {"moe_intermediate_size": 25}, "25 features of experts"),
        ("opt", 2, {}, "how to cut a model of type 'opt' is not known here; set it to 1: ZeRO-3 shards every model"),
        ("falcon", 2, {"alibi": True}, "ALiBi covers all heads at once"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_would(
    model_type: str, ranks: int, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=r"^parallel\.tensor_parallel_size is") as caught:
        of(model_type, ranks, **changes)
    assert words in str(caught.value)


def test_every_family_in_the_tiny_models_is_decided() -> None:
    assert set(TINY) - set(CUT) == {"opt", "bloom"}
