"""What a run costs: parameters, bytes on each rank and on disk, floating point operations. Every definition is here.

Pure arithmetic on an `Architecture` and a config. Two kinds of figures, never mixed: model states and sizes on disk are
exact; `Estimates` are formulas that say so, uncalibrated. Not counted at all: `NOT_COUNTED`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from math import ceil, prod
from typing import Any

from lora_scale.spec import baselines
from lora_scale.spec.architecture import Architecture, Config
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError, ModelError
from lora_scale.spec.shapes import architecture
from lora_scale.spec.targets import adapter_shapes

Shape = Sequence[int]

ITEMSIZE = {"bf16": 2, "fp32": 4}
FP32 = 4
ADAM = 8  # exp_avg and exp_avg_sq, fp32
REDUCE_BUCKET = 50_000_000  # elements at most; the smaller of this and what trains
MIXED_ADAM = 16  # bytes a parameter: bf16 weight 2 and gradient 2, fp32 master 4, Adam 8 (arXiv 1910.02054)
NOT_COUNTED = "CUDA context, NCCL, allocator waste, copies in flight, buckets of ZeRO-1 and 2, host memory"


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Bytes of model states on the rank that holds most, as DeepSpeed 0.19 keeps them."""

    base: int  # frozen weights
    trained: int  # weights that train, in the form the forward pass reads
    master: int  # the fp32 copy the optimizer steps; of fp32 adapters too: DeepSpeed copies them all the same
    gradients: int
    adam: int
    bucket: int  # where gradients are collected before they are reduced

    @property
    def total(self) -> int:
        return self.base + self.trained + self.master + self.gradients + self.adam + self.bucket


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """Bytes on one rank by plain formulas, in the working precision; t = tokens of a micro-batch on a rank."""

    gathered: int  # ZeRO-3: two decoder layers, the one at work and the next
    layer_inputs: int  # t x hidden for each layer that recomputes
    layers_kept: int  # t x (outputs of the linear layers + one activation + 8 hidden) for each layer that does not
    one_layer: int  # the same for the one layer that is being recomputed
    logits: int  # t x vocabulary x (fp32 copy and its log-softmax or gradient, and the precision's own)

    @property
    def total(self) -> int:
        """The last two are not held at the same time."""
        return self.gathered + self.layer_inputs + self.layers_kept + max(self.one_layer, self.logits)


def total(model: Architecture) -> int:
    """Parameters of the model; a tied one counts once."""
    return sum(p.numel for p in model.parameters)


def computing(model: Architecture) -> int:
    """N: the parameters that a token is multiplied with.

    Without the input embedding and positions, which are looked up; of the experts, those of one token. A tied table
    counts, since it is the output layer too.
    """
    n = 0
    for p in model.parameters:
        if p.kind == "experts":
            n += p.numel * model.experts_per_token // model.experts
        elif p.kind == "table":
            n += p.numel if model.tied else 0
        elif p.kind != "positions":
            n += p.numel
    return n


def trained_shapes(model: Architecture, cfg: RunConfig) -> list[Shape]:
    """The shapes of everything that trains: the adapter's factors, the model, or what another method puts in."""
    if cfg.method == "full":
        return [p.shape for p in model.parameters]
    if cfg.method != "lora":
        return list(baselines.shapes(model, cfg))
    return list(adapter_shapes(model, cfg.lora))


def numel(shapes: Iterable[Shape]) -> int:
    """Elements of all of them together."""
    return sum(prod(shape) for shape in shapes)


def accumulation_steps(cfg: RunConfig, ranks: int) -> int:
    """Micro-batches per optimizer step on each data-parallel rank; a global batch that does not divide is an error."""
    per_pass = cfg.train.micro_batch_size * ranks
    if cfg.train.global_batch_size % per_pass:
        below = cfg.train.global_batch_size // per_pass * per_pass
        near = " or ".join(str(n) for n in (below, below + per_pass) if n)
        raise ConfigError(
            f"train.global_batch_size is {cfg.train.global_batch_size}; with {ranks} ranks and "
            f"train.micro_batch_size = {cfg.train.micro_batch_size} it must be a multiple of {per_pass}, "
            f"for example {near}"
        )
    return cfg.train.global_batch_size // per_pass


