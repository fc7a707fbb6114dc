"""PiSSA (https://arxiv.org/abs/2404.02948): training begins at the weight's principal components. One process.

The paper takes them out of the base, W_res = W - s B0 A0, and trains y = W_res x + s B A x. Here the base stays as it
is and the layer computes the same by other terms, y = W x + s (B A - B0 A0) x: a LoRA of rank 2r of which half is
frozen, [B, -B0] [A; A0]. So the base's files, fingerprint and shards are those of any run, and an adapter is written in
this wide form, which is PEFT's own for a PiSSA adapter on the original base: every reader takes it as plain LoRA.
"""

from collections.abc import Mapping
from hashlib import blake2b

import torch
from torch import Tensor

from lora_scale.adapters.lora import LoRALinear
from lora_scale.spec.config import LoraConfig
from lora_scale.spec.errors import ConfigError


def components(weight: Tensor, r: int, scaling: float, how: int | str, seed: int, name: str) -> tuple[Tensor, Tensor]:
    """A0 (r, in) and B0 (out, r) with scaling * B0 A0 the best rank-r part of `weight` (out, in), fp32.

    `how` is "full", a whole decomposition, or a number of subspace iterations. A function of the arguments and the
    kind of device; the numbers are PEFT's, but for the signs of pairs of vectors.
    """
    if r > min(weight.shape):
        raise ConfigError(f"lora.r is {r}, but {name} is {tuple(weight.shape)}: it has no so many components")
    weight = weight.float()
    if how == "full":
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        left, values, right = left[:, :r], values[:r], right[:r]
    else:
        digest = blake2b(f"{seed}/{name}/pissa".encode(), digest_size=8).digest()
        with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
            torch.manual_seed(int.from_bytes(digest, "little"))
            left, values, columns = torch.svd_lowrank(weight, q=r, niter=int(how))
        right = columns.T
    roots = (values / scaling).sqrt()
    return roots[:, None] * right, left * roots


def widened_config(cfg: LoraConfig) -> LoraConfig:
    """The `lora` section of the wide form: twice the rank, the same scaling."""
    if cfg.pissa is None:
        return cfg
    more = 2**0.5 if cfg.use_rslora else 2.0
    return cfg.model_copy(
        update={
            "r": 2 * cfg.r,
            "lora_alpha": more * cfg.lora_alpha,
            "rank_pattern": {pattern: 2 * r for pattern, r in cfg.rank_pattern.items()},
            "alpha_pattern": {pattern: more * alpha for pattern, alpha in cfg.alpha_pattern.items()},
        }
    )


def widened_shape(layers: Mapping[str, LoRALinear], parameter: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the trainable tensor `parameter` in files."""
    layer = _with_start(layers, parameter)
    if layer is None:
        return shape
    return (2 * shape[0], shape[1]) if parameter.endswith(".lora_A") else (shape[0], 2 * shape[1])


def widened(layers: Mapping[str, LoRALinear], parameter: str, value: Tensor) -> Tensor:
    """A whole trainable tensor as it stands in files, on the rank that keeps the whole start."""
    layer = _with_start(layers, parameter)
    if layer is None:
        return value
    assert layer.whole_start is not None, "only the rank that writes knows the whole start"
    a, b = layer.whole_start
    return torch.cat([value, a]) if parameter.endswith(".lora_A") else torch.cat([value, -b], 1)


def narrowed(layers: Mapping[str, LoRALinear], parameter: str, value: Tensor) -> Tensor:
    """What trains of a tensor in files."""
    layer = _with_start(layers, parameter)
    if layer is None:
        return value
    return value[: layer.r] if parameter.endswith(".lora_A") else value[:, : layer.r].contiguous()


def start_in(factors: Mapping[str, Tensor], module: str, r: int) -> tuple[Tensor, Tensor]:
    """A0 and B0 of a module out of the wide factors of a checkpoint."""
    return factors[f"{module}.lora_A"][r:].clone(), -factors[f"{module}.lora_B"][:, r:].contiguous()


def _with_start(layers: Mapping[str, LoRALinear], parameter: str) -> LoRALinear | None:
    layer = layers.get(parameter.rpartition(".")[0])
    return layer if layer is not None and layer.start_A is not None else None
