"""Which bytes DeepSpeed holds for a tiny run, by walking the storages of every tensor there is; no formula is used."""

import gc
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lora_scale.parallel import flat, gathering, grid, load, memory, recompute, setup, transport, zero3
from lora_scale.parallel.deepspeed_config import ds_config
from lora_scale.parallel.engine import Engine
from lora_scale.parallel.world import World
from lora_scale.spec.config import RunConfig
from lora_scale.spec.states import keeps_base_flat
from lora_scale.storage.folder import open_folder


def held(here: World, folder: Path, cfg: RunConfig) -> dict[str, int]:
    """Bytes by category of states.States after a step and one more backward pass, and those that none explains."""
    before = {storage._cdata for storage in _storages()}
    base = open_folder(folder)
    model, dropout, _ = setup.build_model(cfg, base)
    parameters, layers = setup.count(model), recompute.decoder_layers(model)
    if cfg.method == "lora":
        model.enable_input_require_grads()
    config = ds_config(
        cfg, 1, recompute.layer_numel(layers), parameters.trainable, sorted({type(layer).__name__ for layer in layers})
    )
    place = grid.make(cfg.parallel, here)
    partitioner: zero3.Partitioner | flat.FlatBase | None = None
    if keeps_base_flat(cfg):
        partitioner = flat.FlatBase(layers, transport.Collective(place.base_group), here.device)
    elif cfg.parallel.zero_stage == 3:
        partitioner = zero3.Partitioner(config, load.dtype_of(cfg), place.base_group)
    load.fill(model, base, here.device, partitioner, {}, place)
    if isinstance(partitioner, flat.FlatBase):
        model.gathering = gathering.Gathering(partitioner)  # type: ignore[assignment]
    ds = Engine(model, cfg, place, config, dropout, {}).ds
    ids = torch.randint(3, 60, (1, 8))
    for last in (False, True):
        logits = ds(input_ids=ids, position_ids=torch.arange(8)[None], use_cache=False).logits
        ds.backward(logits.float().logsumexp(-1).mean())
        del logits
        if not last:
            ds.step()
    return _by_category(ds, ids, before) | _by_product(ds, ids, before)


def _by_category(ds: Any, ids: Tensor, before: set[int]) -> dict[str, int]:
    optimizer, parameters = ds.optimizer, list(ds.module.parameters())
    inner = getattr(optimizer, "optimizer", optimizer)
    flats = [*getattr(optimizer, "fp16_partitioned_groups_flat", []), *getattr(optimizer, "bit16_groups_flat", [])]
    flats += getattr(optimizer, "bf16_groups_flat", [])
    found = {
        "trained": [*flats, *(_held(p) for p in parameters if p.requires_grad)],
        "master": [
            *getattr(optimizer, "fp32_partitioned_groups_flat", []),
            *getattr(optimizer, "single_partition_of_fp32_groups", []),
            *getattr(optimizer, "fp32_groups_flat_partition", []),
        ],
        "gradients": [
            getattr(optimizer, "grad_partitions_flat_buffer", None),
            *getattr(optimizer, "fp32_groups_gradients_flat", []),
            *(p.grad for p in parameters),
            *(getattr(p, "grad_accum", None) for p in parameters),
            *(t for group in (getattr(optimizer, "averaged_gradients", None) or {}).values() for t in group or []),
        ],
        "adam": [t for state in inner.state.values() for name, t in state.items() if name != "step"],
        "bucket": [_buffer(bucket.buffer) for bucket in getattr(optimizer, "ipg_buckets", {}).values()],
    }
    # Frozen tensors lie in one allocation with gaps for alignment: what counts is the elements.
    sizes = {"base": sum(_held(p).numel() * _held(p).element_size() for p in parameters if not p.requires_grad)}
    seen = {_held(p).untyped_storage()._cdata for p in parameters if not p.requires_grad}
    if gathers := getattr(ds.module, "gathering", None):
        sizes["base"] += gathers.base.memory.numel()
        seen |= {t.untyped_storage()._cdata for t in (gathers.base.memory, *gathers.buffers)}
    for category, tensors in found.items():
        storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors if t is not None}
        sizes[category] = sum(storage.nbytes() for key, storage in storages.items() if key not in seen)
        seen |= storages.keys()
    seen |= before | {b.untyped_storage()._cdata for b in ds.module.buffers()} | {ids.untyped_storage()._cdata}
    rest = [storage.nbytes() for storage in _storages() if storage._cdata not in seen]
    small = 256  # bytes; counters, flags and Adam's step numbers
    sizes["unexplained"] = sum(nbytes for nbytes in rest if nbytes > small)
    return sizes


def _by_product(ds: Any, ids: Tensor, before: set[int]) -> dict[str, int]:
    """What the product's own walk finds, and every byte of storages there is but buffers, counters and flags."""
    seconds = []
    walk = memory.Tracked(ds)
    for _ in range(5):
        started = time.thread_time()
        tracked = walk.now()
        seconds.append(time.thread_time() - started)
    aside = before | {ids.untyped_storage()._cdata} | {b.untyped_storage()._cdata for b in ds.module.buffers()}
    storages = {storage._cdata: storage.nbytes() for storage in _storages() if storage._cdata not in aside}
    tensors = [t for _, tensors in walk._tensors() for t in tensors if t is not None]
    tensors += [_held(p) for p in ds.module.parameters()]
    known = {t.untyped_storage()._cdata for t in tensors}  # a norm is as small as a flag
    del tracked["buffers"]
    found = {f"product's {name}": nbytes for name, nbytes in tracked.items()}
    microseconds = round(1e6 * min(seconds) / len(list(ds.module.parameters())))
    everything = sum(nbytes for key, nbytes in storages.items() if nbytes > 256 or key in known)
    return found | {"everything": everything, "microseconds a parameter": microseconds}


def _held(parameter: Tensor) -> Tensor:
    return getattr(parameter, "ds_tensor", parameter.data)


def _buffer(buffer: Any) -> Tensor | None:
    if isinstance(buffer, list | tuple):
        assert not buffer, "stages 1 and 2 give their buckets back after the backward pass"
        return None
    return buffer


def _storages() -> list[Any]:
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if isinstance(thing, Tensor) and thing.device.type == "cpu":
            found[thing.untyped_storage()._cdata] = thing.untyped_storage()
    return list(found.values())
