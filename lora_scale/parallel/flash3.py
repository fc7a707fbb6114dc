"""FlashAttention-3, kernels for Hopper, by the operators that its builds register: flash-attn-3's own build, or the one
in xformers 0.0.34 (torch's stable interface: any torch from 2.10). For `parallel/documents.py`."""

import importlib.util
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PLACES = ("flash_attn_3", "xformers/flash_attn_3")  # of the library, beneath a place where Python finds packages
HOPPER = (9, 0)  # compute capability


@cache
def found(device: torch.device) -> str | None:
    """The package whose library serves this device, loaded; None where there is none."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != HOPPER:
        return None
    for place in PLACES:
        package, *rest = place.split("/")
        spec = importlib.util.find_spec(package)
        for folder in (spec and spec.submodule_search_locations) or ():
            for file in sorted(Path(folder, *rest).glob("_C*.so")):
                try:
                    torch.ops.load_library(str(file))
                except OSError as error:  # built for another torch or CUDA
                    warnings.warn(f"{file} cannot be loaded, so torch's attention is used: {error}", stacklevel=2)
                    continue
                return package
    return None


@dataclass(frozen=True, slots=True)
class How:
    """What goes with the heads."""

    scaling: float  # of scores
    window: int | None  # tokens that are seen, itself included
    cuts: Tensor | None  # int32: where documents laid end to end begin, and the end
    longest: int  # tokens of the longest document

    def words(self) -> dict[str, Any]:
        """As the operators have them."""
        left = -1 if self.window is None else self.window - 1
        found = {"softmax_scale": self.scaling, "is_causal": True, "window_size_left": left}
        if self.cuts is None:
            return found
        cuts, longest = self.cuts, self.longest
        return found | {"cu_seqlens_q": cuts, "cu_seqlens_k": cuts, "max_seqlen_q": longest, "max_seqlen_k": longest}


def attend(query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
    """Causal attention in 16 bits. query (rows, tokens, heads, features), with cuts (tokens, heads, features); key and
    value the same, with as many heads or fewer -> the shape of query."""
    out: Tensor = _Attend.apply(query, key, value, how)
    return out


class _Attend(torch.autograd.Function):
    """The operators, with a gradient."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        out, sums, *_ = torch.ops.flash_attn_3.fwd(query, key, value, num_splits=1, **how.words())
        ctx.save_for_backward(query, key, value, out, sums)
        ctx.how = how
        found: Tensor = out
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.ops.flash_attn_3.bwd(grads[0].contiguous(), *ctx.saved_tensors, **ctx.how.words())
        return (*found[:3], None)