def model_states(model: Architecture, cfg: RunConfig, ranks: int) -> States:
    """Bytes held when gradients and Adam's moments are both there: at the end of a step's last backward pass."""
    frozen = [] if cfg.method == "full" else [p.shape for p in model.parameters]
    return states(frozen, trained_shapes(model, cfg), cfg, ranks)


def states(frozen: Iterable[Shape], trained: Sequence[Shape], cfg: RunConfig, ranks: int) -> States:
    """The same from shapes. ZeRO-3 cuts every tensor into ceil(numel / ranks) elements a rank; stages 1 and 2 lay what
    trains end to end, tensors that decay apart from those that do not, padded to a multiple of 2 x ranks elements."""
    stage, width = cfg.parallel.zero_stage, ITEMSIZE[cfg.precision]
    trained_width = width if cfg.method == "full" else FP32
    base = width * sum(ceil(prod(shape) / (ranks if stage == 3 else 1)) for shape in frozen)
    groups = [[prod(s) for s in trained if (len(s) >= 2) is decays] for decays in (True, False)]
    if stage == 0:
        whole = numel(trained)
        return States(base=base, trained=FP32 * whole, master=0, gradients=FP32 * whole, adam=ADAM * whole, bucket=0)
    if stage == 3:
        held = part = sum(ceil(prod(shape) / ranks) for shape in trained)
        gradients, bucket = FP32 * part, FP32 * reduce_bucket(numel(trained))
    else:
        held = sum(_padded(group, ranks) for group in groups)
        part, bucket = held // ranks, 0
        gradients = _gradients(groups, held, trained_width, cfg, ranks)
    return States(
        base=base,
        trained=trained_width * held,
        master=FP32 * part,
        gradients=gradients,
        adam=ADAM * part,
        bucket=bucket,
    )


