"""The base model: built empty, then filled. Every rank reads the bytes it keeps, straight to where they stay.

No rank-0 load, no broadcast, no all-gather, no whole tensor in host memory, no mmap. Where the bytes lie is
`spec.layout`'s knowledge, what is in the folder `storage.folder`'s, and how they are fetched `parallel.reading`'s; this
module joins them with the model and the device.
"""

import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_scale.adapters.lora import file_name
from lora_scale.parallel import classes, documents, reading
from lora_scale.parallel.flat import FlatBase
from lora_scale.parallel.grid import Grid
from lora_scale.parallel.reading import Wanted
from lora_scale.parallel.zero3 import Partitioner
from lora_scale.spec.config import ModelConfig, RunConfig
from lora_scale.spec.errors import ConfigError, ModelError
from lora_scale.spec.layout import Placement, TensorEntry, zero_span
from lora_scale.spec.splits import Split, trained
from lora_scale.storage.folder import ModelFolder, sources, unused

ALIGNMENT = 512  # bytes; what the CUDA allocator and NCCL like a tensor to start at


def dtype_of(cfg: RunConfig) -> torch.dtype:
    """Precision of the base's weights and of the arithmetic."""
    return torch.bfloat16 if cfg.precision == "bf16" else torch.float32


def empty(folder: ModelFolder, cfg: RunConfig) -> nn.Module:
    """The model on the meta device, in train mode, with real buffers (rotary frequencies and such) on the CPU."""
    transformers = importlib.import_module("transformers")
    config = read_config(folder, cfg)
    for key, value in config.to_dict().items():
        if ("dropout" in key or "pdrop" in key) and isinstance(value, float):
            setattr(config, key, cfg.model.dropout)
    config.use_cache = False
    try:
        with torch.device("meta"):
            auto = "SequenceClassification" if classes.in_folder(folder.config) else "CausalLM"
            model = getattr(transformers, f"AutoModelFor{auto}").from_config(
                config,
                dtype=dtype_of(cfg),
                attn_implementation=_attention(cfg),
                trust_remote_code=cfg.model.trust_remote_code,
            )
    except ImportError as error:
        raise ConfigError(
            f"model.attention is {cfg.model.attention}, which is not to be had here: {_first(error)}"
        ) from error
    except Exception as error:  # transformers raises many kinds
        raise ModelError(f"{folder.path}: transformers cannot build this model: {_first(error)}") from error
    rebuild_buffers(model)
    return model.train()  # transformers builds in eval mode, where recompute is silently off


def _attention(cfg: RunConfig) -> str:
    """By the name that transformers has for it; `auto` is settled before a run trains."""
    chosen = cfg.model.attention
    return documents.prepare() if chosen == "documents" else "sdpa" if chosen == "auto" else chosen


def skeleton(folder: ModelFolder, model: ModelConfig) -> nn.Module:
    """The model on the meta device, of which only names and shapes are wanted: no run is needed."""
    model = model.model_copy(update={"attention": "eager"})  # what every family has; nothing is computed
    rest = {"data": {"train": "-", "packing": False}, "run_dir": "-", "train": {"max_steps": 1}}
    return empty(folder, RunConfig.model_validate({"model": model, **rest}))


def read_config(folder: ModelFolder, cfg: RunConfig) -> Any:
    """The base's config.json as transformers reads it."""
    transformers = importlib.import_module("transformers")
    path, model_type = folder.path / "config.json", folder.config.get("model_type")
    if model_type not in transformers.CONFIG_MAPPING and not cfg.model.trust_remote_code:
        known = f"which transformers {transformers.__version__} does not know; a newer one may"
        raise ModelError(f"{path} has model_type {model_type!r}, {known}")
    try:
        config = transformers.AutoConfig.from_pretrained(folder.path, trust_remote_code=cfg.model.trust_remote_code)
    except Exception as error:  # transformers and what checks its classes raise many kinds
        raise ModelError(f"{path} is refused by transformers: {_first(error)}; download it again") from error
    if classes.in_folder(folder.config):
        classes.check_config(cfg, str(model_type))
    elif type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not cfg.model.trust_remote_code:
        raise ModelError(f"{path} has model_type {model_type!r}, which is no causal language model")
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what is read here is dequantised on the way
    return config


