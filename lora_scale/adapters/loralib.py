"""State dicts of loralib (https://github.com/microsoft/LoRA, version 0.1.2), taken into PEFT's form without rounding.

A `Linear` has lora_A (r, in) and lora_B (out, r). A `MergedLinear` is one fused weight of n parts side by side, k of
them adapted (`enable_lora`): lora_A (k r, in), and lora_B (k out / n, r) as a convolution in k groups. In PEFT that is
one pair of rank k r whose B has a block for each adapted part and zeros elsewhere. Neither lora_alpha nor enable_lora
is in the file. Which layout the base's weight has there (`fan_in_fan_out`) does not matter to the factors.
"""

import pickle
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_scale.adapters.peft import DTYPES
from lora_scale.adapters.targets import features, is_linear
from lora_scale.spec.config import LoraConfig
from lora_scale.spec.errors import CheckpointError, ModelError, UsageError
from lora_scale.spec.families import family
from lora_scale.storage.weights import Reader, read_safetensors

PARTS = ("q", "k", "v")
_WRAPPED = ("model_state_dict", "state_dict")  # what loralib's examples save their state dict under
_BUFFERS = (".attn.bias", ".attn.masked_bias")  # masks of old GPT-2 code: loralib's bias="all" takes what is so called
_TORCH_DTYPES = dict(DTYPES.values())


@dataclass(frozen=True, slots=True)
class Pair:
    """One adapted layer in PEFT's form."""

    a: Tensor  # (r, in)
    b: Tensor  # (out, r)
    r: int  # loralib's, by which its lora_alpha is divided
    enabled: tuple[int, ...] | None  # which parts of a fused weight; None: all of a plain one

    @property
    def groups(self) -> int:
        return len(self.a) // self.r


