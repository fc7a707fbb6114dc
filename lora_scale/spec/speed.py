"""How long a step takes, roughly: a sum of times with named sources, to rank layouts by. Not a promise of speed.

seconds of a pass = matrix products / matrix rate + attention / attention rate + what activations move / memory rate
+ what collectives move / link rate, as far as nothing hides them. The flat base's gathers hide behind everything else,
tokens that tensor-parallel ranks exchange (`parallel.overlap`) behind products; all else is waited for: DeepSpeed's
gathers added about their own time to a pass (docs/benchmarks). Two constants are fitted to a run each, `TRAFFIC`.
"""

from dataclasses import dataclass, replace

from lora_scale.spec import activations, cost
from lora_scale.spec.architecture import Architecture
from lora_scale.spec.config import RunConfig
from lora_scale.spec.hardware import Gpu
from lora_scale.spec.kept import offloaded_layers, recomputed_layers
from lora_scale.spec.memory import Parts, Work, shares_tokens
from lora_scale.spec.states import Grid, keeps_base_flat

MATRIX = 0.68  # of the data sheet's rate: 673 of 989 TFLOP/s, products in a step of llama-100.7b on two H200s
ATTENTION = 0.4  # of the same, forward and backward together, in that step
TRAFFIC = {"auto": 11.7, "none": 23.4}  # by `kernels`: times that a kept byte crosses GPU memory, both ways together
FITTED_ON = "llama-7.2b without recompute on one H200: 17,311 and 13,640 tokens/s (docs/benchmarks, 2026-11-22)"
COLLECTIVE = 0.5  # of the link's rate, by NCCL: 221 of 450 GB/s for 84 MB between two H200s
HOST = 45e9  # bytes a second between a GPU and host memory, one direction: PCIe 5.0 x16
FORWARD = 1 / 3  # of the work of a pass; what recompute does again
NETWORK = 50e9  # bytes a second between nodes, a GPU: one port of 400 Gbit/s; assumed


@dataclass(frozen=True, slots=True, kw_only=True)
class Seconds:
    """Of one pass, forward and backward, on one rank."""

    matrix: float
    attention: float
    traffic: float
    gathers: float = 0.0  # ZeRO-3: the base, twice; what nothing hides
    sums: float = 0.0  # tensor parallelism: two sums a layer forward and two backward; what nothing hides
    offloading: float = 0.0  # activations to host memory and back; what nothing hides

    @property
    def computing(self) -> float:
        return self.matrix + self.attention + self.traffic

    @property
    def total(self) -> float:
        return self.computing + self.gathers + self.sums + self.offloading


def seconds_of_pass(
    model: Architecture, cfg: RunConfig, grid: Grid, work: Work, parts: Parts, gpu: Gpu, gpus_per_node: int
) -> Seconds:
    """One micro-batch. Gradients of adapters and the optimizer's step are left out: megabytes."""
    alone = _computing(model, cfg, grid, work, parts, gpu)
    tokens, layers = cfg.train.micro_batch_size * cfg.data.seq_len, len(parts.layers)
    share = recomputed_layers(cfg, layers) / max(1, layers)
    sums = _sums(model, cfg, grid, gpu, gpus_per_node, tokens, layers, share)
    if shares_tokens(cfg) and cfg.parallel.overlap and cfg.train.micro_batch_size == 1:
        sums = max(0.0, sums - alone.matrix)
    gathers = _gathers(model, cfg, grid, gpu, gpus_per_node)
    if keeps_base_flat(cfg):
        gathers = max(0.0, gathers - alone.computing)
    each_way = len(offloaded_layers(cfg, layers)) / max(1, layers) * _kept(model, cfg, grid, work, parts) / HOST
    forward = FORWARD * alone.computing
    offloading = max(0.0, each_way - forward) + max(0.0, each_way - 2 * forward)
    return replace(alone, gathers=gathers, sums=sums, offloading=offloading)


