"""PEFT's adapter folder: its two files, its keys and its tensor names. The only door to them, with what
`adapters.peft_config` reads; imports no `peft`.

    adapter_config.json        what is adapted and how it is scaled
    adapter_model.safetensors  base_model.model.<module>.lora_A.weight (r, in) and ...lora_B.weight (out, r)

Nothing written here names a machine, a user or a path. Files are written plainly: a caller that needs all or nothing
wraps the folder in `storage.durable.whole_directory`.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lora_scale.adapters import peft_config, principal, tokens
from lora_scale.adapters.lora import LoRALinear, scaling
from lora_scale.adapters.peft_config import CONFIG_FILE as CONFIG_FILE
from lora_scale.adapters.peft_config import PATTERNS, TOKENS
from lora_scale.adapters.targets import by_pattern, exact_suffixes, pattern_matches
from lora_scale.spec.config import LoraConfig
from lora_scale.spec.errors import CheckpointError, ModelError, UsageError
from lora_scale.spec.families import has_suffix
from lora_scale.spec.layout import ByteRange
from lora_scale.storage.durable import write_file
from lora_scale.storage.weights import Reader, read_safetensors, write_safetensors

WEIGHTS_FILE = "adapter_model.safetensors"
FINGERPRINT = "base_fingerprint"
DTYPES: dict[str, tuple[str, torch.dtype]] = {
    "fp32": ("F32", torch.float32),
    "bf16": ("BF16", torch.bfloat16),
    "fp16": ("F16", torch.float16),
}
_PREFIX, _SUFFIX = "base_model.model.", ".weight"
_FACTORS = (".lora_A", ".lora_B")
_TORCH_DTYPES = dict(DTYPES.values())

MAGNITUDE = "lora_magnitude_vector"
OTHERS = "brings more than factors (DoRA, bias, modules_to_save, new tokens)"


@dataclass(frozen=True)
class Adapter:
    """An adapter folder: adapter_config.json, and the factors by parameter name (<module>.lora_A).

    `others` are DoRA's magnitudes, rows of new tokens and parts of the base that trained, by their names in an adapted
    model.
    """

    config: dict[str, Any]
    factors: dict[str, Tensor]
    others: dict[str, Tensor] = field(default_factory=dict)

    @property
    def modules(self) -> tuple[str, ...]:
        return tuple(name.removesuffix(_FACTORS[0]) for name in self.factors if name.endswith(_FACTORS[0]))

    @property
    def max_rank(self) -> int:
        return max(self.factors[module + _FACTORS[0]].shape[0] for module in self.modules)

    def scaling(self, module: str) -> float:
        """The factor before B A of one module."""
        alpha = by_pattern(self.config.get("alpha_pattern") or {}, module, self.config["lora_alpha"])
        return scaling(self.factors[module + _FACTORS[0]].shape[0], alpha, bool(self.config.get("use_rslora")))

    def lora_config(self) -> LoraConfig:
        """The `lora` section that adapts these modules, by their full names, with the same r, scaling and dropout."""
        rank_pattern, alpha_pattern = (
            {
                pattern: value
                for pattern, value in (self.config.get(name) or {}).items()
                if any(pattern_matches(pattern, module) for module in self.modules)
            }
            for name in PATTERNS
        )
        return LoraConfig(
            r=self.config["r"],
            lora_alpha=float(self.config["lora_alpha"]),
            dropout=self.config.get("lora_dropout") or 0.0,
            target_modules=self.modules,
            rank_pattern=rank_pattern,
            alpha_pattern={pattern: float(alpha) for pattern, alpha in alpha_pattern.items()},
            use_rslora=bool(self.config.get("use_rslora")),
            init_A="gaussian" if self.config.get("init_lora_weights") == "gaussian" else "kaiming",
            use_dora=bool(self.config.get("use_dora")),
            bias=self.config.get("bias") or "none",
            modules_to_save=tuple(self.config.get("modules_to_save") or ()),
            trainable_token_indices=tuple(self.config.get(TOKENS) or ()),
        )


def key(parameter: str) -> str:
    """PEFT's name in files of a factor, `<module>.lora_A` or `<module>.lora_B`, or of a part of the base."""
    return f"{_PREFIX}{parameter}{_SUFFIX if parameter.endswith(_FACTORS) else ''}"


