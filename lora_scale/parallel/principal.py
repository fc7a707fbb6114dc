"""What variants must know of the adapted weights, computed once a module by one rank for all: principal components
(`lora.pissa`), lengths of rows (`lora.use_dora`); and the rows at which new tokens begin.

Rank k takes every module whose number is k modulo the ranks, reads its whole weight from the files, one at a time, and
works on it on its device; the result (two factors, or a vector) then travels to the others. A sharded weight is never
gathered, and what comes out depends on the file's bytes alone, not on ranks or layout. A resumed run takes them from
its checkpoint.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_scale.adapters import peft, principal, tokens
from lora_scale.adapters.lora import DoRALinear, LoRALinear, row_squares
from lora_scale.parallel import recompute
from lora_scale.parallel.world import on_every_rank
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.layout import ByteRange, TensorEntry
from lora_scale.storage.folder import ModelFolder, sources
from lora_scale.storage.weights import Reader

Factors = dict[str, tuple[Tensor, Tensor]]
_DTYPES = dict(peft.DTYPES.values())


def begin(
    cfg: RunConfig, model: nn.Module, layers: Mapping[str, LoRALinear], folder: ModelFolder, resume: Path | None
) -> list[str]:
    """Give every variant what it begins with; notes for the user. Collective over all ranks."""
    if cfg.lora.use_dora:
        inside = {id(module) for layer in recompute.decoder_layers(model) for module in layer.modules()}
        if outside := [name for name, layer in layers.items() if id(layer) not in inside]:
            raise ConfigError(
                f"lora.use_dora is true, but {outside[0]} is in no decoder layer; leave it out of targets"
            )
        norms(model, layers, folder)
    token_rows(model, folder)
    if cfg.lora.pissa is None:
        return []
    began = time.perf_counter()
    start(cfg, model, layers, folder, resume)
    what = "taken from the checkpoint" if resume else f"found in {time.perf_counter() - began:.1f} s"
    return [f"starts at the principal components of {len(layers)} weights, {what}"]


def start(
    cfg: RunConfig, model: nn.Module, layers: Mapping[str, LoRALinear], folder: ModelFolder, resume: Path | None
) -> None:
    """Give every layer, whole and on the CPU, its principal start: of `resume`'s checkpoint where there is one.

    Collective over all ranks.
    """
    names, ranks = list(layers), dist.get_world_size()
    if resume is not None:
        found = on_every_rank(lambda: _from_checkpoint(resume, layers) if dist.get_rank() == 0 else {})
        _share(layers, found, lambda number: 0)
        return
    mine = names[dist.get_rank() :: ranks]
    found = on_every_rank(lambda: {name: _decomposed(cfg, model, name, layers[name], folder) for name in mine})
    _share(layers, found, lambda number: number % ranks)


def norms(model: nn.Module, layers: Mapping[str, LoRALinear], folder: ModelFolder) -> None:
    """Give every DoRA layer the lengths of its base's rows. Collective over all ranks."""
    names, ranks = list(layers), dist.get_world_size()
    mine = names[dist.get_rank() :: ranks]
    found = on_every_rank(lambda: {name: row_squares(_weight(model, name, layers[name], folder)) for name in mine})
    for number, (name, layer) in enumerate(layers.items()):
        assert isinstance(layer, DoRALinear)
        squares = found[name] if name in found else torch.empty(layer.out_features, device=_device())
        dist.broadcast(squares, src=number % ranks)
        layer.begin_at_norms(squares.cpu())


def token_rows(model: nn.Module, folder: ModelFolder) -> None:
    """Let new tokens begin at their rows of the table, which one rank reads. Collective over all ranks."""
    found = tokens.rows_of(model)
    if found is None:
        return
    rows, module = found[1], found[0].rpartition(".")[0]
    table, given = model.get_submodule(module).weight, rows.given()
    assert isinstance(table, Tensor)
    width = table.shape[1]

    def read() -> Tensor:
        (entry,) = _entries(model, f"{module}.weight", tuple(table.shape), folder)
        values = torch.empty(len(given), width, dtype=_DTYPES[entry.dtype])
        with Reader() as reader:
            for number, row in enumerate(given):
                length = width * entry.itemsize
                place = ByteRange(entry.file, entry.offset + row * length, length, entry.dtype)
                reader.read_into(place, values[number].view(torch.uint8).numpy().data)
        return values.float()

    values = on_every_rank(lambda: read() if dist.get_rank() == 0 else torch.empty(len(given), width)).to(_device())
    dist.broadcast(values, src=0)
    tokens.begin_at(rows, values.cpu())


def _from_checkpoint(path: Path, layers: Mapping[str, LoRALinear]) -> Factors:
    factors = peft.read_adapter(path).factors
    return {name: principal.start_in(factors, name, layer.r) for name, layer in layers.items()}


def _decomposed(
    cfg: RunConfig, model: nn.Module, name: str, layer: LoRALinear, folder: ModelFolder
) -> tuple[Tensor, Tensor]:
    assert cfg.lora.pissa is not None
    weight = _weight(model, name, layer, folder)
    return principal.components(weight, layer.r, layer.scaling, cfg.lora.pissa, cfg.seed, name)


def _weight(model: nn.Module, name: str, layer: LoRALinear, folder: ModelFolder) -> Tensor:
    """The whole weight of a module from the files, (out, in), on this rank's device."""
    linear = isinstance(layer.base_layer, nn.Linear)
    stored = (layer.out_features, layer.in_features) if linear else (layer.in_features, layer.out_features)
    (entry,) = _entries(model, f"{name}.weight", stored, folder)
    weight = torch.empty(stored, dtype=_DTYPES[entry.dtype])
    with Reader() as reader:
        reader.read_into(entry.whole(), weight.view(-1).view(torch.uint8).numpy().data)
    return (weight if linear else weight.T).to(_device())


def _entries(model: nn.Module, parameter: str, shape: tuple[int, ...], folder: ModelFolder) -> list[TensorEntry]:
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    return sources(folder, parameter, shape, getattr(model, "base_model_prefix", ""), tied)


def _share(layers: Mapping[str, LoRALinear], found: Factors, owner: Callable[[int], int]) -> None:
    """Every rank gets every module's factors from the rank that has them; the first keeps them for checkpoints."""
    for number, (name, layer) in enumerate(layers.items()):
        shapes = (layer.r, layer.in_features), (layer.out_features, layer.r)
        given = found.get(name)
        pair = []
        for i, shape in enumerate(shapes):
            value = given[i] if given else torch.empty(shape)
            travelling = value.to(_device(), torch.float32).contiguous()
            dist.broadcast(travelling, src=owner(number))
            pair.append(travelling.cpu())
        layer.begin_at(pair[0], pair[1], keep_whole=dist.get_rank() == 0)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