def _first(error: Exception) -> str:
    """An error of a library on one line, its longer advice left out."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def rebuild_buffers(model: nn.Module) -> None:
    """Compute the buffers that no file holds, by transformers' own initialisation of the module that has them.

    They are filled with NaN first, so that one which that initialisation does not reach cannot pass for a value.
    """
    for name, module in model.named_modules():
        mine = {key: buffer for key, buffer in module._buffers.items() if buffer is not None and buffer.is_meta}
        if not mine:
            continue
        for key, buffer in mine.items():
            poison = float("nan") if buffer.is_floating_point() else -1
            module._buffers[key] = torch.full_like(buffer, poison, device="cpu")
        with torch.no_grad():
            model._init_weights(module)  # type: ignore[operator]
        for key in mine:
            value = module._buffers[key]
            assert value is not None
            if value.isnan().any() if value.is_floating_point() else (value == -1).any():
                raise ModelError(
                    f"buffer {name}.{key} of {type(module).__name__} cannot be computed; this model type is not "
                    "supported"
                )


@dataclass(slots=True)
class Loaded:
    """What loading took, on this rank."""

    nbytes: int = 0
    seconds: float = 0.0
    partitions: dict[str, Tensor] = field(default_factory=dict)  # parameter name -> what this rank keeps, flat
    spans: dict[str, tuple[int, int]] = field(default_factory=dict)  # which elements of its flattened shard these are
    unused: tuple[str, ...] = ()  # tensors of the files that no parameter took

    @property
    def gb_per_second(self) -> float:
        return self.nbytes / 1e9 / self.seconds if self.seconds else 0.0


def fill(
    model: nn.Module,
    folder: ModelFolder,
    device: torch.device,
    partitioner: Partitioner | FlatBase | None,
    splits: Mapping[str, Split],
    grid: Grid,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Loaded:
    """Give every meta parameter of the model its memory on `device` and its values from the folder.

    A parameter that `splits` names becomes this rank's tensor-parallel shard. With a partitioner each becomes a ZeRO-3
    parameter, with a flat base each frozen one is laid into it, and only this rank's part is read. Parameters that are
    not on the meta device (adapters) are left alone. Tied parameters stay one. `progress(done, total)` is called with
    bytes of this rank. Where the grid has a group of copies, its first rank reads and the others receive.
    """
    start = time.perf_counter()
    homes = _homes(model, splits, grid, partitioner)
    entries = {home.name: _sources(model, folder, home) for home in homes}
    storage = _allocate(homes, partitioner, device)
    for home in homes:
        flat = storage[home.name]
        adopted = _adopted(home, flat, partitioner)
        for module, key in home.owners:
            module._parameters[key] = adopted
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    wanted = [Wanted(entries[home.name], home.place, storage[home.name]) for home in homes]
    first = grid.copies_group is None or dist.get_rank(grid.copies_group) == 0
    nbytes = reading.read(wanted, device, grid, progress) if first else 0
    if grid.copies_group is not None:
        _share(list(storage.values()), grid.copies_group)
    left = unused(folder, (entry for found in entries.values() for entry in found), _tied(model))
    spans = {home.name: zero_span(prod(home.shape), home.place) for home in homes}
    return Loaded(nbytes, time.perf_counter() - start, storage, spans, tuple(left))


def _share(parts: list[Tensor], group: Any) -> None:
    """What the group's first rank has read, to the others."""
    source = dist.get_process_group_ranks(group)[0]
    for part in parts:
        if part.numel():
            dist.broadcast(part, source, group=group)


