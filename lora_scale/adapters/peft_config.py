"""PEFT's adapter_config.json: what is read of it, and what must not stand in it. With `adapters.peft` the only door to
PEFT's keys.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from lora_scale.spec.errors import CheckpointError

CONFIG_FILE = "adapter_config.json"
TOKENS = "trainable_token_indices"
PATTERNS = ("rank_pattern", "alpha_pattern")
_READ = (
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"),
    *("modules_to_save", "use_dora", TOKENS),
)
_NEUTRAL = (
    # Which modules are adapted is read from the tensors' names.
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
    *("base_model_name_or_path", "revision", "peft_version", "inference_mode", "task_type", "auto_mapping"),
    # Settings of variants; the key that would turn the variant on is not neutral.
    *("loftq_config", "eva_config", "megatron_core", "qalora_group_size"),
)
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none", "lora_only", "all"),
    "init_lora_weights": (True, False, "gaussian", "eva"),  # pissa, olora, corda and loftq also change the base
}


def read(folder: Path) -> dict[str, Any]:
    """The keys as they stand there, token ids always as a list; CheckpointError for what is not known here."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is no adapter: it has no {CONFIG_FILE}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} does not hold a JSON object")
    for name, value in config.items():
        plain = value in _ALLOWED[name] if name in _ALLOWED else name in (*_READ, *_NEUTRAL) or not value
        if not plain:
            raise CheckpointError(f"{path}: {name} is {value!r}; such an adapter is not read here, only plain LoRA")
    _check_number(path, "r", config.get("r"), (int,))
    _check_number(path, "lora_alpha", config.get("lora_alpha"), (int, float))
    for name, kinds in zip(PATTERNS, ((int,), (int, float)), strict=True):
        patterns = config.get(name) or {}
        if not isinstance(patterns, dict):
            raise CheckpointError(f"{path}: {name} is {patterns!r}; it must be a JSON object")
        for pattern, value in patterns.items():
            _check_number(path, f"{name}[{pattern!r}]", value, kinds)
            try:
                re.compile(pattern)
            except re.error as error:
                raise CheckpointError(f"{path}: {name} has {pattern!r}, no regular expression: {error}") from None
    if config.get(TOKENS):
        config[TOKENS] = _token_ids(path, config[TOKENS])
    return config


def _token_ids(path: Path, given: Any) -> list[int]:
    """Of the input embedding: a list, or PEFT's longer form {its name: a list}."""
    ids = next(iter(given.values())) if isinstance(given, dict) and len(given) == 1 else given
    if not isinstance(ids, list) or any(type(i) is not int or i < 0 for i in ids) or len(set(ids)) < len(ids):
        raise CheckpointError(f"{path}: {TOKENS} is {given!r}; only ids of the input embedding, each once, are read")
    return ids


def _check_number(path: Path, name: str, value: Any, kinds: tuple[type, ...]) -> None:
    if type(value) not in kinds or not 0 < value < math.inf:
        raise CheckpointError(f"{path}: {name} is {value!r}; it must be a positive number")