def adapter_config(
    model: nn.Module, adapted: Mapping[str, LoRALinear], cfg: LoraConfig, base_name: str
) -> dict[str, Any]:
    """The content of adapter_config.json for a model after `adapt`; PEFT adapts exactly the same modules by it."""
    modules = [name for name, _ in model.named_modules() if not name.endswith(".base_layer")]
    cfg = principal.widened_config(cfg)
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model, cfg),
        "base_model_name_or_path": base_name,
        "revision": None,
        "inference_mode": True,
        "r": cfg.r,
        "lora_alpha": _short(cfg.lora_alpha),
        "lora_dropout": cfg.dropout,
        "target_modules": exact_suffixes(modules, adapted),
        "exclude_modules": None,
        "rank_pattern": dict(cfg.rank_pattern),
        "alpha_pattern": {pattern: _short(alpha) for pattern, alpha in cfg.alpha_pattern.items()},
        "use_rslora": cfg.use_rslora,
        "use_dora": cfg.use_dora,
        "bias": cfg.bias,
        "fan_in_fan_out": any(not isinstance(layer.base_layer, nn.Linear) for layer in adapted.values()),
        "init_lora_weights": "gaussian" if cfg.init_A == "gaussian" else True,
        "modules_to_save": list(cfg.modules_to_save) or None,
        TOKENS: list(cfg.trainable_token_indices) or None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def _task_type(model: nn.Module, cfg: LoraConfig) -> str | None:
    """For SEQ_CLS PEFT puts the whole head into modules_to_save, and cannot load a folder that lacks it or has it in
    parts: then none, with which it adapts the model all the same."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return "CAUSAL_LM"
    return "SEQ_CLS" if set(cfg.modules_to_save) & {"classifier", "score"} else None


def config_for(model: nn.Module, cfg: LoraConfig, base_name: str) -> dict[str, Any]:
    """The same for factors that are there already, of the modules that `cfg.target_modules` has by their full names;
    the model is not adapted, and may be on meta."""
    layers = {name: LoRALinear(model.get_submodule(name), name, r=1, lora_alpha=1.0) for name in cfg.target_modules}
    return adapter_config(model, layers, cfg, base_name)


def _short(alpha: float) -> int | float:
    """PEFT declares alpha an integer; 16.0 is written as 16."""
    return int(alpha) if alpha.is_integer() else alpha


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    write_file(folder / CONFIG_FILE, [(json.dumps(config, indent=2, sort_keys=True) + "\n").encode()])


def write_adapter(
    folder: Path,
    factors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    fingerprint: str | None = None,
) -> None:
    """Both files into an existing folder; `factors` by parameter name. A value that `dtype` cannot hold is an error.

    `fingerprint` is the base's: it goes into the metadata of the safetensors file, which PEFT and vLLM pass over.
    """
    metadata = {"format": "pt"} | ({FINGERPRINT: fingerprint} if fingerprint else {})
    stored, target = DTYPES[dtype]
    specs = [(key(name), stored, tuple(factor.shape)) for name, factor in factors.items()]
    write_safetensors(folder / WEIGHTS_FILE, specs, _bytes(factors, dtype, target), metadata)
    write_config(folder, config)


def _bytes(factors: Mapping[str, Tensor], dtype: str, target: torch.dtype) -> Iterator[memoryview]:
    for name, factor in factors.items():
        cast = factor.detach().to("cpu", target).contiguous()
        if not cast.isfinite().all():
            why = f"is too large for {dtype}; write fp32 or bf16" if factor.isfinite().all() else "is not finite"
            raise CheckpointError(f"{name} holds a value that {why}")
        yield cast.view(-1).view(torch.uint8).numpy().data


def read_adapter(folder: Path) -> Adapter:
    """An adapter that we or PEFT wrote, factors on the CPU in the files' dtype; CheckpointError says what is amiss."""
    config = peft_config.read(folder)
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickle = folder / "adapter_model.bin"
        way_out = f"; {pickle.name} is a pickle and is not read: save it with safe_serialization=True"
        raise CheckpointError(f"{folder} has no {WEIGHTS_FILE}{way_out if pickle.is_file() else ''}")
    try:
        entries, _ = read_safetensors(path)
        factors = {}
        with Reader() as reader:
            for stored, entry in entries.items():
                name = _parameter(path, stored, config)
                if entry.dtype not in _TORCH_DTYPES:
                    raise CheckpointError(f"{path}: {stored} is {entry.dtype}; only F32, BF16 and F16 are read")
                factor = torch.empty(entry.shape, dtype=_TORCH_DTYPES[entry.dtype])
                whole = ByteRange(entry.file, entry.offset, entry.nbytes, entry.dtype)
                reader.read_into(whole, factor.view(-1).view(torch.uint8).numpy().data)
                if not factor.isfinite().all():
                    raise CheckpointError(f"{path}: {stored} holds a value that is not finite; use another checkpoint")
                factors[name] = factor
    except ModelError as error:
        raise CheckpointError(str(error)) from error
    others = {name: factors.pop(name) for name in list(factors) if not name.endswith(_FACTORS)}
    _check_pairs(path, config, factors)
    modules = [name.rpartition(".")[0] for name in factors]
    if config.get("use_dora") and (bare := [name for name in modules if f"{name}.{MAGNITUDE}" not in others]):
        raise CheckpointError(f"{path} lacks {key(bare[0])}.{MAGNITUDE}, and {CONFIG_FILE} says use_dora")
    _check_others(path, config, others)
    return Adapter(config, factors, others)


