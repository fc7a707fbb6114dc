"""The other methods of the LoRA paper's Tables 4 and 15 as modules of one process, on the same frozen base as LoRA.

Knows no process group and no file. Each module holds its base in `base_layer`, so that the base's tensors are found in
its files as ever, and has fp32 parameters that are cast for compute. What PEFT has of these would not do here: its
prompt tuning puts vectors before a batch's rows, not before each of the documents in a block, and its prefix tuning
trains keys and values, not the activations that the paper's PreLayer replaces.

    bitfit     every linear layer's bias, and the norms' where they have one; a layer without a bias gets one of zeros
    preembed   vectors in the place of the first positions of each document, before the first decoder layer
    prelayer   the same before every decoder layer
    adapter-h  bottlenecks after attention and after the MLP, each before the residual sum (arXiv 1902.00751)
    adapter-l  a layer norm and a bottleneck after the MLP (arXiv 2004.03829)
    lora+preembed, lora+prelayer   LoRA's factors, begun as LoRA's own are, and the vectors
"""

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_scale.adapters.lora import adapt
from lora_scale.adapters.targets import features, is_linear
from lora_scale.spec import baselines
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError, ModelError
from lora_scale.spec.families import has_suffix

BOTTLENECK_STD = 1e-2  # both matrices, cut at two deviations: nearly the identity at first (arXiv 1902.00751)
EPS = 1e-5  # of adapter-l's layer norm, torch's default


class Shift(nn.Module):
    """y = base(x) + shift: the base's own bias stays frozen, and what trains is added to it."""

    def __init__(self, base_layer: nn.Module, width: int):
        super().__init__()
        self.base_layer = base_layer
        self.shift = _zeros(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        return y + self.shift.to(y.dtype)


class Bottleneck(nn.Module):
    """y = base(x), then y + up(activation(down(y))); with a norm before `down` for adapter-l, which then uses ReLU."""

    def __init__(self, base_layer: nn.Module, name: str, hidden: int, width: int, norm: bool, seed: int):
        super().__init__()
        self.base_layer = base_layer
        self.down = _drawn((width, hidden), BOTTLENECK_STD, seed, f"{name}.down")
        self.down_bias = _zeros(width)
        self.up = _drawn((hidden, width), BOTTLENECK_STD, seed, f"{name}.up")
        self.up_bias = _zeros(hidden)
        self.norm_weight = nn.Parameter(_zeros(hidden).data + 1.0) if norm else None
        self.norm_bias = _zeros(hidden) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        h = y
        if self.norm_weight is not None and self.norm_bias is not None:
            h = F.layer_norm(y, y.shape[-1:], self.norm_weight.to(y.dtype), self.norm_bias.to(y.dtype), EPS)
        h = F.linear(h, self.down.to(y.dtype), self.down_bias.to(y.dtype))
        h = F.gelu(h) if self.norm_weight is None else F.relu(h)
        return y + F.linear(h, self.up.to(y.dtype), self.up_bias.to(y.dtype))


class Prefixed(nn.Module):
    """A decoder layer whose input at a document's first positions is replaced by trained vectors.

    The data puts as many placeholders before each document; positions start again with each document of a block.
    """

    def __init__(self, base_layer: nn.Module, name: str, hidden: int, tokens: int, std: float, seed: int):
        super().__init__()
        self.base_layer = base_layer
        self.prefix = _drawn((tokens, hidden), std, seed, f"{name}.prefix")
        if hasattr(base_layer, "attention_type"):  # transformers' models with sliding windows ask their layers for it
            self.attention_type = base_layer.attention_type

    def forward(self, hidden_states: Tensor, *args: Any, position_ids: Tensor | None = None, **kwargs: Any) -> Any:
        if position_ids is None:
            raise ModelError("this model type does not tell its layers the positions; use another method")
        rows = self.prefix.to(hidden_states.dtype)
        vectors = F.embedding(position_ids.clamp(max=len(rows) - 1), rows)
        inside = (position_ids < len(rows)).unsqueeze(-1)
        hidden_states = torch.where(inside, vectors, hidden_states)
        return self.base_layer(hidden_states, *args, position_ids=position_ids, **kwargs)


def insert(model: nn.Module, cfg: RunConfig, layers: Sequence[nn.Module]) -> None:
    """Freeze `model`, which may be on meta, and put the method's modules in; `layers` are its decoder layers."""
    model.requires_grad_(False)
    kind, hidden = _config(model, "model_type"), _config(model, "hidden_size")
    if cfg.method == baselines.BITFIT:
        _shift(model)
    elif cfg.has_prefix:
        if cfg.has_factors:
            adapt(model, cfg.lora, cfg.seed)  # before a layer's name changes
        std = getattr(model.config, "initializer_range", 0.02)
        names = {id(module): name for name, module in model.named_modules()}
        for layer in layers if cfg.method.endswith(baselines.PRELAYER) else layers[:1]:
            name = names[id(layer)]
            _replace(model, name, Prefixed(layer, name, hidden, cfg.baseline.prefix_tokens, std, cfg.seed))
    else:
        ends = baselines.sites(kind, cfg.method)
        found = [name for name, module in model.named_modules() if is_linear(module) and has_suffix(name, ends)]
        baselines.check_sites(kind, cfg.method, len(found), len(layers))
        for name in found:
            norm = cfg.method == baselines.ADAPTER_L
            base = model.get_submodule(name)
            _replace(model, name, Bottleneck(base, name, hidden, cfg.baseline.bottleneck, norm, cfg.seed))


def _shift(model: nn.Module) -> None:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    widths = {}
    for name, module in model.named_modules():
        if is_linear(module) and module is not output:
            widths[name] = features(module)[1]
        elif isinstance(bias := module._parameters.get("bias"), nn.Parameter) and module is not output:
            widths[name] = bias.numel()
    for name, width in widths.items():
        _replace(model, name, Shift(model.get_submodule(name), width))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    module.train(model.training)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _config(model: nn.Module, key: str) -> Any:
    value = getattr(getattr(model, "config", None), key, None)
    if value is None:
        raise ConfigError(f"the base's config.json has no {key}, which this method needs; use method=lora")
    return value


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.float32, device="cpu"))  # real also where the base is on meta


def _drawn(shape: tuple[int, ...], std: float, seed: int, name: str) -> nn.Parameter:
    """Normal values within two deviations: a function of these arguments only."""
    digest = blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
    parameter = _zeros(*shape)
    nn.init.trunc_normal_(parameter.data, std=std, a=-2 * std, b=2 * std, generator=generator)
    return parameter
