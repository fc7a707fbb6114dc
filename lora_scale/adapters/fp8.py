"""Matrices stored as fp8 (e4m3) with one scale for each block of 128 x 128 elements, DeepSeek's and Qwen's form.

An element's value is its e4m3 value, which fp32 holds exactly, times its block's scale, multiplied in fp32; whoever
keeps it in bf16 rounds that product. Those are the bits of DeepSeek-V3's `weight_dequant` (inference/kernel.py, where
the last block of a row or column may be cut) and of transformers' `Fp8Dequantize` (which needs whole blocks).
"""

import torch
from torch import Tensor

from lora_scale.spec.layout import TensorEntry
from lora_scale.storage.weights import Reader

SCALE_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


def read_scales(reader: Reader, entry: TensorEntry, start: int, stop: int) -> Tensor:
    """The rows of scales that elements [start, stop) of the flattened matrix need: fp32, (block rows, columns)."""
    assert entry.blocks is not None
    source = entry.blocks.scale_bytes(entry.shape[1], start, stop)
    raw = bytearray(source.length)
    reader.read_into(source, raw)
    scales = torch.frombuffer(raw, dtype=SCALE_DTYPES[source.dtype]).float()
    return scales.view(-1, entry.blocks.scales.shape[1])


def dequantised(values: Tensor, entry: TensorEntry, start: int, scales: Tensor) -> Tensor:
    """Elements [start, start + n) of the flattened matrix in fp32, flat; `values` are n fp8, `scales` their rows."""
    assert entry.blocks is not None
    columns = entry.shape[1]
    first, last = start // columns, (start + len(values) - 1) // columns + 1
    above, _ = entry.blocks.touched(columns, start, start + len(values))
    wide = scales.repeat_interleave(entry.blocks.columns, dim=1)[:, :columns]
    rows = torch.arange(first, last, device=scales.device) // entry.blocks.rows - above
    factors = wide[rows].view(-1).narrow(0, start - first * columns, len(values))
    return values.float() * factors
