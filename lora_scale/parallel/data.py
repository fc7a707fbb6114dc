"""A run's data on this rank: its part of every step and of the validation blocks. Joins storage's pieces and ranks."""

from dataclasses import dataclass
from typing import Any

from lora_scale.parallel.grid import Grid
from lora_scale.parallel.world import on_rank_zero
from lora_scale.spec import baselines, cost
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.families import family
from lora_scale.storage import dataset, packing
from lora_scale.storage.console import Console
from lora_scale.storage.folder import ModelFolder
from lora_scale.storage.packing import Batch, Blocks
from lora_scale.storage.rows import Rows, read_rows, split
from lora_scale.storage.steps import StepPlan, check_batch_sizes, eval_batches


@dataclass(frozen=True, slots=True)
class Data:
    """Training steps and validation batches of this rank."""

    plan: StepPlan
    blocks: Blocks
    validation: list[Batch]
    notes: list[str]

    def identity(self, cfg: RunConfig) -> dict[str, Any]:
        """What a resumed run must find again."""
        return {"fingerprint": self.blocks.fingerprint(), "blocks": len(self.blocks), "seq_len": cfg.data.seq_len}


def read_data(cfg: RunConfig, folder: ModelFolder, grid: Grid) -> Data:
    """Rows to blocks to steps. The first rank reads and tokenises; every rank gets all blocks and keeps its part of
    each step."""
    check_batch_sizes(cfg.train.global_batch_size, cfg.train.micro_batch_size, grid.dp_size)
    known = family(str(folder.config.get("model_type")))
    if cfg.data.packing and not (known and known.packs):
        raise ConfigError(
            f"data.packing is true, but model type {folder.config.get('model_type')!r} is not known to keep "
            "packed documents apart; set data.packing=false"
        )
    if cfg.data.packing and cfg.model.attention == "flash_attention_2" and cfg.train.micro_batch_size > 1:
        raise ConfigError(
            f"model.attention is flash_attention_2 and train.micro_batch_size is {cfg.train.micro_batch_size}: it "
            "keeps packed documents apart at 1 only; set train.micro_batch_size=1 with a larger data.seq_len, or "
            "model.attention=sdpa"
        )
    blocks, validation = on_rank_zero(lambda: blocks_of_run(cfg, folder))
    train = cfg.train
    plan = StepPlan(
        blocks,
        train.global_batch_size,
        train.micro_batch_size,
        grid.dp_rank,
        grid.dp_size,
        cfg.seed,
        train.epochs,
        train.max_steps,
    )
    batches = []
    if validation is not None:
        batches = eval_batches(validation, train.micro_batch_size, grid.dp_rank, grid.dp_size, cfg.eval.max_blocks)
    return Data(plan, blocks, batches, blocks.documents.notes())


def blocks_of_run(cfg: RunConfig, folder: ModelFolder) -> tuple[Blocks, Blocks | None]:
    """Training and validation blocks of the whole run."""
    rows = read_rows(cfg.data.train, cfg.data.max_rows)
    held_out = None
    if isinstance(cfg.data.validation, float):
        rows, held_out = split(rows, cfg.data.validation, cfg.seed)
    elif cfg.data.validation is not None:
        held_out = read_rows(cfg.data.validation, None)
    tokenizer = dataset.tokenizer(folder.path, cfg.model.trust_remote_code)
    vocab_size, prefix = folder.config.get("vocab_size"), baselines.prefix_tokens(cfg)

    def blocks_of(part: Rows) -> Blocks:
        documents = dataset.encode(part, tokenizer, cfg.data.seq_len - prefix, cfg.data.train_on, vocab_size)
        return packing.pack(packing.with_prefix(documents, prefix), cfg.data.packing)

    return blocks_of(rows), blocks_of(held_out) if held_out is not None else None


def say_data(cfg: RunConfig, data: Data, grid: Grid, screen: Console) -> None:
    """Two lines: what there is, and how it is walked through."""
    stats = data.blocks.stats()
    screen.line(
        f"data     {stats['rows']:,} rows -> {len(data.blocks):,} blocks of {cfg.data.seq_len} tokens "
        f"({data.blocks.efficiency:.1%} full, {stats['target_tokens']:,} tokens trained)"
    )
    accumulation = cost.accumulation_steps(cfg, grid.world.size)
    ranks = f"{grid.dp_size} rank{'s' * (grid.dp_size > 1)}"
    if grid.tp_size > 1:
        ranks = f"{grid.dp_size} x {grid.tp_size} (data x tensor parallel) ranks"
    screen.line(
        f"steps    {data.plan.total_steps:,} of {cfg.train.global_batch_size} blocks: {ranks} x "
        f"{cfg.train.micro_batch_size} a pass x {accumulation} accumulated; ZeRO-{cfg.parallel.zero_stage}, "
        f"{cfg.precision}, {grid.world.device.type}"
    )
