"""What differs between model families, one row each: names of projections, and how files and model name one tensor.

Knows module names only: no sizes (`spec.shapes`), no torch. A new family is one row, held to transformers by tests.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

ROLES = ("q", "k", "v", "o", "mlp")
ALL_LINEAR = "all-linear"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One `model_type`. Module names are dotted suffixes: `c_proj` is two in GPT-2, so its row says `attn.c_proj`.

    Where q, k and v name one module, the family keeps them in one fused matrix and they cannot be adapted apart.
    """

    q: tuple[str, ...]
    k: tuple[str, ...]
    v: tuple[str, ...]
    o: tuple[str, ...]
    mlp: tuple[str, ...]
    packs: bool  # position_ids that start again at 0 keep the documents of one block apart (mask and positions both)
    colwise: tuple[str, ...] = ()  # tensor parallel: split along output features
    rowwise: tuple[str, ...] = ()  # split along input features; the outputs are summed
    fused: Literal["parts", "groups"] | None = None  # q, k, v in one matrix: side by side, or by groups of heads
    halves: tuple[str, ...] = ()  # colwise matrices that are two, one after the other
    divided: tuple[str, ...] = ()  # what their modules count: attributes (`config.` ones on a copy), of one rank's part
    grad_summed: tuple[str, ...] = ()  # whole on every tensor-parallel rank, but each rank sees a part of the gradient
    packed: dict[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # parameter -> its tensors in files, per expert {e}
    renamed: tuple[tuple[str, str], ...] = ()  # (in files, in the model), where the two differ in a part of the name

    def file_tensors(self, parameter: str, n_experts: int) -> tuple[str, ...]:
        """Names in files of the tensors that, laid end to end, are `parameter`: one, except for fused experts."""
        for packed, parts in self.packed.items():
            if parameter.endswith(packed):
                head = parameter.removesuffix(packed)
                return tuple(self._in_files(head + part.format(e=e)) for e in range(n_experts) for part in parts)
        return (self._in_files(parameter),)

    def _in_files(self, name: str) -> str:
        for in_files, in_model in self.renamed:
            name = name.replace(in_model, in_files)
        return name


_LLAMA = Family(
    q=("q_proj",),
    k=("k_proj",),
    v=("v_proj",),
    o=("o_proj",),
    mlp=("gate_proj", "up_proj", "down_proj"),
    packs=True,
    colwise=("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
    rowwise=("o_proj", "down_proj"),
)
_FUSED = Family(  # Falcon, BLOOM and GPT-NeoX agree on these names
    q=("query_key_value",),
    k=("query_key_value",),
    v=("query_key_value",),
    o=("self_attention.dense",),
    mlp=("dense_h_to_4h", "dense_4h_to_h"),
    packs=False,
    fused="groups",
)
_HEAD_NORMS = ("q_norm", "k_norm")

# Attention is scores, their scale, and a window, and nothing else: `parallel/documents.py` computes it
WITHOUT_MASKS = ("llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen3_moe")

FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": replace(_LLAMA, grad_summed=_HEAD_NORMS),
    "gemma2": _LLAMA,
    "gemma3_text": replace(_LLAMA, grad_summed=_HEAD_NORMS),
    "phi3": Family(  # transformers' plan gathers the outputs of fused matrices; ours cuts q, k and v each
        q=("qkv_proj",),
        k=("qkv_proj",),
        v=("qkv_proj",),
        o=("o_proj",),
        mlp=("gate_up_proj", "down_proj"),
        packs=True,
        colwise=("qkv_proj", "gate_up_proj"),
        rowwise=("o_proj", "down_proj"),
        fused="parts",
        halves=("gate_up_proj",),
        divided=("num_key_value_heads", "config.num_attention_heads"),
    ),
    "gpt2": Family(
        q=("attn.c_attn",),
        k=("attn.c_attn",),
        v=("attn.c_attn",),
        o=("attn.c_proj",),
        mlp=("mlp.c_fc", "mlp.c_proj"),
        packs=True,
        colwise=("attn.c_attn", "mlp.c_fc"),
        rowwise=("attn.c_proj", "mlp.c_proj"),
        fused="parts",
        divided=("split_size",),
    ),
    # Falcon, OPT and BLOOM build their mask without position_ids (BLOOM has no positions at all): documents would mix.
    "falcon": replace(
        _FUSED,
        colwise=("query_key_value", "dense_h_to_4h"),
        rowwise=("self_attention.dense", "dense_4h_to_h"),
        divided=("num_heads", "num_kv_heads"),
    ),
    "bloom": _FUSED,
    "opt": replace(_LLAMA, o=("self_attn.out_proj",), mlp=("fc1", "fc2"), packs=False, colwise=(), rowwise=()),
    "gpt_neox": replace(
        _FUSED,
        o=("attention.dense",),
        packs=True,
        colwise=("query_key_value", "dense_h_to_4h"),  # rows of its fused matrix lie head by head
        rowwise=("attention.dense", "dense_4h_to_h"),
        renamed=(("embed_out.", "lm_head."),),
    ),
    # Experts are fused parameters, not linear layers: no role reaches them. `mlp` is the dense layers, where there are.
    "qwen3_moe": replace(
        _LLAMA,
        grad_summed=_HEAD_NORMS,
        packed={
            "mlp.experts.gate_up_proj": ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"),
            "mlp.experts.down_proj": ("mlp.experts.{e}.down_proj.weight",),
        },
    ),
    "mixtral": replace(
        _LLAMA,
        mlp=(),
        colwise=("q_proj", "k_proj", "v_proj"),
        rowwise=("o_proj",),
        packed={
            "mlp.experts.gate_up_proj": ("mlp.experts.{e}.w1.weight", "mlp.experts.{e}.w3.weight"),
            "mlp.experts.down_proj": ("mlp.experts.{e}.w2.weight",),
        },
        renamed=(("block_sparse_moe.", "mlp."),),
    ),
}


def family(model_type: str) -> Family | None:
    """The row of a family, or None for one that has none: names of modules still work there, roles do not."""
    return FAMILIES.get(model_type)


def roles(model_type: str) -> dict[str, tuple[str, ...]]:
    """Module name suffixes by role, without roles the family has no linear layers for; empty for an unknown family."""
    row = family(model_type)
    named = {role: getattr(row, role) for role in ROLES} if row else {}
    return {role: suffixes for role, suffixes in named.items() if suffixes}


def has_suffix(module: str, suffixes: Iterable[str]) -> bool:
    """Whether a dotted name ends in one of `suffixes`, at a dot: `attn.c_proj` is no suffix of `crossattn.c_proj`."""
    return any(module == suffix or module.endswith("." + suffix) for suffix in suffixes)
