"""Completions of a few rows during training (`eval.generate`), on the model as it is sharded for training."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lora_scale.parallel import generation
from lora_scale.parallel.generation import Sampling
from lora_scale.parallel.grid import Grid
from lora_scale.parallel.world import on_every_rank, on_rank_zero
from lora_scale.spec.config import RunConfig
from lora_scale.storage import completions, durable, encoder, prompts
from lora_scale.storage.folder import ModelFolder
from lora_scale.storage.prompts import Prompt
from lora_scale.storage.scores import Scorer

FOLDER = "generated"  # of the run directory
BATCH = 8  # rows a data-parallel rank at once, at most


@dataclass(frozen=True, slots=True)
class Samples:
    """The rows, and what is needed to continue them."""

    tokenizer: Any
    prompts: list[Prompt]
    ends: list[int]
    scorer: Scorer | None
    sampling: Sampling


def read(cfg: RunConfig, folder: ModelFolder, grid: Grid) -> Samples | None:
    """The first rows of `eval.generate`; None where nothing is to be generated. Every rank reads them."""
    path = cfg.eval.generate
    if path is None:
        return None

    def work() -> Samples:
        tokenizer = encoder.tokenizer(folder.path, cfg.model.trust_remote_code, cfg.data.chat_template)
        context = folder.config.get("max_position_embeddings") or folder.config.get("n_positions")
        longest = context - cfg.eval.max_new_tokens if isinstance(context, int) else None
        rows = prompts.read(path, tokenizer, longest, cfg.eval.generate_rows, cfg.data.fields)
        scorer = Scorer() if any(row.reference is not None for row in rows) else None
        sampling = Sampling(cfg.eval.max_new_tokens, min(BATCH, -(-len(rows) // grid.dp_size)))
        return Samples(tokenizer, rows, prompts.end_tokens(folder.path, tokenizer), scorer, sampling)

    return on_every_rank(work)


def write(samples: Samples, model: nn.Module, grid: Grid, run_dir: Path, step: int) -> dict[str, float]:
    """Continue the rows, greedily, and write `generated/step-NNNNNN.jsonl`; the means of their scores, on every rank.

    Collective over all ranks. Nothing of the training changes: no random number is drawn.
    """
    rows, scorer = samples.prompts, samples.scorer
    found = generation.generate(model, samples.tokenizer, rows, samples.ends, samples.sampling, grid)

    def keep() -> dict[str, float]:
        durable.make_directory(run_dir / FOLDER)
        completions.write(run_dir / FOLDER / f"step-{step:06d}.jsonl", rows, [asdict(one) for one in found], scorer)
        pairs = [(one.text, row.reference) for one, row in zip(found, rows, strict=True) if row.reference is not None]
        if scorer is None:
            return {}
        means = scorer.corpus([scorer.row(*pair) for pair in pairs], pairs)
        return {"bleu": means["bleu"]} | {name: one["mean"] for name, one in means.items() if isinstance(one, dict)}

    return on_rank_zero(keep)
