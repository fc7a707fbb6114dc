"""What a decoder layer keeps for its backward pass: bytes a token, tensor by tensor, as our engine really saves them.

Derived from what autograd saves, with frozen linear layers that keep neither input nor weight (`adapters.frozen`), and
held to that by tests which count the storages of saved tensors of tiny models on a CPU. Families without a `Saved` row
are counted by analogy with Llama, and `is_analogy` says so. Attention is sdpa's: scores are never stored.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lora_scale.spec.architecture import Architecture, Parameter, layer_of
from lora_scale.spec.config import RunConfig
from lora_scale.spec.cost import FP32, ITEMSIZE
from lora_scale.spec.families import FAMILIES, Family, has_suffix
from lora_scale.spec.targets import ranks as adapter_ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """How a family's layer computes, as far as it decides what is saved."""

    norm: Literal["copied", "mean", "lean"] = "copied"  # an fp32 copy; LayerNorm's input and 2 numbers; input and 1
    activation: int = 3  # inner-wide tensors: SwiGLU's gate, its SiLU and up, which the product saves
    remade: tuple[str, ...] = ()  # inputs of adapters that are made again from what is kept anyway (`adapters.lean`)
    output_kept: bool = False  # whether the activation's result, down's input, is among them
    views: bool = False  # q, k and v are views of one tensor, so that keeping v keeps all of it
    rotary: bool = True  # q and k are new tensors after the rotation
    parallel: bool = False  # attention and MLP read norms of the same input
    copies_out: bool = False  # attention's output is laid out anew before its linear layer reads it


_LLAMA = Saved()
_NORMED = ("attention", "mlp")  # both are outputs of norms
LEAN = {  # what `kernels: auto` makes of a family
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3"), Saved(norm="lean", activation=2, remade=(*_NORMED, "down"))
    ),
    "phi3": Saved(norm="lean", remade=_NORMED, views=True, copies_out=True),
}
SAVED = {  # as transformers' own modules keep it
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _LLAMA),
    "phi3": replace(_LLAMA, views=True, copies_out=True),
    # gelu_new is written out: its input, half of it, the tanh and 1 + tanh are four tensors
    "gpt2": Saved(norm="mean", activation=4, views=True, rotary=False),
    "gpt3": Saved(norm="mean", activation=4, rotary=False),
    "gpt_neox": Saved(norm="mean", activation=1, views=True, copies_out=True, parallel=True),
    "opt": Saved(norm="mean", activation=1, output_kept=True, rotary=False),  # ReLU keeps its result
}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """The widths of one decoder layer, in elements a token."""

    hidden: int
    heads: int
    queries: int  # heads x head_dim
    keys: int  # of k, and of v
    key_heads: int
    inner: int  # of the MLP; with experts: of those that one token visits, together
    norms: int  # as wide as hidden
    head_norms: bool  # a norm on each head of q and of k
    routed: int = 0  # experts that one token visits


@dataclass(frozen=True, slots=True)
class Layer:
    """One decoder layer: its widths, its elements, and r of each adapted module by the input that it reads."""

    shape: LayerShape
    numel: int
    adapted: tuple[tuple[str, int, int], ...]  # (which input: attention, out, mlp, down; its width; r)


def saved_by(model: Architecture, cfg: RunConfig) -> Saved:
    """How this run's layers compute."""
    lean = LEAN.get(model.model_type) if cfg.kernels == "auto" else None
    return lean or SAVED.get(model.model_type, _LLAMA)


def is_analogy(model: Architecture) -> bool:
    """Whether `kept` is no count of this family's own saved tensors."""
    return model.model_type not in SAVED


def layers(model: Architecture, cfg: RunConfig) -> list[Layer]:
    """The decoder layers in order."""
    found: dict[str, list[Parameter]] = {}
    for p in model.parameters:
        if layer := layer_of(p.name):
            found.setdefault(layer, []).append(p)
    row = FAMILIES.get("gpt2" if model.model_type == "gpt3" else model.model_type, FAMILIES["llama"])
    adapted = adapter_ranks(model, cfg.lora) if cfg.has_factors else {}
    return [_layer(model, row, parameters, adapted) for parameters in found.values()]


