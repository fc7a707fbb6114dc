"""Tiny random models as Hugging Face folders: several weight files, and a tokenizer of the same vocabulary."""

from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_model
from tiny_tokenizer import write_tokenizer

VOCAB = 96
TOKENS = {"vocab_size": VOCAB, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 2}
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt2", "falcon")


def tiny_folder(
    folder: Path, model_type: str = "llama", dtype: torch.dtype = torch.bfloat16, files: int = 3, **config: Any
) -> Path:
    """Save a `tiny_model` with weights of `dtype` in at least `files` files; `config` overrides its config.json."""
    model = tiny_model(model_type, **{**TOKENS, **config}).to(dtype)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(folder, max_shard_size=total // files)
    assert len(list(folder.glob("*.safetensors"))) >= files
    return write_tokenizer(folder, model.config.vocab_size)
