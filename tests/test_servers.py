"""What servers demand of an adapter, and the commands that start them."""

import pytest

from lora_scale.spec.servers import SERVERS

LLAMA = ("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj")
PLAIN = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"], "bias": "none", "use_rslora": False}


def test_a_plain_adapter_is_served_by_all() -> None:
    for server, rules in SERVERS.items():
        assert rules.reasons(PLAIN, LLAMA, 8, "llama") == [], server


@pytest.mark.parametrize(
    ("server", "config", "modules", "rank", "model_type", "reason"),
    [
        ("vLLM", {}, LLAMA, 513, "llama", "it takes ranks up to 512, and this one has r = 513"),
        ("vLLM", {"use_dora": True}, LLAMA, 8, None, "it has no DoRA"),
        ("vLLM", {"modules_to_save": ["lm_head"]}, LLAMA, 8, None, "it takes no modules_to_save"),
        ("vLLM", {"trainable_token_indices": [3]}, LLAMA, 8, None, "it takes no trainable_token_indices"),
        ("vLLM", {"bias": "all"}, LLAMA, 8, None, "it leaves out trained biases"),
        ("vLLM", {"rank_pattern": {"q_proj": 4}}, LLAMA, 8, None, "rank_pattern and alpha_pattern are ignored"),
        ("vLLM", {}, ("h.0.attn.c_attn",), 8, "gpt2", "it has no LoRA for models of type gpt2"),
        ("SGLang", {"use_rslora": True}, LLAMA, 8, None, "it scales by lora_alpha / r"),
        ("SGLang", {"target_modules": "a|b"}, LLAMA, 8, None, "it takes target_modules as a list only"),
        ("SGLang", {}, ("h.0.attn.c_attn", "h.1.attn.c_attn"), 8, None, "it has no LoRA for layers named c_attn"),
    ],
)
def test_what_a_server_would_get_wrong_is_a_reason(
    server: str, config: dict, modules: tuple[str, ...], rank: int, model_type: str | None, reason: str
) -> None:
    (found,) = SERVERS[server].reasons(PLAIN | config, modules, rank, model_type)
    assert reason in found


@pytest.mark.parametrize(("r", "limit"), [(1, 8), (8, 8), (9, 16), (300, 320), (512, 512)])
def test_vllm_is_told_a_rank_that_it_takes(r: int, limit: int) -> None:
    command = SERVERS["vLLM"].command("org/base", "mine=adapters/mine", r)
    assert command == f"vllm serve org/base --enable-lora --max-lora-rank {limit} --lora-modules mine=adapters/mine"
