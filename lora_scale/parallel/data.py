"""A run's data on this rank: its part of every step and of the validation blocks. Joins storage's pieces and ranks."""

from dataclasses import dataclass
from typing import Any

from lora_scale.parallel import classes
from lora_scale.parallel.grid import Grid
from lora_scale.parallel.waiting import first_rank_works
from lora_scale.parallel.world import on_every_rank
from lora_scale.spec import cost
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.families import family
from lora_scale.storage import prepared
from lora_scale.storage.console import Console, bar
from lora_scale.storage.folder import ModelFolder
from lora_scale.storage.mixture import Mixture
from lora_scale.storage.packing import Batch
from lora_scale.storage.steps import StepPlan, check_batch_sizes, eval_batches


@dataclass(frozen=True, slots=True)
class Data:
    """Training steps and validation batches of this rank."""

    plan: StepPlan
    blocks: Mixture
    validation: list[Batch]
    notes: list[str]
    fingerprint: str

    def identity(self, cfg: RunConfig) -> dict[str, Any]:
        """What a resumed run must find again."""
        return {"fingerprint": self.fingerprint, "blocks": len(self.blocks), "seq_len": cfg.data.seq_len}


def read_data(cfg: RunConfig, folder: ModelFolder, grid: Grid, screen: Console | None = None) -> Data:
    """Rows to blocks to steps. The first rank reads and tokenises, or finds that done; every rank maps the result and
    keeps its part of each step."""
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
    vocab_size = folder.config.get("vocab_size")
    tell = _bar(screen) if screen else prepared.silent
    place, _ = first_rank_works(lambda: prepared.open_or_build(cfg, folder.path, vocab_size, tell))
    found = on_every_rank(lambda: prepared.load(cfg, place))
    blocks, validation = found.train, found.validation
    if classes.in_folder(folder.config):
        for part in (*blocks.parts, *(validation.parts if validation else ())):
            classes.check_documents(part.documents, folder)
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
    return Data(plan, blocks, batches, blocks.notes(), found.fingerprint)


def _bar(screen: Console) -> prepared.Progress:
    def tell(file: str, done: int, total: int) -> None:
        screen.live(lambda: f"data     {bar(done, total)} {done:,} of {total:,} rows of {file} tokenised")

    return tell


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
