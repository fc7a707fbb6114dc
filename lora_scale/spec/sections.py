"""The base of a config's sections, the kinds of their values, and the sections that say what is trained."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Frozen; unknown keys and silent conversions ("8" for 8, "off" for false) are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0, allow_inf_nan=False)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
PathValue = Annotated[Path, Field(strict=False)]
Names = Annotated[tuple[str, ...], Field(strict=False)]


class ModelConfig(Section):
    """The base model."""

    path: str
    """Folder with `config.json` and safetensors files, or a name on the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub; ignored for a folder."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Read that code first."""
    attention: Literal["auto", "documents", "sdpa", "eager", "flash_attention_2"] = "auto"
    """Attention implementation, by transformers' names; `documents` is ours: without masks, nothing is computed between
    the documents of a block, and FlashAttention-3 on Hopper GPUs where flash-attn-3 or xformers 0.0.34 is installed.
    `auto`: documents on GPUs, for the model types that have it; else sdpa."""
    dropout: Fraction = 0.0
    """Dropout probability of the base's own layers. Not the adapter's: that is `lora.dropout`."""


class LoraConfig(Section):
    """The adapter; used when `method` is `lora`."""

    r: Positive = 8
    """Rank of the update (PEFT: r)."""
    lora_alpha: PositiveFloat = 16.0
    """The update is scaled by lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`."""
    dropout: Fraction = 0.0
    """Dropout probability on the adapter's input (PEFT: lora_dropout)."""
    target_modules: Names = ("q", "v")
    """Which linear layers are adapted. Roles (`q`, `k`, `v`, `o`, `mlp`, `all-linear`), names as in the model
    (`q_proj`), or
    regular expressions that must match a whole module name (`re:.*layers\\.[0-3]\\..*q_proj`)."""
    rank_pattern: dict[str, Positive] = {}
    """Another r for the modules whose name matches a pattern (PEFT: rank_pattern)."""
    alpha_pattern: dict[str, PositiveFloat] = {}
    """Another lora_alpha for the modules whose name matches a pattern (PEFT: alpha_pattern)."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r): https://arxiv.org/abs/2312.03732."""
    init_A: Literal["kaiming", "gaussian"] = "kaiming"
    """Distribution of A at the start: PEFT's default, or the paper's Gaussian (standard deviation 1/r, as PEFT's). B
    starts at zero."""
    use_dora: bool = False
    """Train the length of each row of the adapted weights too (DoRA, https://arxiv.org/abs/2402.09353)."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Biases that train beside the factors: of the adapted layers, or all that the base has (PEFT: bias)."""
    modules_to_save: Names = ()
    """Linear layers and embeddings of the base that train whole, as `[lm_head, embed_tokens]` (PEFT: modules_to_save).
    Each is in every checkpoint and export."""
    trainable_token_indices: Annotated[tuple[NonNegative, ...], Field(strict=False)] = ()
    """Ids of tokens, new ones say, whose rows of the input embedding train, and of the output layer where it shares its
    weight (PEFT: trainable_token_indices)."""
    pissa: Literal["full"] | Positive | None = None
    """Start both factors at the principal components of each weight (PiSSA, https://arxiv.org/abs/2404.02948): by a
    `full` decomposition, or by so many subspace iterations, 4 to 16 as a rule (PEFT: init_lora_weights pissa and
    pissa_niter_N)."""


class BaselineConfig(Section):
    """The other methods of the LoRA paper's Table 4; used when `method` is one of them."""

    prefix_tokens: Positive = 16
    """`preembed` and `prelayer`: positions with trained vectors before each document. They count in `data.seq_len`."""
    bottleneck: Positive = 8
    """`adapter-h` and `adapter-l`: features between the two matrices of a bottleneck (the paper's r)."""
