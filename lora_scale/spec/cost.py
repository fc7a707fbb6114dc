"""What a run costs in counts: parameters, sizes on disk, floating point operations. Every definition is here.

Pure arithmetic on an `Architecture` and a config, exact. Bytes on a GPU are `spec.memory`'s.
"""

from collections.abc import Iterable, Sequence
from math import prod

from lora_scale.spec.architecture import Architecture
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError

Shape = Sequence[int]

ITEMSIZE = {"bf16": 2, "fp32": 4}
FP32 = 4
ADAM = 8  # exp_avg and exp_avg_sq, fp32
REDUCE_BUCKET = 50_000_000  # elements at most; the smaller of this and what trains
MIXED_ADAM = 16  # bytes a parameter: bf16 weight 2 and gradient 2, fp32 master 4, Adam 8 (arXiv 1910.02054)


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


def numel(shapes: Iterable[Shape]) -> int:
    """Elements of all of them together."""
    return sum(prod(shape) for shape in shapes)


def accumulation_steps(cfg: RunConfig, ranks: int) -> int:
    """Micro-batches per optimizer step on each data-parallel rank; a global batch that does not divide is an error."""
    copies = ranks // cfg.parallel.tensor_parallel_size
    per_pass = cfg.train.micro_batch_size * copies
    if cfg.train.global_batch_size % per_pass:
        below = cfg.train.global_batch_size // per_pass * per_pass
        near = " or ".join(str(n) for n in (below, below + per_pass) if n)
        raise ConfigError(
            f"train.global_batch_size is {cfg.train.global_batch_size}; with {copies} data-parallel ranks and "
            f"train.micro_batch_size = {cfg.train.micro_batch_size} it must be a multiple of {per_pass}, "
            f"for example {near}"
        )
    return cfg.train.global_batch_size // per_pass


def divides(cfg: RunConfig, ranks: int) -> bool:
    """Whether so many ranks can take the config's global batch and tensor-parallel groups."""
    copies, left = divmod(ranks, cfg.parallel.tensor_parallel_size)
    return not left and copies > 0 and not cfg.train.global_batch_size % (cfg.train.micro_batch_size * copies)


def reduce_bucket(trained: int) -> int:
    """Elements of DeepSpeed's reduce_bucket_size. Stage 3 allocates it for the whole run."""
    return max(1024, min(trained, REDUCE_BUCKET))


def full_fine_tuning(cfg: RunConfig) -> RunConfig:
    """The same job with every weight trained, sharded by ZeRO alone. In bf16 stage 0 has no fp32 copy to train: there
    it is stage 1."""
    alone = {"tensor_parallel_size": 1, "sequence_parallel": False, "base_sharding": "world"}
    parallel = cfg.parallel.model_copy(update=alone)
    if parallel.zero_stage == 0 and cfg.precision == "bf16":
        parallel = parallel.model_copy(update={"zero_stage": 1})
    return cfg.model_copy(update={"method": "full", "parallel": parallel, "activation_offloading": "none"})


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
