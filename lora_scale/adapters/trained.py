"""Parts of the base that train beside the factors: biases and whole modules (PEFT's bias and modules_to_save).

They are the base's own parameters, made fp32 on the meta device and so filled in fp32; their layers cast them for
compute. One process; ZeRO shards them as it does the base, and reduces their gradients as in full fine-tuning. What
tensor parallelism must know is `share`: of a layer whose outputs are summed over ranks, one rank adds the bias.
"""

import difflib
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_scale.adapters import tokens
from lora_scale.adapters.frozen import FrozenMatmul
from lora_scale.adapters.lora import LoRALinear, file_name
from lora_scale.spec.config import LoraConfig
from lora_scale.spec.errors import CheckpointError, ConfigError
from lora_scale.spec.families import has_suffix


class BiasedLinear(nn.Linear):
    """A frozen weight and a bias that trains."""

    share = 1.0  # of the bias that this rank adds

    def forward(self, input: Tensor) -> Tensor:
        assert self.bias is not None
        return FrozenMatmul.apply(input, self.weight, None, False, None) + self.share * self.bias.to(input.dtype)


class BiasedConv1D(nn.Module):
    """transformers' Conv1D (weight (in, out)), frozen, with a bias that trains."""

    weight: nn.Parameter
    bias: nn.Parameter
    share = 1.0  # of the bias that this rank adds

    def forward(self, x: Tensor) -> Tensor:
        return FrozenMatmul.apply(x, self.weight, None, True, None) + self.share * self.bias.to(x.dtype)


class BiasedLayerNorm(nn.LayerNorm):
    """A frozen weight and a bias that trains."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, None, self.eps) + self.bias.to(input.dtype)


class TrainedLinear(nn.Linear):
    """All of it trains."""

    share = 1.0  # of the bias that this rank adds

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.share * self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class TrainedEmbedding(nn.Embedding):
    """All of it trains; what it gives has the base's dtype."""

    compute_dtype: torch.dtype

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(self.compute_dtype)


_BIASED: dict[str, Any] = {"Linear": BiasedLinear, "Conv1D": BiasedConv1D, "LayerNorm": BiasedLayerNorm}
_WHOLE: dict[str, Any] = {"Linear": TrainedLinear, "Embedding": TrainedEmbedding}


def mark(model: nn.Module, cfg: LoraConfig, layers: Mapping[str, LoRALinear]) -> None:
    """Make what `cfg.bias` and `cfg.modules_to_save` name train, in place.

    To be called on an adapted model, before its linear layers are frozen. ConfigError for what is not there, is
    adapted, shares its weight with another module, or is of a kind that is not cast here.
    """
    whole = _modules_to_save(model, cfg, layers)
    biased = _biased(model, cfg, layers) - whole.keys()
    for name, module in model.named_modules():
        if name in whole:
            _train(module, list(module._parameters), name, _WHOLE)
        elif name in biased:
            _train(module, ["bias"], name, _BIASED)


def parameters(model: nn.Module) -> dict[str, nn.Module]:
    """What of the base trains, by parameter name, each with its module."""
    kinds = (*_BIASED.values(), *_WHOLE.values())
    return {
        f"{name}.{key}": module
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        for key, parameter in module._parameters.items()
        if parameter is not None and parameter.requires_grad
    }


def _biased(model: nn.Module, cfg: LoraConfig, layers: Mapping[str, LoRALinear]) -> set[str]:
    """Names of the modules whose bias trains."""
    if cfg.bias == "none":
        return set()
    adapted = {f"{name}.base_layer" for name in layers}
    found = {
        name
        for name, module in model.named_modules()
        if module._parameters.get("bias") is not None and (cfg.bias == "all" or name in adapted)
    }
    if not found:
        where = "no layer of this model" if cfg.bias == "all" else "no adapted layer of this model"
        raise ConfigError(f"lora.bias is {cfg.bias}, but {where} has a bias; set lora.bias=none")
    return found


def _modules_to_save(model: nn.Module, cfg: LoraConfig, layers: Mapping[str, LoRALinear]) -> dict[str, nn.Module]:
    modules = {name: module for name, module in model.named_modules() if name}
    found: dict[str, nn.Module] = {}
    for entry in cfg.modules_to_save:
        hits = {name: module for name, module in modules.items() if has_suffix(name, (entry,))}
        if not hits:
            ends = {name.rpartition(".")[2] for name, module in modules.items() if type(module).__name__ in _WHOLE}
            close = difflib.get_close_matches(entry, ends, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"lora.modules_to_save has {entry!r}, which matches no module{hint}")
        found |= hits
    owners: dict[int, str] = {}
    for name, module in modules.items():
        for parameter in module._parameters.values():
            other = owners.setdefault(id(parameter), name)
            if parameter is not None and other != name and {other, name} & found.keys():
                raise ConfigError(
                    f"lora.modules_to_save names {name if name in found else other}, which shares its weight with "
                    f"{other if name in found else name}; leave it out"
                )
    for name in found:
        if name in layers:
            raise ConfigError(f"lora.modules_to_save names {name}, which lora.target_modules adapts; leave one out")
        if tokens.NAME in modules[name]._modules:
            raise ConfigError(
                f"lora.modules_to_save names {name}, of which lora.trainable_token_indices has rows; leave one out"
            )
    return found


def _train(module: nn.Module, keys: list[str], name: str, kinds: Mapping[str, Any]) -> None:
    """Make these parameters of a module, where it has them, fp32 and trainable, and have it cast them."""
    kind = type(module).__name__
    if kind not in kinds:
        raise ConfigError(
            f"{name} is a {kind}, which cannot train here; {', '.join(kinds)} can: see lora.bias and "
            "lora.modules_to_save"
        )
    for key in keys:
        given = module._parameters[key]
        if given is None:
            continue
        if kind == "Embedding":
            module.compute_dtype = given.dtype  # type: ignore[assignment]
        module._parameters[key] = nn.Parameter(given.detach().to(torch.float32), requires_grad=True)
    module.__class__ = kinds[kind]


def restore(model: nn.Module, others: Mapping[str, Tensor]) -> None:
    """Copy the parts of the base that an adapter brings into a model, by their names in it; CheckpointError where one
    is not there or has another shape."""
    named = {file_name(name): parameter for name, parameter in model.named_parameters()}
    for name, value in others.items():
        parameter = named.get(file_name(name))
        if parameter is None or parameter.shape != value.shape:
            what = "does not have" if parameter is None else f"has as {tuple(parameter.shape)}"
            raise CheckpointError(f"the adapter brings {name} {tuple(value.shape)}, which this model {what}")
        with torch.no_grad():
            parameter.copy_(value)
