"""Which matrices of a base are stored as fp8 blocks, and where their scales are: DeepSeek's and Qwen's form.

`W` is F8_E4M3 and `W_scale_inv` has one scale, to be multiplied with, for each block of `weight_block_size` elements
(config.json, quantization_config). Tensors that are stored plain in such a folder stay plain. Headers and names only;
the arithmetic is `adapters.fp8`'s.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from lora_scale.spec.errors import ModelError
from lora_scale.spec.layout import Blocks, TensorEntry

FP8 = "F8_E4M3"
SUFFIX = "_scale_inv"
SCALE_DTYPES = ("F32", "BF16")


def quantisation(config: Mapping[str, Any]) -> Any:
    """What config.json says of it, also where the language model's config is a part of it; None or empty: nothing."""
    text = config.get("text_config")
    return config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)


def block_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block, where config.json tells of fp8 in blocks."""
    found = quantisation(config)
    if not isinstance(found, dict) or found.get("quant_method") != "fp8" or found.get("fmt", "e4m3") != "e4m3":
        return None
    size = found.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2 or not all(type(n) is int and n > 0 for n in size):
        return None
    return size[0], size[1]


def with_scales(tensors: Mapping[str, TensorEntry], size: tuple[int, int]) -> dict[str, TensorEntry]:
    """The same tensors, those in fp8 with their scales; ModelError where these are missing or do not fit."""
    return {
        name: replace(entry, blocks=_blocks(entry, tensors.get(name + SUFFIX), size)) if entry.dtype == FP8 else entry
        for name, entry in tensors.items()
    }


def _blocks(entry: TensorEntry, scales: TensorEntry | None, size: tuple[int, int]) -> Blocks:
    if len(entry.shape) != 2:
        raise ModelError(f"{entry.file}: {entry.name} is fp8 and no matrix but {entry.shape}; use its bf16 release")
    if scales is None:
        raise ModelError(f"{entry.file}: {entry.name} is fp8, but there is no {entry.name}{SUFFIX}; download it again")
    if scales.dtype not in SCALE_DTYPES:
        known = " or ".join(SCALE_DTYPES)
        raise ModelError(f"{scales.file}: {scales.name} is {scales.dtype}, not {known}; use its bf16 release")
    needed = -(-entry.shape[0] // size[0]), -(-entry.shape[1] // size[1])
    if scales.shape != needed:
        raise ModelError(
            f"{scales.file}: {scales.name} has shape {scales.shape}, but {entry.name} {entry.shape} in blocks of "
            f"{size[0]} x {size[1]} needs {needed}; config.json belongs to another model"
        )
    return Blocks(scales, *size)