def _gradients(groups: Sequence[Sequence[int]], held: int, trained_width: int, cfg: RunConfig, ranks: int) -> int:
    """Stages 1 and 2: bytes of gradients on the rank that holds most."""
    whole = sum(map(sum, groups))
    accumulates = cfg.train.global_batch_size > cfg.train.micro_batch_size * ranks
    if cfg.parallel.zero_stage == 1 and trained_width != FP32:
        return FP32 * held + trained_width * whole  # DeepSpeed's bf16 optimizer keeps an fp32 sum beside every .grad
    if cfg.parallel.zero_stage == 1 and accumulates:
        return FP32 * whole  # cut only after the last micro-batch
    if trained_width != FP32:
        return FP32 * (held // ranks)
    return FP32 * max(_overlapping(groups, ranks))


def _overlapping(groups: Sequence[Sequence[int]], ranks: int) -> list[int]:
    """Elements of the tensors that reach into each rank's part, whole: fp32 gradients are kept as views into them."""
    per_rank = [0] * ranks
    for group in groups:
        part, start = _padded(group, ranks) // ranks, 0
        for size in group:
            for rank in range(start // part, (start + size - 1) // part + 1):
                per_rank[rank] += size
            start += size
        for rank in range(ranks):
            per_rank[rank] += max(0, (rank + 1) * part - max(start, rank * part))
    return per_rank


def _padded(group: Sequence[int], ranks: int) -> int:
    return ceil(sum(group) / (2 * ranks)) * 2 * ranks


def reduce_bucket(trained: int) -> int:
    """Elements of DeepSpeed's reduce_bucket_size. Stage 3 allocates it for the whole run."""
    return max(1024, min(trained, REDUCE_BUCKET))


def full_fine_tuning(cfg: RunConfig) -> RunConfig:
    """The same job with every weight trained. In bf16 stage 0 has no fp32 copy to train: there it is stage 1."""
    parallel = cfg.parallel
    if parallel.zero_stage == 0 and cfg.precision == "bf16":
        parallel = parallel.model_copy(update={"zero_stage": 1})
    return cfg.model_copy(update={"method": "full", "parallel": parallel})


def estimates(model: Architecture, cfg: RunConfig) -> Estimates:
    """What grows with the micro-batch, and ZeRO-3's gathered layers; sdpa, so that attention stores no scores."""
    width, tokens = ITEMSIZE[cfg.precision], cfg.train.micro_batch_size * cfg.data.seq_len
    layers, kept_a_token = model.layers, _kept_a_token(model)
    recomputed = layers if cfg.recompute == "all" else 0 if cfg.recompute == "none" else min(layers, cfg.recompute)
    return Estimates(
        gathered=2 * width * layer_numel(model) if cfg.parallel.zero_stage == 3 else 0,
        layer_inputs=recomputed * tokens * model.hidden * width,
        layers_kept=(layers - recomputed) * tokens * kept_a_token * width,
        one_layer=tokens * kept_a_token * width if recomputed else 0,
        logits=tokens * model.vocabulary * (2 * FP32 + width),
    )


def layer_numel(model: Architecture) -> int:
    """Elements of one decoder layer, on average."""
    outside = sum(p.numel for p in model.parameters if p.kind in ("table", "positions", "output"))
    return (total(model) - outside) // model.layers


def _kept_a_token(model: Architecture) -> int:
    """Elements of activations that a decoder layer keeps for one token; of the experts, those that the token visits."""
    outputs = widest = 0
    for p in model.parameters:
        if p.kind in ("linear", "conv1d"):
            outputs += p.features[1]
            widest = max(widest, p.features[1])
        elif p.kind == "experts":
            outputs += p.shape[1] * model.experts_per_token
    return outputs // model.layers + widest + 8 * model.hidden


def export_bytes(trained: int) -> int:
    """An exported adapter (or model) in 16 bits."""
    return 2 * trained


def checkpoint_bytes(trained: int) -> int:
    """A training checkpoint: fp32 values and Adam's two moments, of trainable tensors only."""
    return (FP32 + ADAM) * trained


def flops_per_token(model: Architecture, cfg: RunConfig) -> int:
    """4N where the base is frozen (forward 2N, gradient of the input 2N), 6N where it trains (of the weight 2N more).

    Neither recompute nor the adapter's own operations are counted. N is `computing`; arXiv 2001.08361, section 2.1.
    """
    return (6 if cfg.method == "full" else 4) * computing(model)


def attention_flops_per_token(model: Architecture, attended: float) -> float:
    """Forward 4 x layers x heads x head_dim for each key a token attends to (scores, then values), backward twice that.

    `attended` is the mean over tokens: (n + 1) / 2 in a causal document of n tokens.
    """
    return 12.0 * model.layers * model.heads * model.head_dim * attended


def tflops(flops_a_token: float, tokens_per_second_per_gpu: float) -> float:
    """Model TFLOP/s of one GPU: `tflops_4n` in records where `flops_a_token` is 4N."""
    return flops_a_token * tokens_per_second_per_gpu / 1e12


def mfu(flops_a_token: float, tokens_per_second_per_gpu: float, peak_tflops: float) -> float:
    """Model FLOP utilisation (arXiv 2204.02311, appendix B). `flops_a_token` is with attention here."""
    return tflops(flops_a_token, tokens_per_second_per_gpu) / peak_tflops


def plan_row(config: Config, cfg: RunConfig, ranks: int) -> dict[str, Any]:
    """What is predicted of a run, for its manifest; only the reason where the model type is not known."""
    try:
        return plan(architecture(config), cfg, ranks)
    except ModelError as error:
        return {"unknown": str(error)}


def plan(model: Architecture, cfg: RunConfig, ranks: int) -> dict[str, Any]:
    """Every figure of `lora-scale plan`, in bytes and counts, beside the same job as full fine-tuning."""
    row: dict[str, Any] = {"ranks": ranks, "accumulation_steps": accumulation_steps(cfg, ranks)}
    row["parameters"] = {"total": total(model), "computing": computing(model)}
    jobs = {"this_run": cfg} if cfg.method == "full" else {"this_run": cfg, "full_fine_tuning": full_fine_tuning(cfg)}
    for name, job in jobs.items():
        trained = numel(trained_shapes(model, job))
        held, guessed = model_states(model, job, ranks), estimates(model, job)
        row[name] = {
            "trainable": trained,
            "model_states": asdict(held) | {"total": held.total},
            "estimates": asdict(guessed) | {"total": guessed.total},
            "export": export_bytes(trained),
            "checkpoint": checkpoint_bytes(trained),
            "flops_per_token": flops_per_token(model, job),
        }
    return row
