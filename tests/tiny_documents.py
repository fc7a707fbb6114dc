"""Documents of random tokens with given lengths, made without a tokenizer."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lora_scale.storage.dataset import Documents


def documents_of(lengths: Sequence[int], seq_len: int, seed: int = 0, vocab_size: int = 96) -> Documents:
    """Each length at least 2; about half the tokens carry loss, the last one of each document always does."""
    random = np.random.default_rng(seed)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    trained = random.random(offsets[-1]) < 0.5
    trained[offsets[1:] - 1] = True
    trained[offsets[:-1]] = False
    return Documents(
        path=Path("tiny.jsonl"),
        ids=random.integers(0, vocab_size, offsets[-1], dtype=np.int32),
        trained=trained,
        offsets=offsets,
        lines=np.arange(1, len(lengths) + 1),
        pad_id=2,
        seq_len=seq_len,
        n_rows=len(lengths),
        longest=max(lengths),
        truncated_lines=np.empty(0, dtype=np.int64),
        dropped_lines=np.empty(0, dtype=np.int64),
    )
