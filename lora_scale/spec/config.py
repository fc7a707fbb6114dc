"""A run, as frozen pydantic models. What each key means, its default and its limits are said here and nowhere else.

Reading YAML, overrides and the wording of errors are `spec.configfile`'s.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lora_scale.spec import consistency
from lora_scale.spec.sections import (
    BaselineConfig as BaselineConfig,
)
from lora_scale.spec.sections import (
    Fraction as Fraction,
)
from lora_scale.spec.sections import (
    LoraConfig as LoraConfig,
)
from lora_scale.spec.sections import (
    ModelConfig as ModelConfig,
)
from lora_scale.spec.sections import (
    Names as Names,
)
from lora_scale.spec.sections import (
    NonNegative as NonNegative,
)
from lora_scale.spec.sections import (
    NonNegativeFloat as NonNegativeFloat,
)
from lora_scale.spec.sections import (
    PathValue as PathValue,
)
from lora_scale.spec.sections import (
    Positive as Positive,
)
from lora_scale.spec.sections import (
    PositiveFloat as PositiveFloat,
)
from lora_scale.spec.sections import (
    Section as Section,
)


class Source(Section):
    """One of several sources of rows."""

    path: str
    """As `data.train`: a file, a folder of the datasets library, or a name on the hub."""
    weight: PositiveFloat = 1.0
    """Passes over this source in one epoch: 2 shows each row twice, 0.25 another quarter of its blocks in each."""
    max_rows: Positive | None = None
    """Use only the first so many rows; null: as `data.max_rows`."""
    split: str = "train"
    """Split of a `datasets` folder or name."""
    subset: str | None = None
    """Subset (configuration) of a `datasets` name."""
    fields: dict[str, str] | None = None
    """As `data.fields`, for this source."""


Sources = Annotated[tuple[Source, ...], Field(strict=False, min_length=1)]


class DataConfig(Section):
    """Rows, and how they become blocks of tokens."""

    train: PathValue | Sources
    """The training rows. A JSONL, JSON, CSV or Parquet file, a folder of the `datasets` library or a name on the hub;
    or a list of such sources, mixed (keys below). Rows of {"prompt", "completion"}, {"messages"}, {"conversations"},
    {"instruction", "output"}, {"text"} or {"input_ids"}."""
    validation: PathValue | float | None = None
    """Another file, or a fraction of the training rows (0.02), or nothing: then no validation loss."""
    fields: dict[str, str] = {}  # noqa: RUF012 - pydantic copies it
    """Other names of what a row holds, ours first: {prompt: question, completion: answer}."""
    seq_len: Positive = 1024
    """Tokens a block. A longer row is cut, counted and reported."""
    packing: bool = True
    """Put several documents into one block; attention never crosses from one to another."""
    train_on: Literal["completion", "last", "assistant", "all"] = "completion"
    """Which tokens carry loss: of a prompt its completion, of a conversation all that the assistant says (the same as
    `assistant`), only its last message (`last`), or every token (`all`). {"text"} rows always train on all."""
    chat_template: str | None = None
    """How a conversation is written where the model has no template of its own, or another is wanted: `chatml`,
    `alpaca`, or the path of a Jinja file."""
    max_rows: Positive | None = None
    """Use only the first so many training rows, of each source."""
    cache: PathValue | None = None
    """Folder of tokenised data, seen by every host; nothing: `prepared` beside `run_dir`."""


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
    loraplus_lr_ratio: PositiveFloat = 1.0
    """Learning rate of B over that of A, which is `lr` (LoRA+, https://arxiv.org/abs/2402.12354, and PEFT's name of
    it)."""
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
    generate: PathValue | None = None
    """Rows to be continued, greedily, at each evaluation after the first step: a file in any form of `data.train`. What
    is written goes to `generated/` in the run directory, its scores to metrics.jsonl."""
    generate_rows: Positive = 8
    """Use the first so many of them."""
    max_new_tokens: Positive = 64
    """Tokens of a completion at most."""


class SaveConfig(Section):
    """Checkpoints."""

    last: bool = True
    """Save after the last step. `false` is for runs that are only measured; an interrupted one still saves."""
    every: NonNegative = 0
    """Steps between checkpoints; 0: after the last step only."""
    keep: Positive = 2
    """How many checkpoints stay; older ones are deleted after a newer one is whole."""
    best: Literal["val_loss"] | None = None
    """Keep the checkpoint of the lowest validation loss too, in `checkpoints/best`; each evaluation that is the best so
    far saves one."""

    @property
    def most(self) -> int:
        """Checkpoints that lie on the disk at once; 0 where none is meant to be written."""
        return self.keep + 1 + (self.best is not None) if self.last or self.every or self.best else 0


class ParallelConfig(Section):
    """How ranks share the work."""

    zero_stage: Literal[0, 1, 2, 3] = 3
    """DeepSpeed ZeRO stage. 3 partitions the base over the ranks; 0, 1 and 2 keep one whole copy a rank."""
    tensor_parallel_size: Positive = 1
    """Ranks that compute one layer together, each with its part of the weights (adjacent ranks: keep them on one node).
    The others are data-parallel; ZeRO partitions over those."""
    sequence_parallel: bool = False
    """Tensor-parallel ranks also share the tokens between attention and MLP: norms, residuals and what recompute keeps
    take 1 / tensor_parallel_size of the memory (elsewhere: Megatron's sequence parallelism)."""
    overlap: bool = True
    """With sequence_parallel, where a pass is one block: tokens are exchanged behind the products beside them, within a
    node by copy engines. `false` waits for collectives instead."""
    base_engine: Literal["flat", "deepspeed"] = "flat"
    """Who keeps and gathers a frozen base under `zero_stage: 3`: `flat`, which cuts each layer into one piece a rank
    and gathers it whole, ahead, into one of two buffers; or DeepSpeed's ZeRO-3, parameter by parameter. `method: full`
    is always DeepSpeed's."""
    base_transport: Literal["auto", "collective"] = "auto"
    """How `flat` brings pieces together: `auto` lets the GPUs of one node read each other's memory where they can, and
    else uses all-gathers, as `collective` always does."""
    base_sharding: Literal["world", "node"] = "world"
    """Over which ranks ZeRO-3 partitions the frozen base: all, or those of one node (elsewhere: hpZ, FSDP's hybrid
    sharding). With `node` every node holds one copy and only adapter gradients cross nodes."""
    load_from: Literal["every_node", "one_node"] = "every_node"
    """With `base_sharding: node`: every node reads its copy of the base from the files, or the first node does and the
    others receive it over the network, for a file system that many nodes at once would slow down."""
    adapter_sharding: Literal["auto", "replicate", "zero"] = "auto"
    """Whether ZeRO-3 keeps the adapter whole on every rank, which is faster, or partitions it. `auto` replicates one
    that costs a rank less than 1 GiB."""
    timeout_minutes: PositiveFloat = 30.0
    """How long a rank waits for the others in one collective before the job fails."""
    hang_seconds: NonNegativeFloat = 300.0
    """A training step hangs that takes longer, and ten times longer than any before it: every rank writes the stacks of
    its threads to `run_dir/log` and ends. 0: never. `lora-scale launch --patience` sets it for its own runs."""


class MemoryConfig(Section):
    """What is recorded of memory beyond the rows of every step."""

    snapshot_steps: Annotated[tuple[Positive, Positive] | None, Field(strict=False)] = None
    """First and last step of which every rank records each allocation on its GPU, into `log/snapshot-000.pickle`, for
    PyTorch's memory viewer. Slows those steps."""


class EngineConfig(Section):
    """What goes past this config."""

    deepspeed: PathValue | dict[str, Any] = {}  # noqa: RUF012
    """Further keys of DeepSpeed's configuration, or the path of a JSON file with them. A key that this config owns is
    refused by name; the whole of it, as used, is `deepspeed.json` in the run directory."""


class EarlyStopConfig(Section):
    """Ending a run that no longer gets better."""

    patience: Positive | None = None
    """Stop, as finished, after so many evaluations in a row without a lower validation loss; nothing: never."""


class TrackConfig(Section):
    """Copies of metrics.jsonl elsewhere. A tracker that fails is warned of once and stops no run."""

    tensorboard: bool = False
    """Write event files into `tensorboard/` in the run directory."""
    wandb: str | None = None
    """Project of Weights & Biases; without a route to its server the run is kept offline in the run directory."""
    name: str | None = None
    """Name of the run there; nothing: the last part of `run_dir`."""


class RunConfig(Section):
    """One training run."""

    model: ModelConfig
    data: DataConfig
    run_dir: PathValue
    """Folder of this run: metrics, logs, checkpoints. `resume` reads it."""
    method: Literal[
        "lora", "full", "bitfit", "preembed", "prelayer", "adapter-h", "adapter-l", "lora+preembed", "lora+prelayer"
    ] = "lora"
    """Train an adapter on a frozen base, or every weight of the base (full fine-tuning). The others are there to be
    compared with, as in the LoRA paper: biases; vectors before each document, at the input or at every layer;
    bottlenecks after attention and MLP (Houlsby), or after the MLP (Lin); factors and vectors together."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of the base and of the arithmetic. Adapter weights and optimizer state are fp32 in both."""
    recompute: Literal["all", "none", "auto"] | NonNegative = "all"
    """Decoder layers that keep only their input and recompute the rest in the backward pass: all, none, or the first
    so many
    (elsewhere: gradient or activation checkpointing). `auto`: the fewest that fit by `lora-scale plan`; none without a
    GPU."""
    activation_offloading: Literal["all", "none", "auto"] | NonNegative = "none"
    """Decoder layers, of those that do not recompute, whose activations wait for the backward pass in pinned host
    memory: all (but the last two), none, or so many, spread evenly. Copies run beside the computation. `auto`: as
    many as the link to the host carries in that time before any layer recomputes; none without a GPU."""
    kernels: Literal["auto", "none"] = "auto"
    """`auto`: norms, SwiGLU and rotation of known families by Liger's kernels on GPUs, and in forms that keep less for
    the backward pass everywhere. `none`: transformers' own modules."""
    resume: Literal["auto", "never"] | PathValue = "auto"
    """`auto` goes on from the newest checkpoint in `run_dir`; `never` refuses a `run_dir` that has one; or the path
    of a checkpoint."""
    init_adapter: PathValue | None = None
    """Start from the values of this adapter, with a fresh optimizer: a run, a checkpoint, or a folder that `export` or
    PEFT wrote. What it adapts and how must be what `lora` says. Not read when the run resumes."""
    allow_other_base: bool = False
    """Take an `init_adapter` that was trained on another base."""
    seed: NonNegative = 0
    """Seeds the adapter's initialisation, the data order and dropout. Results do not depend on the number of ranks."""
    lora: LoraConfig = LoraConfig()
    baseline: BaselineConfig = BaselineConfig()
    train: TrainConfig
    max_hours: PositiveFloat | None = None
    """Hours after which a job saves, stops and exits with 75, to be queued again; counted from its start. Slurm's own
    limit is seen without this."""
    eval: EvalConfig = EvalConfig()
    early_stop: EarlyStopConfig = EarlyStopConfig()
    save: SaveConfig = SaveConfig()
    parallel: ParallelConfig = ParallelConfig()
    memory: MemoryConfig = MemoryConfig()
    engine: EngineConfig = EngineConfig()
    track: TrackConfig = TrackConfig()

    @property
    def has_factors(self) -> bool:
        """Whether LoRA's factors train, alone or beside vectors."""
        return self.method.startswith("lora")

    @property
    def has_prefix(self) -> bool:
        """Whether vectors train in the place of a document's first positions."""
        return self.method.endswith(("preembed", "prelayer"))

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        consistency.check(self)
        return self
