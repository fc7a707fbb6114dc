"""Batched generation with a key-value cache on a model that is sharded over ranks: transformers' own `generate`, made
to agree between ranks.

Data-parallel ranks share the batches; under ZeRO-3 each forward pass is a collective, so every rank runs as many
batches and as many passes a batch as the others (`synced_gpus`). Tensor-parallel ranks run the same batch, and each
sees the last position's logits whole.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_scale.parallel import documents, vocabulary
from lora_scale.parallel.grid import Grid
from lora_scale.storage.prompts import Prompt

Tell = Callable[[int, int], None]
"""Called on the first rank after each new token with the rows that are done and the tokens of the batch so far."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen. `temperature` 0 is greedy; then the other three are not used."""

    max_new_tokens: int
    batch_size: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    seed: int = 0
    stop: tuple[str, ...] = ()  # texts that end a completion and are not part of it


@dataclass(frozen=True, slots=True)
class Completion:
    """What was generated for one prompt."""

    text: str
    ids: tuple[int, ...]  # without the token that ended it
    finish: str  # "eos", "stop" (one of Sampling.stop) or "length"


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    ends: Sequence[int],
    sampling: Sampling,
    grid: Grid,
    tell: Tell = lambda done, tokens: None,
) -> list[Completion]:
    """The completion of every prompt, in their order, on every rank. Collective over all ranks.

    Prompts of like length share a batch. What is sampled for a prompt is a function of the seed and its place among
    the prompts, on one kind of device: not of batches, ranks or layout, but for rounding.
    """
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids), reverse=True)
    batches = [order[start : start + sampling.batch_size] for start in range(0, len(order), sampling.batch_size)]
    mine: list[tuple[int, Completion]] = []
    rounds = -(-len(batches) // grid.dp_size)
    was_training = model.training
    model.eval()
    with _whole_logits(model, grid), documents.with_masks(model), torch.no_grad():
        for number in range(rounds):
            at = number * grid.dp_size + grid.dp_rank
            batch = batches[min(at, len(batches) - 1)]  # a rank without one takes part all the same
            done = sum(map(len, batches[: number * grid.dp_size]))
            found = _batch(model, tokenizer, [(i, prompts[i]) for i in batch], ends, sampling, grid, done, tell)
            if at < len(batches) and grid.tp_rank == 0:
                mine += zip(batch, found, strict=True)
    model.train(was_training)
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    by_place = dict(pair for each in everyones for pair in each)
    return [by_place[i] for i in range(len(prompts))]


def _batch(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[tuple[int, Prompt]],
    ends: Sequence[int],
    sampling: Sampling,
    grid: Grid,
    done: int,
    tell: Tell,
) -> list[Completion]:
    transformers = importlib.import_module("transformers")
    device = grid.world.device
    width = max(len(prompt.ids) for _, prompt in rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0] if ends else 0
    ids = torch.tensor([[pad] * (width - len(p.ids)) + list(p.ids) for _, p in rows], device=device)
    mask = torch.tensor([[0] * (width - len(p.ids)) + [1] * len(p.ids) for _, p in rows], device=device)
    settings = transformers.GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=False,  # sampling is arg-max of noised logits, so that a row's noise is its own
        use_cache=True,
        pad_token_id=pad,
        eos_token_id=list(ends) or None,
    )
    words = {"stop_strings": list(sampling.stop), "tokenizer": tokenizer} if sampling.stop else {}
    tokens = model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=mask,
        generation_config=settings,
        logits_processor=transformers.LogitsProcessorList(_choosers(sampling, [i for i, _ in rows], device)),
        stopping_criteria=transformers.StoppingCriteriaList([_Watch(done, width, tell)]),
        synced_gpus=grid.dp_size > 1,
        **words,
    )
    return [_completion(tokenizer, row[width:], pad, ends, sampling.stop) for row in tokens.tolist()]


def _completion(tokenizer: Any, ids: list[int], pad: int, ends: Sequence[int], stop: Sequence[str]) -> Completion:
    at = next((i for i, token in enumerate(ids) if token in ends), None)
    while stop and at is None and ids and ids[-1] == pad:  # what follows a stop text until the batch is done
        ids.pop()
    text = tokenizer.decode(ids if at is None else ids[:at], skip_special_tokens=True)
    cuts = [place for word in stop if (place := text.find(word)) >= 0]
    if cuts:
        return Completion(text[: min(cuts)], tuple(ids[:at]), "stop")
    return Completion(text, tuple(ids[:at]), "length" if at is None else "eos")


class _Watch:
    """Counts the tokens of a batch for the screen; stops nothing."""

    def __init__(self, done: int, width: int, tell: Tell) -> None:
        self._done, self._width, self._tell = done, width, tell

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self._tell(self._done, input_ids.shape[1] - self._width)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _choosers(sampling: Sampling, rows: Sequence[int], device: torch.device) -> Iterator[Any]:
    """What turns logits into such whose arg-max is the token."""
    if sampling.temperature == 0.0:
        return
    transformers = importlib.import_module("transformers")
    yield transformers.TemperatureLogitsWarper(sampling.temperature)
    if sampling.top_k:
        yield transformers.TopKLogitsWarper(sampling.top_k)
    if sampling.top_p < 1.0:
        yield transformers.TopPLogitsWarper(sampling.top_p)
    yield _Noise(sampling.seed, rows, device)


class _Noise:
    """Gumbel noise, a generator a row: the arg-max of logits + noise is a sample of their softmax (Gumbel, 1954)."""

    def __init__(self, seed: int, rows: Sequence[int], device: torch.device) -> None:
        self._draws = [torch.Generator(device).manual_seed(seed * 1_000_003 + row) for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        waits = torch.stack([torch.empty_like(scores[0]).exponential_(generator=draw) for draw in self._draws])
        return scores - waits.log()


@contextmanager
def _whole_logits(model: nn.Module, grid: Grid) -> Iterator[None]:
    """While generating, the output layer's logits are those of the whole vocabulary on every tensor-parallel rank."""
    if grid.tp_size == 1:
        yield
        return
    tokens = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]

    def after(module: nn.Module, args: tuple[Any, ...], logits: Tensor) -> Tensor:
        return vocabulary.gather(logits, tokens, grid.tp_group)

    hook = model.get_output_embeddings().register_forward_hook(after)  # type: ignore[operator]
    try:
        yield
    finally:
        hook.remove()
