"""From checked rows to documents: token ids, and which of them carry loss, cut to length and counted.

Knows rows and lengths; refuses to know blocks, batches and ranks. What a row's tokens are is `storage.encoder`'s.
"""

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lora_scale.spec.errors import DataError
from lora_scale.storage.chat import TrainOn
from lora_scale.storage.encoder import Encoder
from lora_scale.storage.problems import Problems, name_lines
from lora_scale.storage.rows import Rows

_ROWS_AT_ONCE = 1000  # enough for the tokenizer's threads; bounds the Python lists of ids in flight


@dataclass(frozen=True, slots=True)
class Documents:
    """Tokens of all documents end to end: 5 bytes a token and 16 a document.

    Document i is `ids[offsets[i] : offsets[i + 1]]`. `trained` marks the tokens to be predicted; never the first one of
    a document, which nothing predicts. Every document has at least one.
    """

    path: Path
    ids: np.ndarray  # int32
    trained: np.ndarray  # bool
    offsets: np.ndarray  # int64, one more than there are documents
    lines: np.ndarray  # int64, the line in `path` of each document
    pad_id: int
    seq_len: int
    n_rows: int
    longest: int  # tokens of the longest row before it was cut
    truncated_lines: np.ndarray
    dropped_lines: np.ndarray  # rows without a trained token within seq_len
    unit: str = "line"  # what `lines` count

    def __len__(self) -> int:
        return len(self.lines)

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    @property
    def n_targets(self) -> np.ndarray:
        """Trained tokens of each document."""
        return np.add.reduceat(self.trained, self.offsets[:-1], dtype=np.int64)

    @property
    def n_truncated(self) -> int:
        return len(self.truncated_lines)

    @property
    def n_without_target(self) -> int:
        return len(self.dropped_lines)

    def stats(self) -> dict[str, int]:
        """What goes into the manifest."""
        return {
            "rows": self.n_rows,
            "documents": len(self),
            "tokens": len(self.ids),
            "target_tokens": int(self.trained.sum()),
            "truncated_rows": self.n_truncated,
            "dropped_rows": self.n_without_target,
            "longest_row": self.longest,
        }

    def notes(self) -> list[str]:
        """What the user must hear: rows that were cut, rows that were left out."""
        notes = []
        if self.n_truncated:
            notes.append(
                f"{self.n_truncated:,} of {self.n_rows:,} rows of {self.path} are longer than data.seq_len = "
                f"{self.seq_len} (the longest has {self.longest:,} tokens) and were cut: "
                f"{name_lines(self.truncated_lines, self.unit)}"
            )
        if self.n_without_target:
            notes.append(
                f"{self.n_without_target:,} of {self.n_rows:,} rows of {self.path} have no trained token within "
                f"data.seq_len = {self.seq_len} and were left out: {name_lines(self.dropped_lines, self.unit)}"
            )
        return notes


def encode(
    rows: Rows,
    tokenizer: Any,
    seq_len: int,
    train_on: TrainOn = "completion",
    vocab_size: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Documents:
    """Tokenise rows, cut them to `seq_len` and leave out those without a trained token.

    prompt: prompt, completion, eos. text: text, eos, all of it trained. messages: what the chat template writes, the
    assistant's messages trained. input_ids: as they are. `vocab_size` is the model's (default: the tokenizer's); an id
    at or above it is an error. `progress` is told (rows done, of so many).
    """
    encoder = Encoder(tokenizer, rows, train_on)
    vocab_size = vocab_size or len(tokenizer)
    ids, trained = array("i"), bytearray()
    offsets, lines = array("q", [0]), array("q")
    truncated, dropped = array("q"), array("q")
    longest = 0
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        documents = encoder.encode(rows.values[part], rows.lines[part].tolist())
        for line, (tokens, mask) in zip(rows.lines[part].tolist(), documents, strict=True):
            longest = max(longest, len(tokens))
            if len(tokens) > seq_len:
                truncated.append(line)
            mask = b"\0" + mask[1:seq_len]  # nothing predicts the first token
            if 1 not in mask:
                dropped.append(line)
                continue
            trained += mask
            ids.fromlist(tokens[:seq_len])
            offsets.append(len(ids))
            lines.append(line)
        progress(min(start + _ROWS_AT_ONCE, len(rows)), len(rows))
    if not lines:
        raise DataError(
            f"{rows.path}: no row has a trained token within data.seq_len = {seq_len} "
            f"({name_lines(dropped, rows.unit)}); raise data.seq_len, or set data.train_on=all"
        )
    found = Documents(
        path=rows.path,
        ids=np.frombuffer(ids, dtype=np.int32),
        trained=np.frombuffer(trained, dtype=bool),
        offsets=np.frombuffer(offsets, dtype=np.int64),
        lines=np.frombuffer(lines, dtype=np.int64),
        pad_id=next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None and i < vocab_size),
        seq_len=seq_len,
        n_rows=len(rows),
        longest=longest,
        truncated_lines=np.array(truncated, dtype=np.int64),
        dropped_lines=np.array(dropped, dtype=np.int64),
        unit=rows.unit,
    )
    _check_vocabulary(found, vocab_size, ready_tokens=rows.form == "input_ids")
    return found


def _check_vocabulary(documents: Documents, vocab_size: int, ready_tokens: bool) -> None:
    outside = np.flatnonzero((documents.ids < 0) | (documents.ids >= vocab_size))
    numbers, first = np.unique(np.searchsorted(documents.offsets, outside, side="right") - 1, return_index=True)
    cure = "use the ids of this model's tokenizer" if ready_tokens else "the tokenizer does not belong to this model"
    problems = Problems(documents.path, documents.unit)
    for number, at in zip(numbers, outside[first], strict=True):
        what = f"token id {documents.ids[at]} lies outside the model's vocabulary of {vocab_size:,}; {cure}"
        problems.add(int(documents.lines[number]), what)
    problems.raise_if_any()
