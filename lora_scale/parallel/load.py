"""The base model: built empty, then filled. Every rank reads the bytes it keeps, straight to where they stay.

No rank-0 load, no broadcast, no all-gather, no whole tensor in host memory, no mmap. Where the bytes lie is
`spec.layout`'s knowledge and what is in the folder `storage.folder`'s; this module joins them with the model and the
device.
"""

import importlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_scale.adapters.lora import file_name
from lora_scale.parallel.zero3 import Partitioner
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError, ModelError
from lora_scale.spec.layout import ByteRange, Placement, TensorEntry, byte_ranges
from lora_scale.storage.folder import ModelFolder, sources, unused
from lora_scale.storage.weights import Reader

CHUNK = 8 << 20  # bytes a read; 12 threads x 2 pinned buffers x 8 MiB stay under 256 MiB of host memory
THREADS_GPU, THREADS_CPU = 12, 2  # one thread fills a GPU at 3.7 GB/s, twelve at 22 (docs/log.md)
ALIGNMENT = 512  # bytes; what the CUDA allocator and NCCL like a tensor to start at
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
            model = transformers.AutoModelForCausalLM.from_config(
                config,
                dtype=dtype_of(cfg),
                attn_implementation=cfg.model.attention,
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
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not cfg.model.trust_remote_code:
        raise ModelError(f"{path} has model_type {model_type!r}, which is no causal language model")
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


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of one tensor of the files and the run of elements (flat, on the device where it stays) that they fill."""

    range: ByteRange
    target: Tensor


@dataclass(slots=True)
class Loaded:
    """What loading took, on this rank."""

    nbytes: int = 0
    seconds: float = 0.0
    partitions: dict[str, Tensor] = field(default_factory=dict)  # parameter name -> what this rank keeps, flat
    unused: tuple[str, ...] = ()  # tensors of the files that no parameter took

    @property
    def gb_per_second(self) -> float:
        return self.nbytes / 1e9 / self.seconds if self.seconds else 0.0


def fill(
    model: nn.Module,
    folder: ModelFolder,
    device: torch.device,
    partitioner: Partitioner | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Loaded:
    """Give every meta parameter of the model its memory on `device` and its values from the folder.

    With a partitioner each becomes a ZeRO-3 parameter and only this rank's partition is read; without, the whole
    tensor. Parameters that are not on the meta device (adapters) are left alone. Tied parameters stay one.
    `progress(done, total)` is called with bytes of this rank.
    """
    start = time.perf_counter()
    placement = Placement(zero_rank=partitioner.rank, zero_size=partitioner.size) if partitioner else Placement()
    homes = _homes(model)
    entries = {name: _sources(model, folder, name, parameter) for name, parameter, _ in homes}
    storage = _allocate(homes, partitioner, device)
    pieces: list[Piece] = []
    for name, parameter, owners in homes:
        flat = storage[name]
        pieces.extend(_pieces(entries[name], placement, flat))
        adopted = partitioner.adopt(parameter, flat) if partitioner else _whole(parameter, flat)
        for module, key in owners:
            module._parameters[key] = adopted
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(device)
    nbytes = _read(pieces, device, progress)
    left = unused(folder, (entry for found in entries.values() for entry in found), _tied(model))
    return Loaded(nbytes, time.perf_counter() - start, storage, tuple(left))


Home = tuple[str, nn.Parameter, list[tuple[nn.Module, str]]]


def _homes(model: nn.Module) -> list[Home]:
    """(name, parameter, every module and key that holds it), for parameters on the meta device; a tied one comes
    once."""
    found: dict[int, Home] = {}
    for prefix, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                name = f"{prefix}.{key}" if prefix else key
                found.setdefault(id(parameter), (name, parameter, []))[2].append((module, key))
    return list(found.values())


def _sources(model: nn.Module, folder: ModelFolder, name: str, parameter: nn.Parameter) -> list[TensorEntry]:
    prefix = getattr(model, "base_model_prefix", "")
    return sources(folder, file_name(name), tuple(parameter.shape), prefix, _tied(model))


def _tied(model: nn.Module) -> dict[str, str]:
    return dict(getattr(model, "all_tied_weights_keys", None) or {})


def _allocate(homes: list[Home], partitioner: Partitioner | None, device: torch.device) -> dict[str, Tensor]:
    """Flat memory for what this rank keeps of each parameter, padding zeroed.

    Frozen parameters share one allocation, so that the allocator wastes nothing between them. Trainable ones have
    their own: DeepSpeed moves them into buffers of its own and frees these.
    """
    sizes = {name: partitioner.partition_numel(p.numel()) if partitioner else p.numel() for name, p, _ in homes}
    flat: dict[str, Tensor] = {}
    frozen = [(name, p) for name, p, _ in homes if not p.requires_grad]
    for dtype in {p.dtype for _, p in frozen}:
        step = ALIGNMENT // dtype.itemsize
        offsets, total = {}, 0
        for name, p in frozen:
            if p.dtype == dtype:
                offsets[name] = total
                total += -(-sizes[name] // step) * step
        whole = torch.empty(total, dtype=dtype, device=device)
        flat.update({name: whole.narrow(0, offset, sizes[name]) for name, offset in offsets.items()})
    flat.update({n: torch.empty(sizes[n], dtype=p.dtype, device=device) for n, p, _ in homes if p.requires_grad})
    return flat


def _whole(parameter: nn.Parameter, flat: Tensor) -> nn.Parameter:
    return nn.Parameter(flat.view(parameter.shape), requires_grad=parameter.requires_grad)


def _pieces(entries: list[TensorEntry], placement: Placement, flat: Tensor) -> Iterator[Piece]:
    done = 0
    for run in byte_ranges(entries, placement):
        size = DTYPES[run.dtype].itemsize
        for offset in range(0, run.length, CHUNK):
            length = min(CHUNK, run.length - offset)
            piece = ByteRange(run.file, run.offset + offset, length, run.dtype)
            yield Piece(piece, flat.narrow(0, done, length // size))
            done += length // size
    flat.narrow(0, done, flat.numel() - done).zero_()


def _read(pieces: list[Piece], device: torch.device, progress: Callable[[int, int], None]) -> int:
    """Fill every piece with a few threads. The first error ends the others and is raised here."""
    total, done, lock, failed = sum(p.range.length for p in pieces), 0, threading.Lock(), threading.Event()
    threads = THREADS_GPU if device.type == "cuda" else THREADS_CPU
    queue = iter(pieces)

    def work() -> None:
        nonlocal done
        landing = _Landing(device)
        try:
            while not failed.is_set():
                with lock:
                    piece = next(queue, None)
                if piece is None:
                    break
                landing.take(reader, piece)
                with lock:
                    done += piece.range.length
                    progress(done, total)
        except BaseException:
            failed.set()
            raise
        finally:
            landing.finish()

    with Reader() as reader, ThreadPoolExecutor(threads) as pool:
        for future in [pool.submit(work) for _ in range(threads)]:
            future.result()
    return total


class _Landing:
    """Where one thread's reads arrive: the tensor itself on a CPU of equal dtype, else two buffers used in turn."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers: list[Tensor] = []
        self.events: list[Any] = []
        self.turn = 0

    def take(self, reader: Reader, piece: Piece) -> None:
        dtype, target = DTYPES[piece.range.dtype], piece.target
        if self.stream is None and dtype == target.dtype:
            reader.read_into(piece.range, memoryview(target.view(torch.uint8).numpy()))
            return
        buffer = self._next_buffer()[: piece.range.length]
        reader.read_into(piece.range, memoryview(buffer.numpy()))
        if self.stream is None:
            target.copy_(buffer.view(dtype))
            return
        with torch.cuda.stream(self.stream):
            target.copy_(buffer.view(dtype).to(self.device, non_blocking=True))
            self.events[self.turn].record(self.stream)

    def _next_buffer(self) -> Tensor:
        """The buffer used the time before last, once its copy is over."""
        if len(self.buffers) < 2:
            self.buffers.append(torch.empty(CHUNK, dtype=torch.uint8, pin_memory=self.stream is not None))
            if self.stream is not None:
                self.events.append(torch.cuda.Event())
            self.turn = len(self.buffers) - 1
            return self.buffers[-1]
        self.turn = 1 - self.turn
        if self.stream is not None:
            self.events[self.turn].synchronize()
        return self.buffers[self.turn]

    def finish(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()
