"""The other methods of the LoRA paper's Tables 4 and 15: where each puts what it trains, how much that is. No torch.

Shapes here are held to the modules of `adapters.baselines` by a test; `plan` counts with them.
"""

from collections.abc import Iterator
from math import prod

from lora_scale.spec.architecture import Architecture
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.families import has_suffix
from lora_scale.spec.targets import ranks as adapter_ranks
from lora_scale.spec.targets import roles_of

BITFIT, PREEMBED, PRELAYER, ADAPTER_H, ADAPTER_L = "bitfit", "preembed", "prelayer", "adapter-h", "adapter-l"
LORA_PREEMBED, LORA_PRELAYER = "lora+preembed", "lora+prelayer"
METHODS = (BITFIT, PREEMBED, PRELAYER, ADAPTER_H, ADAPTER_L, LORA_PREEMBED, LORA_PRELAYER)


def prefix_tokens(cfg: RunConfig) -> int:
    """Positions that stand before each document, with trained vectors in them."""
    return cfg.baseline.prefix_tokens if cfg.has_prefix else 0


def shapes(model: Architecture, cfg: RunConfig) -> Iterator[tuple[int, ...]]:
    """The shape of every tensor that the method trains."""
    hidden, width = model.hidden, cfg.baseline.bottleneck
    match cfg.method:
        case "bitfit":
            linears = [p for p in model.parameters if p.kind in ("linear", "conv1d")]
            modules = {p.module for p in linears}
            yield from ((p.features[1],) for p in linears)
            yield from (p.shape for p in model.parameters if p.name.endswith(".bias") and p.module not in modules)
        case "preembed" | "prelayer" | "lora+preembed" | "lora+prelayer":
            yield from [(cfg.baseline.prefix_tokens, hidden)] * (model.layers if cfg.method.endswith(PRELAYER) else 1)
            if cfg.has_factors:
                yield from _factors(model, cfg)
        case "adapter-h" | "adapter-l":
            ends = sites(model.model_type, cfg.method)
            names = [p.module for p in model.parameters if p.is_linear]
            check_sites(model.model_type, cfg.method, sum(has_suffix(name, ends) for name in names), model.layers)
            for _ in range(model.layers * len(ends)):
                yield from [(width, hidden), (width,), (hidden, width), (hidden,)]
                yield from [(hidden,)] * (2 if cfg.method == ADAPTER_L else 0)
        case _:
            raise AssertionError(cfg.method)


def _factors(model: Architecture, cfg: RunConfig) -> Iterator[tuple[int, ...]]:
    linears = {p.module: p for p in model.parameters if p.is_linear}
    for module, r in adapter_ranks(model, cfg.lora).items():
        d_in, d_out = linears[module].features
        yield from [(r, d_in), (d_out, r)]


def numel(model: Architecture, cfg: RunConfig) -> int:
    """Trainable parameters."""
    return sum(prod(shape) for shape in shapes(model, cfg))


def sites(model_type: str, method: str) -> tuple[str, ...]:
    """The linear layers, by the end of their names, behind which a bottleneck stands: the last of the MLP, and for
    adapter-h that of attention too."""
    roles = roles_of(model_type)
    after = [*(roles.get("o", ()) if method == ADAPTER_H else ()), *roles.get("mlp", ())[-1:]]
    return tuple(after)


def check_sites(model_type: str, method: str, found: int, layers: int) -> None:
    """Every layer must have its place, or the method would be another one in secret."""
    wanted = layers * (2 if method == ADAPTER_H else 1)
    if found != wanted:
        raise ConfigError(
            f"method is {method}, which needs {wanted} places in this {model_type}, and {found} are known (experts "
            "have none); use method=lora"
        )
