"""Blocks of several sources as one: each source is packed for itself, and an epoch takes so many passes over each.

A pure function of (blocks, weights, seed, epoch): there is no position to save. Refuses to know steps and ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from lora_scale.storage.packing import EMPTY, Batch, Blocks, combined
from lora_scale.storage.problems import name_lines


@dataclass(frozen=True)
class Mixture:
    """Blocks of every source, numbered through; `weights` are passes over a source in an epoch."""

    parts: tuple[Blocks, ...]
    weights: tuple[float, ...]

    @classmethod
    def of(cls, *parts: Blocks) -> "Mixture":
        """Every block once an epoch."""
        return cls(parts, (1.0,) * len(parts))

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @cached_property
    def _firsts(self) -> np.ndarray:
        """The number of each part's first block, and one past the last."""
        return np.concatenate(([0], np.cumsum([len(part) for part in self.parts]))).astype(np.int64)

    @cached_property
    def _first_samples(self) -> np.ndarray:
        """The number of each part's first document."""
        return np.concatenate(([0], np.cumsum([len(part.documents) for part in self.parts]))).astype(np.int64)

    @property
    def seq_len(self) -> int:
        return self.parts[0].seq_len

    @cached_property
    def n_tokens(self) -> np.ndarray:
        """Tokens of each block, padding not counted."""
        return np.concatenate([part.n_tokens for part in self.parts])

    @cached_property
    def n_targets(self) -> np.ndarray:
        """Tokens with loss of each block; at least one."""
        return np.concatenate([part.n_targets for part in self.parts])

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of every document."""
        return np.concatenate([part.documents.lengths for part in self.parts])

    @property
    def efficiency(self) -> float:
        """The part of all positions that is not padding."""
        return float(self.n_tokens.sum()) / (len(self) * self.seq_len)

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Names of the parts; one that comes twice gets a number."""
        names = [str(part.documents.path) for part in self.parts]
        return tuple(name if names.count(name) == 1 else f"{name}#{n}" for n, name in enumerate(names, start=1))

    def batch(self, numbers: Sequence[int] | np.ndarray) -> Batch:
        """Blocks by number, side by side; EMPTY gives padding only. Sample numbers count through all sources."""
        places = [(0, EMPTY) if number == EMPTY else self._place(int(number)) for number in numbers]
        return combined([(self.parts[part], block, int(self._first_samples[part])) for part, block in places])

    def names(self, numbers: np.ndarray) -> str:
        """The rows of these blocks, for an error message."""
        rows: dict[int, list[np.ndarray]] = {}
        for number in numbers[numbers != EMPTY]:
            part, block = self._place(int(number))
            rows.setdefault(part, []).append(self.parts[part].lines_of(block))
        found = [
            f"{self.parts[part].documents.path}, "
            + name_lines(np.sort(np.concatenate(lines)), self.parts[part].documents.unit)
            for part, lines in sorted(rows.items())
        ]
        return "; ".join(found) or "padding only"

    @cached_property
    def _n_rows(self) -> np.ndarray:
        """Documents of each block."""
        return np.concatenate([np.diff(part.starts) for part in self.parts])

    def seen(self, numbers: np.ndarray) -> dict[str, tuple[int, int]]:
        """(rows, tokens) that these blocks hold, by source."""
        parts = np.searchsorted(self._firsts, numbers, side="right") - 1
        rows, tokens = (
            np.bincount(parts, weights=count[numbers], minlength=len(self.parts))
            for count in (self._n_rows, self.n_tokens)
        )
        return {name: (int(rows[part]), int(tokens[part])) for part, name in enumerate(self.sources)}

    def _place(self, number: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._firsts, number, side="right")) - 1
        return part, number - int(self._firsts[part])

    def stats(self) -> dict[str, Any]:
        """What goes into the manifest: sums, and each source's own figures where there are several."""
        each = [part.stats() for part in self.parts]
        total: dict[str, Any] = {key: sum(stats[key] for stats in each) for key in each[0]}
        total |= {"longest_row": max(s["longest_row"] for s in each), "packing_efficiency": round(self.efficiency, 4)}
        if len(each) > 1:
            weighed = zip(self.sources, self.weights, each, strict=True)
            total["sources"] = {name: {"weight": weight, **stats} for name, weight, stats in weighed}
        return total

    def notes(self) -> list[str]:
        """What the user must hear of every source."""
        return [note for part in self.parts for note in part.documents.notes()]

    def fingerprint(self) -> str:
        """Of every token, its loss mark, its place and its weight."""
        if len(self.parts) == 1 and self.weights == (1.0,):
            return self.parts[0].fingerprint()
        each = [f"{part.fingerprint()} x {weight}" for part, weight in zip(self.parts, self.weights, strict=True)]
        return "; ".join(each)

    @cached_property
    def blocks_an_epoch(self) -> Fraction:
        """Not always whole: half of three blocks is one in one epoch and two in the next."""
        return sum((self._share(part) for part in range(len(self.parts))), Fraction(0))

    def _share(self, part: int) -> Fraction:
        return Fraction(str(self.weights[part])) * len(self.parts[part])  # str: 0.1 is a tenth, as the user wrote it

    def first_of_epoch(self, epoch: int) -> int:
        """How many blocks come before an epoch in the stream of all epochs."""
        return sum(math.floor(epoch * self._share(part)) for part in range(len(self.parts)))

    def epoch_of(self, position: int) -> int:
        """The epoch of a place in the stream."""
        epoch = math.floor(position / self.blocks_an_epoch)  # never too late: every source's part is rounded down
        while self.first_of_epoch(epoch + 1) <= position:
            epoch += 1
        return epoch

    def epoch(self, epoch: int, seed: int) -> np.ndarray:
        """The numbers of an epoch's blocks in their order.

        Source i with n blocks and weight w gives the places [floor(e w n), floor((e + 1) w n)) of its own endless
        stream of permutations; all sources' blocks are then permuted together.
        """
        found = []
        for part, first in enumerate(self._firsts[:-1]):
            n, share = len(self.parts[part]), self._share(part)
            at = np.arange(math.floor(epoch * share), math.floor((epoch + 1) * share))
            inside = np.empty(len(at), dtype=np.int64)
            for turn in range(int(at[0]) // n, int(at[-1]) // n + 1) if len(at) else ():
                here = at // n == turn
                whole = int(here.sum()) == n  # a whole pass: its order is drawn below
                inside[here] = np.arange(n) if whole else permutation(n, seed, turn, part + 1)[at[here] % n]
            found.append(np.sort(inside) + first)
        numbers = np.concatenate(found)
        return numbers[permutation(len(numbers), seed, epoch)]


def permutation(n: int, *seeds: int) -> np.ndarray:
    # Sorting raw words, not Generator.permutation: numpy keeps raw streams the same for ever, but may improve its
    # shuffles, and a resumed run must see the old order.
    words = np.random.Philox(np.random.SeedSequence(list(seeds))).random_raw(n)
    return np.argsort(words, kind="stable")
