"""From documents to blocks of equal length, and what a model is given for a block.

Knows lengths and where documents lie; refuses to know text, the order of training and ranks.

Documents of a block are told apart by positions, which restart at 0 with each of them and with the padding at the end.
transformers keeps attention within a document by them, but only without an attention mask and with use_cache=False.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lora_scale.storage.dataset import Documents

NO_LOSS = -100  # the label that cross-entropy ignores
EMPTY = -1  # the number of a block that is padding only


@dataclass(frozen=True, slots=True)
class Batch:
    """Blocks side by side; each array is int64 of shape (blocks, seq_len).

    `labels[b, i]` is the token to predict at position i: already shifted, nothing is left to shift in the loss.
    """

    input_ids: np.ndarray
    labels: np.ndarray  # NO_LOSS where nothing is predicted
    position_ids: np.ndarray
    sample_ids: np.ndarray  # the number of the document; -1 on padding


@dataclass(frozen=True)
class Blocks:
    """Documents laid out in blocks of `seq_len` tokens: 16 bytes a document beside the documents themselves.

    Block b holds the documents `order[starts[b] : starts[b + 1]]`, one after the other, then padding.
    """

    documents: Documents
    order: np.ndarray  # int64
    starts: np.ndarray  # int64, one more than there are blocks

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def seq_len(self) -> int:
        return self.documents.seq_len

    @cached_property
    def n_tokens(self) -> np.ndarray:
        """Tokens of each block, padding not counted."""
        return np.add.reduceat(self.documents.lengths[self.order], self.starts[:-1])

    @cached_property
    def n_targets(self) -> np.ndarray:
        """Tokens with loss of each block; at least one."""
        return np.add.reduceat(self.documents.n_targets[self.order], self.starts[:-1])

    @property
    def efficiency(self) -> float:
        """The part of all positions that is not padding."""
        return float(self.n_tokens.sum()) / (len(self) * self.seq_len)

    def stats(self) -> dict[str, int | float]:
        """What goes into the manifest."""
        return {**self.documents.stats(), "blocks": len(self), "packing_efficiency": round(self.efficiency, 4)}

    def lines_of(self, block: int) -> np.ndarray:
        """The lines, in the file, of the documents of a block."""
        return self.documents.lines[self.order[self.starts[block] : self.starts[block + 1]]]

    def get(self, block: int) -> Batch:
        """One block; EMPTY gives padding only."""
        return self.batch([block])

    def batch(self, blocks: Sequence[int] | np.ndarray) -> Batch:
        """Blocks by number, side by side."""
        return combined([(self, int(block), 0) for block in blocks])

    def fill(self, batch: Batch, row: int, block: int, first_sample: int) -> int:
        """Write the documents of a block into a row of padding; returns how many tokens they have."""
        documents = self.order[self.starts[block] : self.starts[block + 1]]
        first = self.documents.offsets[documents]
        lengths = self.documents.offsets[documents + 1] - first
        length = int(lengths.sum())
        position = np.arange(length) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        source = np.repeat(first, lengths) + position
        ids = self.documents.ids[source]
        batch.input_ids[row, :length] = ids
        # A document's first token is never trained, so no label crosses from one document into the next.
        batch.labels[row, : length - 1] = np.where(self.documents.trained[source[1:]], ids[1:], NO_LOSS)
        batch.position_ids[row, :length] = position
        batch.sample_ids[row, :length] = np.repeat(documents + first_sample, lengths)
        return length

    def fingerprint(self) -> str:
        """Of every token, its loss mark and its place: two equal ones train the same."""
        digest = hashlib.sha256(f"{self.seq_len} {self.documents.pad_id} {len(self.documents)} {len(self)}".encode())
        documents = self.documents
        for numbers in (documents.ids, documents.trained, documents.offsets, self.order, self.starts):
            digest.update(np.ascontiguousarray(numbers).data.cast("B"))
        return f"sha256:{digest.hexdigest()}"


def combined(blocks: Sequence[tuple[Blocks, int, int]]) -> Batch:
    """(where from, block, number of its first sample) side by side; EMPTY gives padding only."""
    documents = blocks[0][0].documents
    shape = (len(blocks), documents.seq_len)
    batch = Batch(
        input_ids=np.full(shape, documents.pad_id, dtype=np.int64),
        labels=np.full(shape, NO_LOSS, dtype=np.int64),
        position_ids=np.empty(shape, dtype=np.int64),
        sample_ids=np.full(shape, -1, dtype=np.int64),
    )
    for row, (source, block, first_sample) in enumerate(blocks):
        length = 0 if block == EMPTY else source.fill(batch, row, block, first_sample)
        batch.position_ids[row, length:] = np.arange(documents.seq_len - length)
    return batch


def with_prefix(documents: Documents, tokens: int) -> Documents:
    """Every document with `tokens` placeholders before it, which carry no loss and count in its length and seq_len."""
    if not tokens:
        return documents
    places = np.repeat(documents.offsets[:-1], tokens)
    return replace(
        documents,
        ids=np.insert(documents.ids, places, documents.pad_id),
        trained=np.insert(documents.trained, places, False),
        offsets=documents.offsets + tokens * np.arange(len(documents) + 1),
        seq_len=documents.seq_len + tokens,
        longest=documents.longest + tokens,
    )


def pack(documents: Documents, packing: bool = True) -> Blocks:
    """Lay documents out in blocks of `documents.seq_len`: best fit, longest first; or each in a block of its own."""
    if not packing:
        numbers = np.arange(len(documents) + 1)
        return Blocks(documents, numbers[:-1], numbers)
    block_of = _best_fit(documents.lengths, documents.seq_len)
    order = np.argsort(block_of, kind="stable")  # within a block in the order of the file
    starts = np.concatenate(([0], np.cumsum(np.bincount(block_of))))
    return Blocks(documents, order, starts)


def _best_fit(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """The block of each document: longest first, each into the fullest block that still has room for it.

    The blocks stand in one stack per free room; a bit of `rooms` says which stacks are not empty, and its lowest set
    bit at or above a length is the best fit: a few operations on one integer of seq_len bits per document.
    """
    stacks: list[list[int]] = [[] for _ in range(seq_len + 1)]
    rooms = 0
    n_blocks = 0
    block_of = np.empty(len(lengths), dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            stack = stacks[room]
            block = stack.pop()
            if not stack:
                rooms ^= 1 << room
        else:
            room, block = seq_len, n_blocks
            n_blocks += 1
        block_of[document] = block
        room -= length
        stacks[room].append(block)
        rooms |= 1 << room
    return block_of