def _layer(model: Architecture, row: Family, parameters: Sequence[Parameter], adapted: dict[str, int]) -> Layer:
    linears = [p for p in parameters if p.kind in ("linear", "conv1d")]
    queries = model.heads * model.head_dim
    fused = next((p for p in linears if row.q == row.k and has_suffix(p.module, row.q)), None)
    key = next((p for p in linears if has_suffix(p.module, row.k)), None)
    keys = (fused.features[1] - queries) // 2 if fused else key.features[1] if key else queries
    downs = [p.features[0] for p in linears if _input_of(row, p, model.hidden) == "down"]
    experts = [p for p in parameters if p.kind == "experts"]
    inner = experts[-1].shape[2] * model.experts_per_token if experts else max(downs, default=4 * model.hidden)
    shape = LayerShape(
        hidden=model.hidden,
        heads=model.heads,
        queries=queries,
        keys=keys,
        key_heads=max(1, keys // model.head_dim),
        inner=inner,
        norms=sum(p.shape == (model.hidden,) and p.name.endswith("weight") for p in parameters),
        head_norms=any(p.name.endswith("q_norm.weight") for p in parameters),
        routed=model.experts_per_token if experts else 0,
    )
    reads = [(_input_of(row, p, model.hidden), p.features[0], p.module) for p in linears if p.module in adapted]
    adapted_here = tuple((source, features, adapted[module]) for source, features, module in reads)
    return Layer(shape, sum(p.numel for p in parameters), adapted_here)


def _input_of(row: Family, p: Parameter, hidden: int) -> str:
    """Which tensor a linear layer reads: the two normed ones, the attention's output, or the activation's."""
    if has_suffix(p.module, row.o):
        return "out"
    if not has_suffix(p.module, row.mlp) and not any(word in p.module for word in ("mlp", "fc")):
        return "attention"
    gets_hidden = p.features[0] == hidden and not p.module.endswith(("down_proj", "fc2", "4h_to_h", "mlp.c_proj"))
    return "mlp" if gets_hidden else "down"


def kept(model: Architecture, layer: Layer, cfg: RunConfig, *, masked: bool, tp: int = 1) -> int:
    """Bytes that one layer keeps for one token, if it is not recomputed.

    `masked`: several documents a block, so that attention gets a mask: its copy in the working precision is kept by
    every layer, and k and v are repeated for every query head. Split by tensor parallelism: heads and inner features.
    """
    saved, width, s = saved_by(model, cfg), ITEMSIZE[cfg.precision], layer.shape
    shared = tp if cfg.parallel.sequence_parallel else 1  # what stands between the blocks is each rank's tokens only
    total = (s.norms * norm(saved, s.hidden, width) - (width * s.hidden if saved.parallel else 0)) // shared
    total += _head_norms(saved, s, width, tp) if s.head_norms else 0
    total += _attention(saved, s, width, masked) // tp
    total += cfg.data.seq_len * width if masked else 0
    total += saved.activation * s.inner * width // tp
    total += s.routed * 2 * s.hidden * width  # each expert's copy of the token, and its output before the weighted sum
    if cfg.method == "full":
        return total + _inputs_of_trained(saved, s, width, tp)
    return total + _inputs_of_adapted(saved, layer.adapted, width, tp, shared, dropout=cfg.lora.dropout > 0.0)


def stays(model: Architecture, layer: Layer, cfg: RunConfig, tp: int = 1) -> int:
    """Of `kept`, what tensors hold that are too small to be brought to host memory: numbers a row and a head, A x."""
    saved, width, s = saved_by(model, cfg), ITEMSIZE[cfg.precision], layer.shape
    shared = tp if cfg.parallel.sequence_parallel else 1
    rows = s.norms * (norm(saved, 0, width)) // shared
    heads = FP32 * (s.heads + (s.heads + s.key_heads if s.head_norms else 0)) // tp
    return rows + heads + sum(width * r for _, _, r in layer.adapted)


def norm(saved: Saved, features: int, width: int) -> int:
    """RMSNorm: its input, copied to fp32 or not, and one reciprocal root; LayerNorm: its input, a mean and a root."""
    if saved.norm == "copied":
        return FP32 * features + FP32
    return width * features + (2 * FP32 if saved.norm == "mean" else FP32)


def _head_norms(saved: Saved, s: LayerShape, width: int, tp: int) -> int:
    wide = FP32 if saved.norm == "copied" else width
    return (wide * (s.queries + s.keys) + FP32 * (s.heads + s.key_heads)) // tp


def _attention(saved: Saved, s: LayerShape, width: int, masked: bool) -> int:
    """q, k, v and the output, and for each head one fp32 logarithm of a sum (flash attention, arXiv 2205.14135)."""
    keys = s.queries if masked else s.keys
    qkv = s.queries + 2 * keys
    if saved.views and keys == s.keys:  # v keeps the tensor it is a view of; q and k are others after a rotation
        whole = s.queries + 2 * s.keys
        qkv = whole + (s.queries + keys if saved.rotary else 0)
    return width * (qkv + s.queries) + FP32 * s.heads


def _inputs_of_adapted(
    saved: Saved, adapted: Iterable[tuple[str, int, int]], width: int, tp: int, shared: int, *, dropout: bool
) -> int:
    """Each adapter keeps A x, r wide; and the input of its module, shared by the modules that read the same one, unless
    it is made again. What dropout leaves of it is always made again, from all tokens."""
    total, seen = 0, set()
    for source, features, r in adapted:
        total += width * r
        if source not in seen and not _is_kept_anyway(saved, source):
            split = tp if source in ("out", "down") else 1 if dropout else shared
            if source not in saved.remade or (dropout and shared > 1 and source in _NORMED):
                total += width * features // split
        seen.add(source)
    return total


def _inputs_of_trained(saved: Saved, s: LayerShape, width: int, tp: int) -> int:
    """Full fine-tuning: the input of every linear layer, and the normed tensor that a norm's weight multiplies."""
    inputs = 2 * s.hidden + (0 if saved.output_kept else s.inner // tp) + (s.queries // tp if saved.copies_out else 0)
    normed = s.norms * s.hidden + (s.queries + s.keys if s.head_norms else 0)
    return width * (inputs + (normed if saved.norm == "copied" else 0))


def _is_kept_anyway(saved: Saved, source: str) -> bool:
    return (source == "out" and not saved.copies_out) or (source == "down" and saved.output_kept)


def workspace(model: Architecture, layer: Layer, cfg: RunConfig, tp: int = 1) -> int:
    """Bytes for one token that a layer's backward pass holds beside what is kept: the larger of its two halves.

    MLP: gradients of the product and its two factors and of the layer's input and output; lean, the factors' take the
    place of the factors. Attention: gradients of q, k, v and the output, q's in fp32 too (flash attention accumulates
    it there).
    """
    width, s = ITEMSIZE[cfg.precision], layer.shape
    wide = 1 if "down" in saved_by(model, cfg).remade else 3
    mlp = width * (wide * s.inner // tp + 2 * s.hidden)
    attention = (width * 4 * s.queries + FP32 * (s.queries + s.heads)) // tp + width * 2 * s.hidden
    return max(mlp, attention)
