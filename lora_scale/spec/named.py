"""Well-known shapes by name, each as the config.json that transformers would read. Sizes only: no weights, no files."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from lora_scale.spec.errors import UsageError


def _llama(
    hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    sizes = {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }
    return sizes | more


def _gpt2(hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"model_type": "gpt2", "n_embd": hidden, "n_layer": layers, "n_head": heads}
    return sizes | {"n_positions": 1024, "vocab_size": 50257} | more


def _falcon(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "falcon",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_kv_heads": 8,
        "new_decoder_architecture": True,
        "vocab_size": 65024,
    }


SHAPES: dict[str, dict[str, Any]] = {
    # GPT-2's class at GPT-3's sizes: 174.60B with tied embeddings; the LoRA paper says 175,255.8M. q, k and v are
    # square matrices of their own here, as the paper counts them; a GPT-2 folder has them fused in c_attn.
    "gpt3-175b": _gpt2(12288, 96, 96, n_positions=2048, model_type="gpt3"),
    "gpt2-small": _gpt2(768, 12, 12),
    "gpt2-medium": _gpt2(1024, 24, 16),
    "gpt2-large": _gpt2(1280, 36, 20),
    "gpt2-xl": _gpt2(1600, 48, 25),
    "smollm2-135m": _llama(576, 1536, 30, 9, 3, 49152, tie_word_embeddings=True),
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128256),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, 8, 128256),
    "llama-3.1-405b": _llama(16384, 53248, 126, 128, 8, 128256),
    "qwen2.5-72b": _llama(8192, 29568, 80, 64, 8, 152064, model_type="qwen2"),
    "mistral-7b": _llama(4096, 14336, 32, 32, 8, 32000, model_type="mistral"),
    "mistral-large-123b": _llama(12288, 28672, 88, 96, 8, 32768, model_type="mistral", head_dim=128),
    "falcon-40b": _falcon(8192, 60, 128),
    "falcon-180b": _falcon(14848, 80, 232),
    "bloom-176b": {"model_type": "bloom", "hidden_size": 14336, "n_layer": 70, "n_head": 112, "vocab_size": 250880},
    "opt-175b": {
        "model_type": "opt",
        "hidden_size": 12288,
        "ffn_dim": 49152,
        "num_hidden_layers": 96,
        "num_attention_heads": 96,
        "max_position_embeddings": 2048,
        "word_embed_proj_dim": 12288,
        "vocab_size": 50272,
    },
    "mixtral-8x22b": _llama(
        6144, 16384, 56, 48, 8, 32000, model_type="mixtral", num_local_experts=8, num_experts_per_tok=2
    ),
    "qwen3-235b-a22b": _llama(
        4096,
        12288,
        94,
        64,
        4,
        151936,
        model_type="qwen3_moe",
        head_dim=128,
        moe_intermediate_size=1536,
        num_experts=128,
        num_experts_per_tok=8,
    ),
    # This project's benchmark checkpoints: Llama-shaped, random weights, vocabulary 32k.
    "llama-1.1b": _llama(2048, 8192, 16, 32, 8, 32000),
    "llama-7.2b": _llama(4096, 14336, 32, 32, 8, 32000),
    "llama-32.5b": _llama(6656, 17920, 60, 52, 52, 32000),
    "llama-100.7b": _llama(10240, 28672, 90, 80, 8, 32000),
    "slice-34.0b": _llama(10240, 28672, 30, 80, 8, 32000),
    "slice-22.9b": _llama(10240, 28672, 20, 80, 8, 32000),
}


def shape(name: str) -> Mapping[str, Any]:
    """The config of a named shape; UsageError with the names there are."""
    if name not in SHAPES:
        close = get_close_matches(name, SHAPES, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}? All: " if close else "choose one of "
        raise UsageError(f"--shape is {name!r}, which is not known; {hint}{', '.join(SHAPES)}")
    return SHAPES[name]
