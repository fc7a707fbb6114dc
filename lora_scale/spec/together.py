"""What runs that train on one base in memory, in one process, must have in common. No torch."""

from collections.abc import Sequence
from itertools import combinations

from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.states import keeps_base_flat

BASE = ("model", "precision", "recompute", "activation_offloading", "kernels", "parallel", "engine")
LAYERS = ("target_modules",)
PLAIN = {  # the layers are shared, and only plain factors can be exchanged in them
    "dropout": 0.0,
    "use_dora": False,
    "bias": "none",
    "modules_to_save": (),
    "trainable_token_indices": (),
    "pissa": None,
}


def check_all(cfgs: Sequence[RunConfig]) -> None:
    """The same of every two; one alone may be anything."""
    for first, other in combinations(cfgs, 2):
        check(first, other)


def check(first: RunConfig, other: RunConfig) -> None:
    """ConfigError where `other` cannot train beside `first`: another base or layout, other layers, not plain LoRA."""
    for cfg in (first, other):
        _check_plain(cfg)
    for key in BASE:
        _same(key, getattr(first, key), getattr(other, key), other)
    for key in LAYERS:
        _same(f"lora.{key}", getattr(first.lora, key), getattr(other.lora, key), other)
    if first.run_dir == other.run_dir:
        raise ConfigError(f"run_dir is {other.run_dir} in both runs; give each its own")


def _check_plain(cfg: RunConfig) -> None:
    where = f"{cfg.run_dir} trains beside another run"
    if cfg.method != "lora":
        raise ConfigError(f"method is {cfg.method}, but {where}: only method=lora can; run it alone")
    for key, plain in PLAIN.items():
        if (value := getattr(cfg.lora, key)) != plain:
            raise ConfigError(f"lora.{key} is {value}, but {where}: only plain factors can; run it alone")
    if cfg.parallel.zero_stage == 3 and not keeps_base_flat(cfg):
        raise ConfigError(f"parallel.base_engine is deepspeed, but {where}; set parallel.base_engine=flat")


def _same(key: str, wanted: object, found: object, cfg: RunConfig) -> None:
    if found != wanted:
        said = f"{key} is {found} in the run of {cfg.run_dir}, which trains beside one with {wanted}"
        raise ConfigError(f"{said}; make them equal")
