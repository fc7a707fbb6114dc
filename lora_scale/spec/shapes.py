"""Every parameter of a model, from config.json alone: names as transformers' `named_parameters`, and shapes.

Knows how each family's layers are built; no torch, no files. What the numbers cost is `spec.cost`'s. Sizes that every
config.json states are required; the others have transformers' defaults. Tests hold both to transformers (meta device).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from lora_scale.spec.architecture import Architecture, Config, Kind, Parameter, divided, option, size
from lora_scale.spec.errors import ModelError


def architecture(config: Config) -> Architecture:
    """What transformers builds from this config.json; ModelError for a model_type without a row here."""
    model_type = str(config.get("model_type"))
    if model_type not in BUILDERS:
        raise ModelError(
            f"config.json has model_type {model_type!r}, whose parameters are not known here; "
            f"known are {', '.join(sorted(BUILDERS))}"
        )
    return BUILDERS[model_type](config)


def _linear(module: str, d_in: int, d_out: int, bias: bool = False, kind: Kind = "linear") -> Iterator[Parameter]:
    yield Parameter(f"{module}.weight", (d_in, d_out) if kind == "conv1d" else (d_out, d_in), kind)
    if bias:
        yield Parameter(f"{module}.bias", (d_out,))


def _norm(module: str, width: int, bias: bool = False) -> Iterator[Parameter]:
    yield Parameter(f"{module}.weight", (width,))
    if bias:
        yield Parameter(f"{module}.bias", (width,))


def _whole(
    config: Config, tied_by_default: bool, table: str, width: int, body: Iterable[Parameter], **sizes: int
) -> Architecture:
    """The body between the token table and the output layer, which is the table again where they are tied."""
    vocabulary = size(config, "vocab_size")
    tied = bool(config.get("tie_word_embeddings", tied_by_default))
    parameters = [Parameter(table, (vocabulary, width), "table"), *body]
    if not tied:
        parameters += _linear("lm_head", width, vocabulary, kind="output")
    return Architecture(
        model_type=str(config["model_type"]),
        parameters=tuple(parameters),
        tied=tied,
        vocabulary=vocabulary,
        alibi=config["model_type"] == "bloom" or bool(config.get("alibi", False)),
        **sizes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Llama:
    """How the many descendants of Llama differ in shape."""

    kv_heads: int | None = None  # default; None: as many as heads
    head_dim: int | None = None  # default; None: hidden / heads
    biased: Literal["never", "qkv", "attention_bias"] = "never"  # the last: as that key says, o included
    mlp_bias: bool = False  # whether the key mlp_bias is read
    head_norms: bool = False
    fused: bool = False
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    tied: bool = False
    experts: Literal["", "mixtral", "qwen"] = ""


def _llama(config: Config, row: _Llama) -> Architecture:
    hidden, heads = size(config, "hidden_size"), size(config, "num_attention_heads")
    head_dim = config.get("head_dim") or row.head_dim or divided(config, hidden, heads)
    given = config.get("num_key_value_heads", row.kv_heads)
    kv_heads = heads if given is None else size({"num_key_value_heads": given}, "num_key_value_heads")
    layers = size(config, "num_hidden_layers")
    experts = size(config, "num_experts", "num_local_experts") if row.experts else 0
    body: list[Parameter] = []
    queries, keys = heads * head_dim, kv_heads * head_dim
    for i in range(layers):
        layer = f"model.layers.{i}"
        body += _llama_attention(config, row, f"{layer}.self_attn", hidden, queries, keys, head_dim)
        body += _llama_mlp(config, row, f"{layer}.mlp", hidden, experts if _has_experts(config, row, i) else 0)
        for norm in row.norms:
            body += _norm(f"{layer}.{norm}", hidden)
    body += _norm("model.norm", hidden)
    sizes = {"layers": layers, "hidden": hidden, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    if experts:
        default = 2 if row.experts == "mixtral" else 8
        sizes |= {"experts": experts, "experts_per_token": option(config, "num_experts_per_tok", default)}
    return _whole(config, row.tied, "model.embed_tokens.weight", hidden, body, **sizes)


def _llama_attention(
    config: Config, row: _Llama, module: str, hidden: int, queries: int, keys: int, head_dim: int
) -> Iterator[Parameter]:
    o_bias = row.biased == "attention_bias" and bool(config.get("attention_bias", False))
    qkv_bias = o_bias or row.biased == "qkv"
    if row.fused:
        yield from _linear(f"{module}.qkv_proj", hidden, queries + 2 * keys, qkv_bias)
    else:
        for name, width in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            yield from _linear(f"{module}.{name}", hidden, width, qkv_bias)
    yield from _linear(f"{module}.o_proj", queries, hidden, o_bias)
    if row.head_norms:
        yield from _norm(f"{module}.q_norm", head_dim)
        yield from _norm(f"{module}.k_norm", head_dim)


def _has_experts(config: Config, row: _Llama, layer: int) -> bool:
    if row.experts != "qwen":
        return bool(row.experts)
    dense = layer in (config.get("mlp_only_layers") or ())
    return not dense and (layer + 1) % option(config, "decoder_sparse_step", 1) == 0


def _llama_mlp(config: Config, row: _Llama, module: str, hidden: int, experts: int) -> Iterator[Parameter]:
    if experts:
        inner = size(config, "moe_intermediate_size" if row.experts == "qwen" else "intermediate_size")
        yield Parameter(f"{module}.gate.weight", (experts, hidden))  # the router: a parameter, not a linear layer
        yield Parameter(f"{module}.experts.gate_up_proj", (experts, 2 * inner, hidden), "experts")
        yield Parameter(f"{module}.experts.down_proj", (experts, hidden, inner), "experts")
        return
    inner, bias = size(config, "intermediate_size"), row.mlp_bias and bool(config.get("mlp_bias", False))
    if row.fused:
        yield from _linear(f"{module}.gate_up_proj", hidden, 2 * inner, bias)
    else:
        yield from _linear(f"{module}.gate_proj", hidden, inner, bias)
        yield from _linear(f"{module}.up_proj", hidden, inner, bias)
    yield from _linear(f"{module}.down_proj", inner, hidden, bias)


def _gpt2(config: Config, fused: bool = True) -> Architecture:
    """`fused=False` keeps q, k and v as square matrices, as the LoRA paper counts GPT-3; the total is the same."""
    hidden, layers, heads = size(config, "n_embd", "hidden_size"), size(config, "n_layer"), size(config, "n_head")
    inner = option(config, "n_inner", 4 * hidden)
    conv = partial(_linear, bias=True, kind="conv1d")
    positions = size(config, "n_positions", "max_position_embeddings")
    body = [Parameter("transformer.wpe.weight", (positions, hidden), "positions")]
    for i in range(layers):
        layer = f"transformer.h.{i}"
        body += _norm(f"{layer}.ln_1", hidden, bias=True)
        for name, width in (("c_attn", 3 * hidden),) if fused else (("q", hidden), ("k", hidden), ("v", hidden)):
            body += conv(f"{layer}.attn.{name}", hidden, width)
        body += conv(f"{layer}.attn.c_proj", hidden, hidden)
        body += _norm(f"{layer}.ln_2", hidden, bias=True)
        body += conv(f"{layer}.mlp.c_fc", hidden, inner)
        body += conv(f"{layer}.mlp.c_proj", inner, hidden)
    body += _norm("transformer.ln_f", hidden, bias=True)
    sizes = _one_key_a_head(config, layers, hidden, heads)
    return _whole(config, True, "transformer.wte.weight", hidden, body, **sizes)


def _falcon(config: Config) -> Architecture:
    hidden, heads = size(config, "hidden_size", "n_embed"), size(config, "num_attention_heads", "n_head")
    layers, bias = size(config, "num_hidden_layers", "n_layer"), bool(config.get("bias", False))
    head_dim, grouped = divided(config, hidden, heads), bool(config.get("new_decoder_architecture", False))
    kv_heads = heads
    if grouped:
        kv_heads = option(config, "num_kv_heads", heads)
    elif config.get("multi_query", True):
        kv_heads = 1
    norms: tuple[str, ...] = ("input_layernorm",)
    if not config.get("parallel_attn", True):
        norms = ("post_attention_layernorm", "input_layernorm")
    elif option(config, "num_ln_in_parallel_attn", 2 if grouped else 1) == 2:
        norms = ("ln_attn", "ln_mlp")
    inner = option(config, "ffn_hidden_size", 4 * hidden)
    body: list[Parameter] = []
    for i in range(layers):
        layer = f"transformer.h.{i}"
        qkv = hidden + 2 * kv_heads * head_dim
        body += _fused_block(layer, "self_attention", hidden, qkv, inner, norms, bias, bias)
    body += _norm("transformer.ln_f", hidden, bias=True)
    sizes = {"layers": layers, "hidden": hidden, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    return _whole(config, True, "transformer.word_embeddings.weight", hidden, body, **sizes)


def _bloom(config: Config) -> Architecture:
    hidden = size(config, "n_embed", "hidden_size")
    layers, heads = size(config, "n_layer", "num_hidden_layers"), size(config, "n_head", "num_attention_heads")
    body = list(_norm("transformer.word_embeddings_layernorm", hidden, bias=True))
    norms = ("input_layernorm", "post_attention_layernorm")
    for i in range(layers):
        body += _fused_block(f"transformer.h.{i}", "self_attention", hidden, 3 * hidden, 4 * hidden, norms, True, True)
    body += _norm("transformer.ln_f", hidden, bias=True)
    sizes = _one_key_a_head(config, layers, hidden, heads)
    return _whole(config, True, "transformer.word_embeddings.weight", hidden, body, **sizes)


def _gpt_neox(config: Config) -> Architecture:
    hidden, layers = size(config, "hidden_size"), size(config, "num_hidden_layers")
    heads, inner = size(config, "num_attention_heads"), size(config, "intermediate_size")
    bias, norms = bool(config.get("attention_bias", True)), ("input_layernorm", "post_attention_layernorm")
    body: list[Parameter] = []
    for i in range(layers):
        body += _fused_block(f"gpt_neox.layers.{i}", "attention", hidden, 3 * hidden, inner, norms, bias, True)
    body += _norm("gpt_neox.final_layer_norm", hidden, bias=True)
    sizes = _one_key_a_head(config, layers, hidden, heads)
    return _whole(config, False, "gpt_neox.embed_in.weight", hidden, body, **sizes)


def _one_key_a_head(config: Config, layers: int, hidden: int, heads: int) -> dict[str, int]:
    head_dim = divided(config, hidden, heads)
    return {"layers": layers, "hidden": hidden, "heads": heads, "kv_heads": heads, "head_dim": head_dim}


def _fused_block(
    layer: str, attention: str, hidden: int, qkv: int, inner: int, norms: Iterable[str], bias: bool, mlp_bias: bool
) -> Iterator[Parameter]:
    """A layer of Falcon, BLOOM or GPT-NeoX."""
    for norm in norms:
        yield from _norm(f"{layer}.{norm}", hidden, bias=True)
    yield from _linear(f"{layer}.{attention}.query_key_value", hidden, qkv, bias)
    yield from _linear(f"{layer}.{attention}.dense", hidden, hidden, bias)
    yield from _linear(f"{layer}.mlp.dense_h_to_4h", hidden, inner, mlp_bias)
    yield from _linear(f"{layer}.mlp.dense_4h_to_h", inner, hidden, mlp_bias)


def _opt(config: Config) -> Architecture:
    hidden, layers = size(config, "hidden_size"), size(config, "num_hidden_layers")
    heads, inner = size(config, "num_attention_heads"), size(config, "ffn_dim")
    width = option(config, "word_embed_proj_dim", hidden)
    bias, affine = bool(config.get("enable_bias", True)), bool(config.get("layer_norm_elementwise_affine", True))

    def norm(module: str) -> Iterable[Parameter]:
        return _norm(module, hidden, bias=True) if affine else ()

    positions = size(config, "max_position_embeddings") + 2  # OPT's offset: the first two rows are for padding
    body = [Parameter("model.decoder.embed_positions.weight", (positions, hidden), "positions")]
    if width != hidden:
        body += _linear("model.decoder.project_out", hidden, width)
        body += _linear("model.decoder.project_in", width, hidden)
    if config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False):
        body += norm("model.decoder.final_layer_norm")
    for i in range(layers):
        layer = f"model.decoder.layers.{i}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            body += _linear(f"{layer}.self_attn.{name}", hidden, hidden, bias)
        body += norm(f"{layer}.self_attn_layer_norm")
        body += _linear(f"{layer}.fc1", hidden, inner, bias)
        body += _linear(f"{layer}.fc2", inner, hidden, bias)
        body += norm(f"{layer}.final_layer_norm")
    sizes = _one_key_a_head(config, layers, hidden, heads)
    return _whole(config, True, "model.decoder.embed_tokens.weight", width, body, **sizes)


_GEMMA_NORMS = (*_Llama().norms, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_GEMMA = _Llama(kv_heads=4, head_dim=256, biased="attention_bias", norms=_GEMMA_NORMS, tied=True)

BUILDERS: dict[str, Callable[[Config], Architecture]] = {
    "llama": partial(_llama, row=_Llama(biased="attention_bias", mlp_bias=True)),
    "mistral": partial(_llama, row=_Llama(kv_heads=8)),
    "qwen2": partial(_llama, row=_Llama(kv_heads=32, biased="qkv")),
    "qwen3": partial(_llama, row=_Llama(kv_heads=32, head_dim=128, biased="attention_bias", head_norms=True)),
    "gemma2": partial(_llama, row=_GEMMA),
    "gemma3_text": partial(_llama, row=replace(_GEMMA, head_norms=True)),
    "phi3": partial(_llama, row=_Llama(fused=True)),
    "qwen3_moe": partial(_llama, row=_Llama(kv_heads=4, biased="attention_bias", head_norms=True, experts="qwen")),
    "mixtral": partial(_llama, row=_Llama(kv_heads=8, experts="mixtral")),
    "gpt2": _gpt2,
    "gpt3": partial(_gpt2, fused=False),
    "falcon": _falcon,
    "bloom": _bloom,
    "gpt_neox": _gpt_neox,
    "opt": _opt,
}


_COMMON = ("num_hidden_layers", "hidden_size", "num_attention_heads")
_TABLE_NAMES = ("embed", "wte", "wpe")


def from_tensors(config: Config, tensors: Mapping[str, tuple[int, ...]]) -> Architecture:
    """A model whose type has no row, from the tensors in its files.

    A matrix called `*.weight` is taken for a linear layer unless its name says that it is a table. Every expert is
    counted as if each token met it.
    """
    layers, hidden, heads = (size(config, name) for name in _COMMON)
    parameters = []
    for name, shape in tensors.items():
        kind: Kind = "other"
        if len(shape) == 2 and name.endswith(".weight"):
            table = any(word in name for word in _TABLE_NAMES)
            kind = "table" if table else "output" if name == "lm_head.weight" else "linear"
        parameters.append(Parameter(name, shape, kind))
    return Architecture(
        model_type=str(config.get("model_type")),
        parameters=tuple(parameters),
        tied="lm_head.weight" not in tensors,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=option(config, "num_key_value_heads", heads),
        head_dim=config.get("head_dim") or divided(config, hidden, heads),
        vocabulary=size(config, "vocab_size"),
    )
