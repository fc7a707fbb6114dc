"""Which blocks each optimizer step takes, and which of them are this rank's.

A pure function of (blocks, sizes, seed, step): the step number is the whole position of a run in its data. Refuses to
know tokens, files and process groups.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import TypeVar

import numpy as np

from lora_scale.spec.errors import ConfigError
from lora_scale.storage.mixture import Mixture
from lora_scale.storage.packing import EMPTY, Batch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step, as one rank sees it."""

    micro_batches: tuple[Batch, ...]
    target_tokens: int  # with loss, over all ranks; at least 1
    tokens: int  # without padding, over all ranks
    own: np.ndarray  # this rank's blocks
    blocks: Mixture
    sources: dict[str, tuple[int, int]]  # (rows, tokens) of each source, over all ranks

    @property
    def names(self) -> str:
        """This rank's rows, for an error message."""
        return self.blocks.names(self.own)


class StepPlan:
    """The order of training. The blocks of a step do not depend on the number of ranks, nor on the micro-batch size.

    Epoch e is a permutation drawn from (seed, e): of every block once, or as often as the sources' weights say. The
    epochs follow each other without a gap, and step s takes the blocks [s G, (s + 1) G) of that stream, G being the
    global batch size. Only the very last step can be short of blocks: empty ones fill it up. So every step holds at
    least one block, and with it at least one token with loss.
    """

    def __init__(
        self,
        blocks: Mixture,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        epochs: float | None = None,
        max_steps: int | None = None,
    ) -> None:
        assert 0 <= dp_rank < dp_size
        assert epochs is not None or max_steps is not None
        check_batch_sizes(global_batch_size, micro_batch_size, dp_size)
        self._blocks = blocks
        self._global_batch_size = global_batch_size
        self._micro_batch_size = micro_batch_size
        self._dp_rank = dp_rank
        self._dp_size = dp_size
        # str: 0.1 is a tenth, as the user wrote it. None: as many blocks as max_steps asks for.
        self._n_stream = None if epochs is None else math.ceil(Fraction(str(epochs)) * blocks.blocks_an_epoch)
        of_epochs = math.inf if self._n_stream is None else math.ceil(self._n_stream / global_batch_size)
        self.total_steps = int(min(of_epochs, max_steps or math.inf))
        self._epoch = lru_cache(maxsize=2)(lambda epoch: blocks.epoch(epoch, seed))  # a step can touch two epochs

    def steps(self, first_step: int = 0) -> Iterator[Step]:
        """The steps from `first_step` (from 0) to the last."""
        for step in range(first_step, self.total_steps):
            yield self.step(step)

    def step(self, step: int) -> Step:
        """One step by its number."""
        numbers = self.blocks_of(step)
        real = numbers[numbers != EMPTY]
        # (micro-batch, rank, block): ranks take turns, so the filler of the last step is shared out.
        own = numbers.reshape(-1, self._dp_size, self._micro_batch_size)[:, self._dp_rank]
        return Step(
            micro_batches=tuple(self._blocks.batch(row) for row in own),
            target_tokens=int(self._blocks.n_targets[real].sum()),
            tokens=int(self._blocks.n_tokens[real].sum()),
            own=own.ravel(),
            blocks=self._blocks,
            sources=self._blocks.seen(real),
        )

    def blocks_of(self, step: int) -> np.ndarray:
        """The global batch of a step, as block numbers; EMPTY past the end of the last epoch."""
        assert 0 <= step < self.total_steps
        at = np.arange(step * self._global_batch_size, (step + 1) * self._global_batch_size)
        numbers = np.full(len(at), EMPTY, dtype=np.int64)
        epoch = self._blocks.epoch_of(int(at[0]))
        while (first := self._blocks.first_of_epoch(epoch)) <= at[-1]:
            inside = (at >= first) & (at < self._blocks.first_of_epoch(epoch + 1))
            numbers[inside] = self._epoch(epoch)[at[inside] - first]
            epoch += 1
        if self._n_stream is not None:
            numbers[at >= self._n_stream] = EMPTY
        return numbers


def check_batch_sizes(global_batch_size: int, micro_batch_size: int, dp_size: int) -> None:
    """A ConfigError that names sizes that work, where the ranks cannot share the batch out evenly."""
    per_pass = micro_batch_size * dp_size
    if global_batch_size % per_pass == 0:
        return
    below = global_batch_size // per_pass * per_pass
    nearest = f"{below} or {below + per_pass}" if below else f"{per_pass}"
    micro = [size for size in range(1, micro_batch_size) if global_batch_size % (size * dp_size) == 0]
    other = f", or train.micro_batch_size = {micro[-1]}" if micro else ""
    raise ConfigError(
        f"train.global_batch_size is {global_batch_size}; it must be a multiple of train.micro_batch_size x "
        f"data-parallel ranks = {micro_batch_size} x {dp_size}; for example {nearest}{other}"
    )


def eval_batches(
    blocks: Mixture, micro_batch_size: int, dp_rank: int, dp_size: int, max_blocks: int | None = None
) -> list[Batch]:
    """This rank's part of the validation blocks; as many batches on every rank, filled up with empty blocks.

    Of more than `max_blocks`, evenly spaced ones are taken: packing puts long documents first, so the first ones would
    not be a fair sample.
    """
    n = min(len(blocks), max_blocks or len(blocks))
    per_pass = micro_batch_size * dp_size
    numbers = np.full(math.ceil(n / per_pass) * per_pass, EMPTY, dtype=np.int64)
    numbers[:n] = np.arange(n) * len(blocks) // n
    own = numbers.reshape(-1, dp_size, micro_batch_size)[:, dp_rank]
    return [blocks.batch(row) for row in own]


def with_next(items: Iterator[T]) -> Iterator[tuple[T, T | None]]:
    """Each item and the one after it."""
    now = next(items, None)
    while now is not None:
        after = next(items, None)
        yield now, after
        now = after
