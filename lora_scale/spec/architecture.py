"""What a model is made of, for arithmetic: parameters by name, shape and kind; and how config.json says its sizes.

Knows no family (that is `spec.shapes`), no torch, no files.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from lora_scale.spec.errors import ModelError

Kind = Literal["linear", "conv1d", "output", "table", "positions", "experts", "other"]
"""linear (out, in) and conv1d (in, out) can be adapted; so can output, but `all-linear` leaves it out; tables, of
tokens and of positions, are looked up, not multiplied; experts are fused, one matrix after another."""

Config = Mapping[str, Any]

_LAYER = re.compile(r"^(.*?\.(?:layers|h)\.\d+)\.")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of the built model. A tied output layer is no parameter of its own: its table is both."""

    name: str
    shape: tuple[int, ...]
    kind: Kind = "other"

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def module(self) -> str:
        """The module that owns it."""
        return self.name.rpartition(".")[0]

    @property
    def features(self) -> tuple[int, int]:
        """(in, out) of a linear layer's weight."""
        rows, columns = self.shape
        return (rows, columns) if self.kind == "conv1d" else (columns, rows)

    @property
    def is_linear(self) -> bool:
        return self.kind in ("linear", "conv1d", "output")


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model's parameters, and the sizes that arithmetic needs beside them."""

    model_type: str
    parameters: tuple[Parameter, ...]
    tied: bool  # the input embedding is the output layer's weight too
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    experts: int = 0  # a layer
    experts_per_token: int = 0
    alibi: bool = False  # positions as a slope of each head


def layer_of(parameter: str) -> str:
    """The decoder layer that a parameter belongs to, by name; "" for one outside of them."""
    match = _LAYER.match(parameter)
    return match[1] if match else ""


def size(config: Config, *names: str) -> int:
    """A size that must be there, under one of its names."""
    for name in names:
        if (value := config.get(name)) is not None:
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
            raise ModelError(f"config.json has {name} = {value!r}; it must be a whole number of at least 1")
    raise ModelError(f"config.json has no {names[0]}, which a model of type {config.get('model_type')} needs")


def option(config: Config, name: str, default: int) -> int:
    """A size with a default; null counts as absent."""
    return default if config.get(name) is None else size(config, name)


def divided(config: Config, hidden: int, heads: int) -> int:
    if hidden % heads:
        raise ModelError(f"config.json: the hidden size {hidden} does not divide by its {heads} attention heads")
    return hidden // heads