@dataclass(frozen=True, slots=True)
class Home:
    """A parameter on the meta device, whole; where this rank's part of it goes."""

    name: str
    parameter: nn.Parameter
    place: Placement
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)  # several for a tied parameter

    @property
    def shape(self) -> tuple[int, ...]:
        """Of this rank's tensor-parallel shard."""
        return self.place.shape(tuple(self.parameter.shape))


def _homes(
    model: nn.Module, splits: Mapping[str, Split], grid: Grid, partitioner: Partitioner | FlatBase | None
) -> list[Home]:
    """Every parameter on the meta device; a tied one comes once."""
    found: dict[int, Home] = {}
    zero = (partitioner.rank, partitioner.size) if isinstance(partitioner, Partitioner) else (0, 1)
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                name = f"{prefix}.{key}" if prefix else key
                split = splits.get(file_name(name))
                split = trained(split) if parameter.requires_grad else split
                place = Placement(split, grid.tp_rank, grid.tp_size, *zero)
                found.setdefault(id(parameter), Home(name, parameter, place)).owners.append((module, key))
    homes = list(found.values())
    return _laid_out(homes, partitioner) if isinstance(partitioner, FlatBase) else homes


def _laid_out(homes: list[Home], base: FlatBase) -> list[Home]:
    """The same with what is frozen laid into the flat base, each by the run of it that this rank keeps."""
    flat = [
        home.name
        for home in homes
        if not home.parameter.requires_grad
        and base.add(home.name, [module for module, _ in home.owners], home.shape, home.parameter.dtype)
    ]
    base.allocate()
    spans = {name: base.span(name) for name in flat}
    return [replace(home, place=replace(home.place, span=spans.get(home.name))) for home in homes]


def _adopted(home: Home, flat: Tensor, partitioner: Partitioner | FlatBase | None) -> nn.Parameter:
    """The parameter as the model keeps it."""
    trains = home.parameter.requires_grad
    if home.place.span is not None:
        assert isinstance(partitioner, FlatBase)
        return partitioner.parameter(home.name)
    if isinstance(partitioner, Partitioner):
        return partitioner.adopt(home.shape, flat, trains)
    return nn.Parameter(flat.view(home.shape), requires_grad=trains)


def _sources(model: nn.Module, folder: ModelFolder, home: Home) -> list[TensorEntry]:
    prefix = getattr(model, "base_model_prefix", "")
    return sources(folder, file_name(home.name), tuple(home.parameter.shape), prefix, _tied(model))


def _tied(model: nn.Module) -> dict[str, str]:
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _allocate(homes: list[Home], partitioner: Partitioner | FlatBase | None, device: torch.device) -> dict[str, Tensor]:
    """Flat memory for what this rank keeps of each parameter, padding zeroed.

    Frozen parameters share one allocation, so that the allocator wastes nothing between them. Trainable ones have
    their own: DeepSpeed moves them into buffers of its own and frees these.
    """
    flat: dict[str, Tensor] = {}
    if isinstance(partitioner, FlatBase):
        flat = {home.name: partitioner.part(home.name) for home in homes if home.place.span is not None}
        homes = [home for home in homes if home.place.span is None]
    sizes = {home.name: prod(home.shape) for home in homes}
    if isinstance(partitioner, Partitioner):
        sizes = {name: partitioner.partition_numel(size) for name, size in sizes.items()}
    frozen = [(home.name, home.parameter) for home in homes if not home.parameter.requires_grad]
    for dtype in {p.dtype for _, p in frozen}:
        step = ALIGNMENT // dtype.itemsize
        offsets, total = {}, 0
        for name, p in frozen:
            if p.dtype == dtype:
                offsets[name] = total
                total += -(-sizes[name] // step) * step
        whole = torch.empty(total, dtype=dtype, device=device)
        flat.update({name: whole.narrow(0, offset, sizes[name]) for name, offset in offsets.items()})
    for home in homes:
        if home.parameter.requires_grad:
            flat[home.name] = torch.empty(sizes[home.name], dtype=home.parameter.dtype, device=device)
    return flat
