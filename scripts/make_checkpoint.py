#!/usr/bin/env python3
"""Write a Llama-shaped checkpoint of random weights, as a folder from the hub: several safetensors files and an index,
and a tokenizer that only has the right number of ids: it is for rows that are token ids already.

    python scripts/make_checkpoint.py 8b /dev/shm/llama-7.2b
    python scripts/make_checkpoint.py 100b /dev/shm/slice --layers 30
    python scripts/make_checkpoint.py 100b /tmp/llama-100.7b --only q_proj v_proj

Needs numpy and this repository, neither torch nor transformers. Every element is random, so that no two slices of a
tensor are equal and a rank that reads the wrong one is found out. Values are (+-)[2^-9, 2^-5), standard deviation
0.014; norms are in [1, 1.12). The same arguments give the same bytes, whatever the number of files. With --only, the
other tensors are holes in files of full size: they read as zeros and take no room on a disk.
"""

import argparse
import json
import os
import sys
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from math import prod
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lora_scale.storage.weights import ITEMSIZES, header_bytes, write_safetensors

Shape = tuple[int, ...]

PRESETS = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embeddings
    "tiny": (256, 688, 4, 8, 4, 1024, False),
    "135m": (576, 1536, 30, 9, 3, 49152, True),
    "1b": (2048, 8192, 16, 32, 8, 32000, False),
    "8b": (4096, 14336, 32, 32, 8, 32000, False),
    "8b-128k": (4096, 14336, 32, 32, 8, 128256, False),
    "13b": (5120, 13824, 40, 40, 40, 32000, False),
    "30b": (6656, 17920, 60, 52, 52, 32000, False),
    "70b": (8192, 28672, 80, 64, 8, 32000, False),
    "100b": (10240, 28672, 90, 80, 8, 32000, False),
}

# dtype: (unsigned integer, bits of the mantissa, the bits of 2^-9 and of 1.0)
FORMATS = {
    "BF16": (np.uint16, 7, (127 - 9) << 7, 127 << 7),
    "F16": (np.uint16, 10, (15 - 9) << 10, 15 << 10),
    "F32": (np.uint32, 23, (127 - 9) << 23, 127 << 23),
}
TORCH_NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def parameters(preset: str, n_layers: int) -> dict[str, Shape]:
    """Names and shapes as transformers' LlamaForCausalLM has them, in the order of its state dict."""
    hidden, intermediate, _, heads, kv_heads, vocabulary, tied = PRESETS[preset]
    kv = hidden // heads * kv_heads
    layer = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "mlp.gate_proj.weight": (intermediate, hidden),
        "mlp.up_proj.weight": (intermediate, hidden),
        "mlp.down_proj.weight": (hidden, intermediate),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    result: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(n_layers):
        result |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    result["model.norm.weight"] = (hidden,)
    return result if tied else {**result, "lm_head.weight": (vocabulary, hidden)}


def config(preset: str, n_layers: int, dtype: str) -> dict[str, object]:
    hidden, intermediate, _, heads, kv_heads, vocabulary, tied = PRESETS[preset]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": n_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": TORCH_NAMES[dtype],
    }


def tokenizer(vocabulary: int) -> dict[str, object]:
    """tokenizer.json of one word for each id."""
    words = {f"<{number}>": number for number in range(vocabulary)}
    return {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": words, "unk_token": "<0>"}}


def values(name: str, shape: Shape, dtype: str) -> np.ndarray:
    """Random elements as raw bits, seeded by the name: sign, mantissa, and the lowest two bits of the exponent."""
    unsigned, mantissa, small, one = FORMATS[dtype]
    sign = 1 << (8 * ITEMSIZES[dtype] - 1)
    generator = np.random.Generator(np.random.SFC64(zlib.crc32(name.encode())))
    raw = np.frombuffer(generator.bytes(prod(shape) * ITEMSIZES[dtype]), unsigned).copy()
    if len(shape) == 1:
        raw &= (1 << (mantissa - 3)) - 1  # below 2^-3
        raw |= one
    else:
        raw &= sign | ((1 << (mantissa + 2)) - 1)
        raw += unsigned(small)  # adds to the exponent and never reaches the sign
    return raw


def write_file(job: tuple[Path, dict[str, Shape], str, list[str] | None]) -> None:
    path, shapes, dtype, only = job
    specs = [(name, dtype, shape) for name, shape in shapes.items()]
    path.unlink(missing_ok=True)
    if only is None:
        tensors = (memoryview(values(name, shape, dtype)) for name, shape in shapes.items())
        return write_safetensors(path, specs, tensors, {"format": "pt"})
    ends = tuple(f"{module}.weight" for module in only)
    with path.open("wb") as file:
        file.write(header_bytes(path, specs, {"format": "pt"}))
        for name, shape in shapes.items():
            if name.endswith(ends):
                file.write(values(name, shape, dtype))
            else:
                file.seek(prod(shape) * ITEMSIZES[dtype], os.SEEK_CUR)
        file.truncate(file.tell())


def split(shapes: dict[str, Shape], n_files: int) -> list[dict[str, Shape]]:
    """Runs of about equal size, none of them empty."""
    total = sum(map(prod, shapes.values()))
    groups: list[dict[str, Shape]] = [{}]
    done = 0
    for left, (name, shape) in zip(range(len(shapes), 0, -1), shapes.items(), strict=True):
        missing = n_files - len(groups)
        if groups[-1] and missing and (done >= total * len(groups) / n_files or left <= missing):
            groups.append({})
        groups[-1][name] = shape
        done += prod(shape)
    return groups


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, help="decoder layers (default: the preset's)")
    parser.add_argument("--dtype", choices=FORMATS, default="BF16")
    parser.add_argument("--files", type=int, help="weight files (default: one for each 4 GB, at least 2)")
    parser.add_argument("--jobs", type=int, default=8, help="processes; each holds one tensor at a time")
    parser.add_argument("--only", nargs="+", metavar="MODULE", help="write these (q_proj v_proj); the rest are holes")
    args = parser.parse_args(arguments)
    start = time.perf_counter()
    n_layers = args.layers or PRESETS[args.preset][2]
    shapes = parameters(args.preset, n_layers)
    numel = sum(map(prod, shapes.values()))
    nbytes = numel * ITEMSIZES[args.dtype]
    groups = split(shapes, args.files or max(2, round(nbytes / 4e9)))
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = ["model.safetensors"]
    args.folder.mkdir(parents=True, exist_ok=True)
    jobs = [(args.folder / name, group, args.dtype, args.only) for name, group in zip(names, groups, strict=True)]
    if args.jobs == 1:
        list(map(write_file, jobs))
    else:
        with ProcessPoolExecutor(args.jobs) as pool:
            list(pool.map(write_file, jobs))
    if len(groups) > 1:
        weight_map = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
        index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
        (args.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (args.folder / "config.json").write_text(json.dumps(config(args.preset, n_layers, args.dtype), indent=2))
    (args.folder / "tokenizer.json").write_text(json.dumps(tokenizer(PRESETS[args.preset][5])))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<0>", "eos_token": "<2>", "pad_token": "<2>"}
    (args.folder / "tokenizer_config.json").write_text(json.dumps(words))
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({"parameters": numel, "bytes": nbytes, "files": len(names), "seconds": seconds}))


if __name__ == "__main__":
    main()