def _computing(model: Architecture, cfg: RunConfig, grid: Grid, work: Work, parts: Parts, gpu: Gpu) -> Seconds:
    """Of one pass, without what moves between GPUs."""
    tokens = cfg.train.micro_batch_size * cfg.data.seq_len
    share = recomputed_layers(cfg, len(parts.layers)) / max(1, len(parts.layers))
    peak = gpu.peak_tflops * 1e12
    recompute = 2 * _computing_again(model, cfg, parts) * share
    attention = cost.attention_flops_per_token(model, cfg.data.seq_len / 2)
    moved = _kept(model, cfg, grid, work, parts) * TRAFFIC[cfg.kernels]
    return Seconds(
        matrix=tokens * (cost.flops_per_token(model, cfg) + recompute) / grid.tp / (MATRIX * peak),
        attention=tokens * attention * (1 + FORWARD * share) / grid.tp / (ATTENTION * peak),
        traffic=moved * (1 + FORWARD * share) / gpu.memory_bandwidth,
    )


def _computing_again(model: Architecture, cfg: RunConfig, parts: Parts) -> int:
    """The parameters that recompute of all layers multiplies a token with. The output layer's are none of them; nor are
    those of a layer's last product where they are frozen and no adapter reads its input: torch stops where all that was
    kept is there again."""
    n = cost.computing(model) - model.vocabulary * model.hidden
    if cfg.method == "full":
        return n
    last = (x for x in parts.layers if not x.shape.routed and all(source != "down" for source, *_ in x.adapted))
    return n - sum(layer.shape.inner * layer.shape.hidden for layer in last)


def _kept(model: Architecture, cfg: RunConfig, grid: Grid, work: Work, parts: Parts) -> float:
    """Bytes that all layers would keep in a pass, if none recomputed."""
    each = (activations.kept(model, layer, cfg, masked=work.masked, tp=grid.tp) for layer in parts.layers)
    return cfg.train.micro_batch_size * cfg.data.seq_len * float(sum(each))


def offloaded_in_time(model: Architecture, cfg: RunConfig, grid: Grid, work: Work, parts: Parts, gpu: Gpu) -> float:
    """The share of layers whose activations can be copied to host memory while a forward pass without recompute
    computes, at most 1."""
    kept = cfg.model_copy(update={"recompute": "none"})
    forward = FORWARD * _computing(model, kept, grid, work, parts, gpu).computing
    return min(1.0, forward * HOST / _kept(model, cfg, grid, work, parts))


def tokens_per_second(cfg: RunConfig, grid: Grid, seconds: float) -> float:
    """Of all ranks together."""
    return cfg.train.micro_batch_size * cfg.data.seq_len * grid.dp / seconds


def _gathers(model: Architecture, cfg: RunConfig, grid: Grid, gpu: Gpu, gpus_per_node: int) -> float:
    """Each of two all-gathers brings (n - 1) / n of the base over the slowest link, and copies it once in memory."""
    over = grid.base_over or grid.dp
    if cfg.parallel.zero_stage != 3 or over == 1:
        return 0.0
    nbytes = cost.ITEMSIZE[cfg.precision] * cost.total(model) / grid.tp
    return 2 * (
        nbytes * (over - 1) / over / link(gpu, over * grid.tp, gpus_per_node) + 2 * nbytes / gpu.memory_bandwidth
    )


def _sums(
    model: Architecture,
    cfg: RunConfig,
    grid: Grid,
    gpu: Gpu,
    gpus_per_node: int,
    tokens: int,
    layers: int,
    share: float,
) -> float:
    """A ring moves 2 (n - 1) / n of a tensor of tokens x hidden in each sum (Megatron-LM, arXiv 1909.08053)."""
    if grid.tp == 1:
        return 0.0
    nbytes = tokens * model.hidden * cost.ITEMSIZE[cfg.precision]
    return layers * (4 + 2 * share) * nbytes * 2 * (grid.tp - 1) / grid.tp / link(gpu, grid.tp, gpus_per_node)


def link(gpu: Gpu, ranks: int, gpus_per_node: int) -> float:
    """Bytes a second, one direction, that collectives bring over the slowest link in a group of neighbours."""
    return COLLECTIVE * gpu.link_bandwidth if ranks <= gpus_per_node else NETWORK