@dataclass(frozen=True, slots=True)
class Converted:
    """What a state dict is in PEFT's form."""

    pairs: Mapping[str, Pair]  # by module
    others: Mapping[str, Tensor]  # biases and whole modules, by their names in an adapted model
    saved: tuple[str, ...]  # modules that are whole
    notes: tuple[str, ...]

    @property
    def tensors(self) -> dict[str, Tensor]:
        factors = {f"{name}.lora_{f}": getattr(pair, f.lower()) for name, pair in self.pairs.items() for f in "AB"}
        return factors | dict(self.others)

    def config(self, alpha: float) -> LoraConfig:
        """The `lora` section in which each layer is scaled by alpha / r of loralib."""
        ranks = {name: len(pair.a) for name, pair in self.pairs.items()}
        alphas = {name: alpha * pair.groups for name, pair in self.pairs.items()}
        r, lora_alpha = Counter((ranks[name], alphas[name]) for name in ranks).most_common(1)[0][0]
        ends = (name.removesuffix(".bias") for name in self.others if name.endswith(".bias"))
        biases = [name for name in ends if name not in self.saved]
        lora_only = all(name.endswith(".base_layer") for name in biases)
        return LoraConfig(
            r=r,
            lora_alpha=lora_alpha,
            target_modules=tuple(self.pairs),
            rank_pattern={name: rank for name, rank in ranks.items() if rank != r},
            alpha_pattern={name: value for name, value in alphas.items() if value != lora_alpha},
            bias="none" if not biases else "lora_only" if lora_only else "all",
            modules_to_save=self.saved,
        )


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` or safetensors wrote, in fp32; nothing in it is run."""
    try:
        found = _of_safetensors(path) if path.suffix == ".safetensors" else _of_torch(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    for key, value in found.items():
        if not isinstance(value, Tensor) or not value.is_floating_point():
            raise CheckpointError(f"{path}: {key} is no tensor of numbers; save lora.lora_state_dict(model) alone")
        if not value.isfinite().all():
            raise CheckpointError(f"{path}: {key} holds a value that is not finite; use another checkpoint")
    return {key.removeprefix("module."): value.float() for key, value in found.items()}  # of DistributedDataParallel


def _of_torch(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is no file of torch.save with tensors alone, and no other pickle is opened; save "
            "lora.lora_state_dict(model), or a safetensors file"
        ) from error
    for key in _WRAPPED:
        found = found.get(key, found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise CheckpointError(f"{path} holds no state dict; save lora.lora_state_dict(model)")
    return found


def _of_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        entries, _ = read_safetensors(path)
        found = {}
        with Reader() as reader:
            for name, entry in entries.items():
                if entry.dtype not in _TORCH_DTYPES:
                    raise CheckpointError(f"{path}: {name} is {entry.dtype}; only F32, BF16 and F16 are read")
                found[name] = torch.empty(entry.shape, dtype=_TORCH_DTYPES[entry.dtype])
                reader.read_into(entry.whole(), found[name].view(-1).view(torch.uint8).numpy().data)
    except ModelError as error:
        raise CheckpointError(str(error)) from error
    return found


def convert(path: Path, tensors: Mapping[str, Tensor], model: nn.Module, enable: Sequence[str]) -> Converted:
    """Every tensor in its place in `model`, which may be on meta; CheckpointError for one that has none.

    `enable` names the adapted parts of fused weights, as q, k, v or by number, where the file does not tell.
    """
    modules = dict(model.named_modules())
    pairs: dict[str, Pair] = {}
    notes: list[str] = []
    for key in tensors:
        module, _, leaf = key.rpartition(".")
        if leaf not in ("lora_A", "lora_B"):
            continue
        if (other := f"{module}.lora_{'B' if leaf == 'lora_A' else 'A'}") not in tensors:
            raise CheckpointError(f"{path}: {key} is there but {other} is not")
        if leaf == "lora_A":
            name = _in_model(path, module, modules, model)
            pairs[name] = _pair(path, name, modules[name], tensors[key], tensors[other], model, enable)
    if not pairs:
        raise CheckpointError(f"{path} has no lora_A; save lora.lora_state_dict(model)")
    if enable and all(pair.enabled is None for pair in pairs.values()):
        raise UsageError(f"--enable is {','.join(enable)}, but no layer in {path} is fused; leave it out")
    rest = [key for key in tensors if not key.endswith((".lora_A", ".lora_B"))]
    masks = [key for key in rest if key.endswith(_BUFFERS)]
    if masks:
        notes.append(f"{len(masks)} masks that models compute for themselves, as {masks[0]}")
    others, saved = _others(path, {key: tensors[key] for key in rest if key not in masks}, model, pairs)
    return Converted(pairs, others, saved, tuple(notes))


def _in_model(path: Path, module: str, modules: Mapping[str, nn.Module], model: nn.Module) -> str:
    """A module's name, which files have with or without transformers' base_model_prefix."""
    prefix = getattr(model, "base_model_prefix", "")
    for name in (module, f"{prefix}.{module}", module.removeprefix(f"{prefix}.")):
        if name in modules:
            return name
    raise CheckpointError(f"{path} has a tensor for {module}, which the base does not have; give the base it is for")


def _pair(
    path: Path, name: str, layer: nn.Module, a: Tensor, b: Tensor, model: nn.Module, enable: Sequence[str]
) -> Pair:
    if not is_linear(layer):
        raise CheckpointError(f"{path} adapts {name}, a {type(layer).__name__}; only linear layers are taken")
    n_in, n_out = features(layer)
    what = f"{path}: {name} has lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)}, and the base's layer is {n_in} -> "
    what += f"{n_out}; "
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != n_in or not b.shape[1] or len(a) % b.shape[1]:
        raise CheckpointError(f"{what}give the base it is for")
    r = b.shape[1]
    groups = len(a) // r
    if groups == 1 and len(b) == n_out:
        return Pair(a.contiguous(), b.contiguous(), r, None)
    rows = len(b) // groups if groups else 0
    if not rows or len(b) % groups or n_out % rows or n_out // rows < groups:
        raise CheckpointError(f"{what}give the base it is for")
    parts = n_out // rows
    enabled = tuple(range(parts)) if groups == parts else _enabled(name, groups, parts, model, enable)
    wide = torch.zeros(n_out, groups * r)
    for group, part in enumerate(enabled):
        block = b[group * rows : (group + 1) * rows]
        wide[part * rows : (part + 1) * rows, group * r : (group + 1) * r] = block
    return Pair(a.contiguous(), wide, r, enabled)


def _enabled(name: str, groups: int, parts: int, model: nn.Module, enable: Sequence[str]) -> tuple[int, ...]:
    """Numbers of the adapted parts, in the order of the weight."""
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    row = family(kind)
    named = PARTS if parts == len(PARTS) and row is not None and row.fused == "parts" else ()
    numbers = {word: i for i, word in enumerate(named)} | {str(i): i for i in range(parts)}
    chosen = sorted({numbers[word] for word in enable if word in numbers})
    if len(chosen) != groups or len(enable) != groups:
        given = f"--enable is {','.join(enable)}" if enable else "which, the file does not say"
        example = ",".join([*named[:1], *named[-1:]] if groups == 2 and named else (named or list(numbers))[:groups])
        raise UsageError(
            f"{name} has LoRA in {groups} of {parts} parts (loralib's enable_lora), and {given}; name {groups} of "
            f"{', '.join(numbers)}, as --enable {example}"
        )
    return tuple(chosen)


def _others(
    path: Path, tensors: Mapping[str, Tensor], model: nn.Module, pairs: Mapping[str, Pair]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Biases and whole modules by PEFT's names, and these modules."""
    modules = dict(model.named_modules())
    found: dict[str, Tensor] = {}
    saved: dict[str, None] = {}
    for key, value in tensors.items():
        module, _, leaf = key.rpartition(".")
        name = _in_model(path, module, modules, model)
        there = modules[name]._parameters.get(leaf)
        if there is None or there.shape != value.shape:
            has = "nothing" if there is None else tuple(there.shape)
            raise CheckpointError(
                f"{path} has {key} {tuple(value.shape)}, where the base has {has}; only its own parameters are taken"
            )
        if name in pairs and leaf != "bias":
            raise CheckpointError(
                f"{path} has {key} beside its factors: a whole model; save lora.lora_state_dict(model) alone"
            )
        if leaf != "bias":
            saved[name] = None
        found[f"{name}.base_layer.{leaf}" if name in pairs else f"{name}.{leaf}"] = value.contiguous()
    return found, tuple(saved)