def _check_others(path: Path, config: Mapping[str, Any], others: Mapping[str, Tensor]) -> None:
    for module in config.get("modules_to_save") or ():
        if not any(has_suffix(name.rpartition(".")[0], (module,)) for name in others):
            raise CheckpointError(f"{path} lacks {module}, which {CONFIG_FILE} has in modules_to_save")
    rows = sum(len(value) for name, value in others.items() if name.endswith(tokens.DELTA))
    if rows != len(config.get(TOKENS) or ()):
        ids = len(config.get(TOKENS) or ())
        raise CheckpointError(f"{path} has the rows of {rows} tokens, and {CONFIG_FILE} names {ids} in {TOKENS}")


def base_fingerprint(folder: Path) -> str | None:
    """Of the base that an exported adapter was trained on; None where the files do not say."""
    path = folder / WEIGHTS_FILE
    try:
        return read_safetensors(path)[1].get(FINGERPRINT) if path.is_file() else None
    except ModelError as error:
        raise CheckpointError(str(error)) from error


def _parameter(path: Path, stored: str, config: Mapping[str, Any]) -> str:
    name = stored.removeprefix(_PREFIX)
    module, _, leaf = name.rpartition(".")
    more = ["bias"] * (config.get("bias", "none") != "none") + [MAGNITUDE] * bool(config.get("use_dora"))
    more += [tokens.DELTA] * bool(config.get(TOKENS))
    if key(name) == stored and (leaf in more or has_suffix(module, tuple(config.get("modules_to_save") or ()))):
        return name
    name = name.removesuffix(_SUFFIX)
    if not name.endswith(_FACTORS) or key(name) != stored:
        raise CheckpointError(f"{path}: {stored} is no factor of a linear layer's LoRA; it is not read here")
    return name


def _check_pairs(path: Path, config: Mapping[str, Any], factors: Mapping[str, Tensor]) -> None:
    if not factors:
        raise CheckpointError(f"{path} holds no tensors")
    for name, factor in factors.items():
        module = name[: -len(_FACTORS[0])]
        other = module + _FACTORS[name.endswith(_FACTORS[0])]
        if other not in factors:
            raise CheckpointError(f"{path}: {key(name)} is there but {key(other)} is not")
        r = by_pattern(config.get("rank_pattern") or {}, module, config["r"])
        dim = 0 if name.endswith(_FACTORS[0]) else 1
        if factor.ndim != 2 or factor.shape[dim] != r:
            raise CheckpointError(
                f"{path}: {key(name)} has shape {tuple(factor.shape)}, but {CONFIG_FILE} gives {module} r = {r}"
            )


def checked_name(base_name: str | None) -> str | None:
    """What the user wants the base to be called in files."""
    if base_name is not None and (base_name.startswith(("/", ".", "~")) or Path(base_name).exists()):
        raise UsageError(f"--base-name is {base_name}, a place on this machine; give a name, as org/model on the hub")
    return base_name


def public_name(path: str) -> str:
    """What to call a base model in files: its name on the hub, or the last part of its folder's name."""
    parts = Path(path).expanduser().absolute().parts
    cached = [part for part in parts if part.startswith("models--")]
    if cached:  # the hub's cache: models--org--name/snapshots/<commit>
        return cached[-1].removeprefix("models--").replace("--", "/")
    if Path(path).expanduser().exists() or path.startswith(("/", ".", "~")):
        return parts[-1]
    return path
