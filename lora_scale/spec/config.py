"""A run, as frozen pydantic models. What each key means, its default and its limits are said here and nowhere else.

Reading YAML, overrides and the wording of errors are `spec.configfile`'s.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


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
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation, by transformers' names."""
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


class DataConfig(Section):
    """Rows, and how they become blocks of tokens."""

    train: PathValue
    """JSONL file: rows of {"prompt", "completion"}, {"messages"}, {"text"}, or {"input_ids"} with optional
    {"labels"}."""
    validation: PathValue | float | None = None
    """JSONL file, or a fraction of the training rows (0.02), or nothing: then no validation loss."""
    seq_len: Positive = 1024
    """Tokens a block. A longer row is cut, counted and reported."""
    packing: bool = True
    """Put several documents into one block; attention never crosses from one to another."""
    train_on: Literal["completion", "all"] = "completion"
    """Which tokens carry loss: the completion (the assistant's messages), or every token. {"text"} rows always train
    on all."""
    max_rows: Positive | None = None
    """Use only the first so many training rows."""


class TrainConfig(Section):
    """Steps, batches and the optimizer (AdamW)."""

    epochs: PositiveFloat | None = None
    """Passes over the training blocks. Give this or `max_steps`; with both, the first reached ends the run."""
    max_steps: Positive | None = None
    """Optimizer steps."""
    global_batch_size: Positive = 8
    """Blocks per optimizer step over all ranks. Accumulation steps = global_batch_size / (micro_batch_size x
    data-parallel ranks)."""
    micro_batch_size: Positive = 1
    """Blocks per rank in one forward pass."""
    lr: PositiveFloat = 2e-4
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate after the warm-up; cosine and linear end at 0."""
    warmup_steps: NonNegative = 0
    """Steps of linear warm-up; the first one has learning rate 0 where this is not 0."""
    weight_decay: NonNegativeFloat = 0.0
    """Decoupled weight decay, on trainable tensors with two or more dims."""
    betas: Annotated[tuple[Fraction, Fraction], Field(strict=False)] = (0.9, 0.999)
    """Adam's moment decay rates."""
    eps: PositiveFloat = 1e-8
    """Adam's epsilon."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Clip the gradient's global norm to this; 0 does not clip."""


class EvalConfig(Section):
    """Validation loss during the run. The last step is always evaluated."""

    every: NonNegative = 0
    """Steps between evaluations; 0: before the first step and after the last only."""
    max_blocks: Positive | None = None
    """Evaluate on at most so many validation blocks."""


class SaveConfig(Section):
    """Checkpoints. The last step is always saved."""

    every: NonNegative = 0
    """Steps between checkpoints; 0: after the last step only."""
    keep: Positive = 2
    """How many checkpoints stay; older ones are deleted after a newer one is whole."""


class ParallelConfig(Section):
    """How ranks share the work."""

    zero_stage: Literal[0, 1, 2, 3] = 3
    """DeepSpeed ZeRO stage. 3 partitions the base over the ranks; 0, 1 and 2 keep one whole copy a rank."""
    timeout_minutes: PositiveFloat = 30.0
    """How long a rank waits for the others in one collective before the job fails."""
    hang_seconds: NonNegativeFloat = 300.0
    """A training step hangs that takes longer, and ten times longer than any before it: every rank writes the stacks of
    its threads to `run_dir/log` and ends. 0: never. `lora-scale launch --patience` sets it for its own runs."""


class RunConfig(Section):
    """One training run."""

    model: ModelConfig
    data: DataConfig
    run_dir: PathValue
    """Folder of this run: metrics, logs, checkpoints. `resume` reads it."""
    method: Literal["lora", "full"] = "lora"
    """Train an adapter on a frozen base, or every weight of the base (full fine-tuning)."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of the base and of the arithmetic. Adapter weights and optimizer state are fp32 in both."""
    recompute: Literal["all", "none"] | NonNegative = "all"
    """Decoder layers that keep only their input and recompute the rest in the backward pass: all, none, or the first
    so many
    (elsewhere: gradient or activation checkpointing)."""
    resume: Literal["auto", "never"] | PathValue = "auto"
    """`auto` goes on from the newest checkpoint in `run_dir`; `never` refuses a `run_dir` that has one; or the path
    of a checkpoint."""
    seed: NonNegative = 0
    """Seeds the adapter's initialisation, the data order and dropout. Results do not depend on the number of ranks."""
    lora: LoraConfig = LoraConfig()
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    save: SaveConfig = SaveConfig()
    parallel: ParallelConfig = ParallelConfig()

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        if self.train.epochs is None and self.train.max_steps is None:
            raise ValueError("train.epochs or train.max_steps must be given; for example train.epochs=1")
        if isinstance(self.data.validation, float) and not 0.0 < self.data.validation < 1.0:
            raise ValueError(f"data.validation is {self.data.validation}; a fraction lies between 0 and 1")
        if self.train.global_batch_size % self.train.micro_batch_size:
            raise ValueError(
                f"train.global_batch_size is {self.train.global_batch_size}; it must be a multiple of "
                f"train.micro_batch_size = {self.train.micro_batch_size}"
            )
        return self
