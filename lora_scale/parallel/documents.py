"""Causal attention within each document of a block (`model.attention: documents`): no mask is made or kept, and nothing
is computed between documents.

transformers asks for it by `NAME`, for which it makes no masks. Where documents begin is told on the host before each
pass, so nothing waits for the device; transformers' own look for packed documents does, once a pass. On a Hopper GPU
with FlashAttention-3 at hand that computes it (`parallel/flash3.py`). On others several documents are one call of
torch's flash kernel (its `cu_seqlens`), and a document a row is torch's `scaled_dot_product_attention`, whichever
kernel that takes; elsewhere documents are taken one after the other.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_scale.parallel import flash3
from lora_scale.spec.config import RunConfig

NAME = "lora_scale_documents"
FLASH = range(8, 257, 8)  # features of a head that flash kernels take
AMPERE = (8, 0)  # the least compute capability that they take


@dataclass(frozen=True, slots=True)
class Batch:
    """Where documents are in the micro-batch under way."""

    starts: list[list[int]]  # for each row, the first token of each document, and the end
    longest: int
    cuts: Tensor | None  # int32: the same for all rows laid end to end, on the device; None where no kernel asks for it

    @property
    def is_whole(self) -> bool:
        """Whether each row is one document."""
        return all(len(starts) == 2 for starts in self.starts)


_told: list[Batch] = []  # the last


def prepare() -> str:
    """The name to give to transformers, which knows it from then on."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)
    return NAME


def kernel(cfg: RunConfig, device: torch.device) -> str:
    """`model.attention`, and for documents what computes it on this device: for the manifest."""
    if cfg.model.attention != "documents":
        return cfg.model.attention
    source = None if cfg.precision == "fp32" or cfg.model.dropout else flash3.found(device)
    return f"documents, by FlashAttention-3 of {source}" if source else "documents, by torch"


def tell(position_ids: np.ndarray, device: torch.device) -> None:
    """The micro-batch that comes, (rows, tokens): positions begin again at 0 in each document. It holds until the
    backward pass is over: recomputed layers ask again."""
    tokens = position_ids.shape[1]
    starts = [[*np.flatnonzero(row == 0).tolist(), tokens] for row in position_ids]
    longest = max(end - start for row in starts for start, end in pairwise(row))
    ends = [row * tokens + end for row, its in enumerate(starts) for end in its[1:]]
    cuts = None
    if device.type == "cuda" and len(ends) > len(starts) and torch.cuda.get_device_capability(device) >= AMPERE:
        cuts = torch.tensor([0, *ends], dtype=torch.int32, pin_memory=True).to(device, non_blocking=True)
    _told[:] = [Batch(starts, longest, cuts)]


@contextmanager
def with_masks(model: nn.Module) -> Iterator[None]:
    """Inside, transformers' masks and torch's attention: for generation, which pads rows and keeps keys."""
    config: Any = model.config
    if config._attn_implementation != NAME:
        yield
        return
    config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        config._attn_implementation = NAME


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: query (rows, heads, tokens, features), key and value with as many heads or fewer ->
    (rows, tokens, heads, features)."""
    (batch,) = _told
    rows, tokens = len(query), query.shape[2]
    assert attention_mask is None and len(batch.starts) == rows and key.shape[2] == tokens, "told of another batch"
    window = sliding_window if sliding_window and sliding_window < batch.longest else None
    takes = query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] in FLASH
    if takes and not dropout and flash3.found(query.device):
        return _hopper(query, key, value, scaling, window, batch), None
    if batch.is_whole:
        return _within(query, key, value, dropout, scaling, window), None
    if batch.cuts is not None and takes:
        return _flash(query, key, value, dropout, scaling, window, batch), None
    found = []
    for row, starts in enumerate(batch.starts):
        pieces = []
        for start, end in pairwise(starts):
            q, k, v = (t[row : row + 1, :, start:end] for t in (query, key, value))
            pieces.append(_within(q, k, v, dropout, scaling, window))
        found.append(torch.cat(pieces, 1))
    return torch.cat(found), None


def _within(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, window: int | None
) -> Tensor:
    """One document a row."""
    tokens = query.shape[2]
    band = None
    if window is not None and tokens > window:
        age = torch.arange(tokens, device=query.device)[:, None] - torch.arange(tokens, device=query.device)
        band = (age >= 0) & (age < window)
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=band,
        dropout_p=dropout,
        is_causal=band is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2)


def _flash(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None, window: int | None, batch: Batch
) -> Tensor:
    """All documents of all rows end to end."""
    rows, tokens = len(query), query.shape[2]
    flat = [_end_to_end(t) for t in (query, key, value)]
    sizes = (batch.cuts, batch.cuts, batch.longest, batch.longest)
    before = None if window is None else window - 1
    more: dict[str, Any] = {"scale": scaling, "window_size_left": before, "window_size_right": None}
    out, *_ = torch.ops.aten._flash_attention_forward(*flat, *sizes, dropout, True, False, **more)
    return out.view(rows, tokens, *out.shape[1:])


def _hopper(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, batch: Batch
) -> Tensor:
    """All documents of all rows, by FlashAttention-3."""
    lay = _end_to_end if batch.cuts is not None else _by_token
    how = flash3.How(query.shape[-1] ** -0.5 if scaling is None else scaling, window, batch.cuts, batch.longest)
    out = flash3.attend(lay(query), lay(key), lay(value), how)
    return out.view(len(query), query.shape[2], *out.shape[-2:])


def _by_token(heads: Tensor) -> Tensor:
    """(rows, heads, tokens, features) -> (rows, tokens, heads, features)."""
    return heads.transpose(1, 2)


def _end_to_end(heads: Tensor) -> Tensor:
    """(rows, heads, tokens, features) -> (rows * tokens, heads, features)."""
    return heads.transpose(1, 2).flatten(0, 1)
