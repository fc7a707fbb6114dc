"""From checked rows to documents: token ids, and which of them carry loss.

Knows tokenizers and chat templates; refuses to know blocks, batches and ranks.

The boundary between prompt and completion: the two are tokenised apart, so that the prompt's tokens in training are
exactly those of generation, where the prompt stands alone. Tokenising prompt + completion in one go can merge across
the boundary into a token that generation never starts from.
"""

import contextlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lora_scale.spec.errors import DataError, ModelError
from lora_scale.storage.chat import spans
from lora_scale.storage.problems import BadRowError, Problems, name_lines
from lora_scale.storage.rows import Rows

TrainOn = Literal["completion", "all"]
Document = tuple[list[int], bytes]  # token ids, and for each of them 1 (loss) or 0

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
                f"{name_lines(self.truncated_lines)}"
            )
        if self.n_without_target:
            notes.append(
                f"{self.n_without_target:,} of {self.n_rows:,} rows of {self.path} have no trained token within "
                f"data.seq_len = {self.seq_len} and were left out: {name_lines(self.dropped_lines)}"
            )
        return notes


def tokenizer(path: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder."""
    # transformers makes up an empty tokenizer for some model types where these are missing.
    known = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
    if not trust_remote_code and not any((path / name).is_file() for name in known):
        raise ModelError(f"{path} has no tokenizer ({', '.join(known[:3])}); copy it from where the model came from")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # the library raises a dozen kinds here, a damaged JSON file among them
        first = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{path}: the tokenizer cannot be loaded ({type(error).__name__}: {first}); "
            "copy the tokenizer files anew from where the model came from"
        ) from error


def encode(
    rows: Rows,
    tokenizer: Any,
    seq_len: int,
    train_on: TrainOn = "completion",
    vocab_size: int | None = None,
    progress: bool = False,
) -> Documents:
    """Tokenise rows, cut them to `seq_len` and leave out those without a trained token.

    prompt: prompt, completion, eos. text: text, eos, all of it trained. messages: what the chat template writes, the
    assistant's messages trained. input_ids: as they are. `vocab_size` is the model's (default: the tokenizer's); an id
    at or above it is an error. `progress` draws a bar on stderr if that is a terminal.
    """
    encoder = _Encoder(tokenizer, rows, train_on)
    vocab_size = vocab_size or len(tokenizer)
    ids, trained = array("i"), bytearray()
    offsets, lines = array("q", [0]), array("q")
    truncated, dropped = array("q"), array("q")
    longest = 0
    with _bar(rows, progress) as advance:
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
            advance(len(documents))
    if not lines:
        raise DataError(
            f"{rows.path}: no row has a trained token within data.seq_len = {seq_len} ({name_lines(dropped)}); "
            "raise data.seq_len, or set data.train_on=all"
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
    )
    _check_vocabulary(found, vocab_size, ready_tokens=rows.form == "input_ids")
    return found


@contextlib.contextmanager
def _bar(rows: Rows, wanted: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over the rows; yields what moves it on."""
    if not wanted:
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(f"tokenising {rows.path.name}", total=len(rows))
        yield lambda n: bar.advance(task, n)


def _check_vocabulary(documents: Documents, vocab_size: int, ready_tokens: bool) -> None:
    outside = np.flatnonzero((documents.ids < 0) | (documents.ids >= vocab_size))
    numbers, first = np.unique(np.searchsorted(documents.offsets, outside, side="right") - 1, return_index=True)
    cure = "use the ids of this model's tokenizer" if ready_tokens else "the tokenizer does not belong to this model"
    problems = Problems(documents.path)
    for number, at in zip(numbers, outside[first], strict=True):
        what = f"token id {documents.ids[at]} lies outside the model's vocabulary of {vocab_size:,}; {cure}"
        problems.add(int(documents.lines[number]), what)
    problems.raise_if_any()


class _Encoder:
    """A tokenizer, and what was found out about it: what it puts before a text, and whether tokens can be joined."""

    def __init__(self, tokenizer: Any, rows: Rows, train_on: TrainOn) -> None:
        self._tokenizer = tokenizer
        self._path = rows.path
        self._train_on_all = train_on == "all"
        forms: dict[str, Callable[[list[Any], list[int]], list[Document]]] = {
            "prompt": self._prompts,
            "messages": self._conversations,
            "text": self._texts,
            "input_ids": self._ready,
        }
        self.encode = forms[rows.form]
        if rows.form in ("prompt", "text") and tokenizer.eos_token_id is None:
            raise ModelError(
                "the tokenizer has no eos_token, so a completion could not end; add it to tokenizer_config.json"
            )
        if rows.form == "messages" and not tokenizer.chat_template:
            raise DataError(
                f'{rows.path} holds {{"messages"}}, but the tokenizer has no chat template; put chat_template.jinja '
                'into the model folder, or write the rows as {"prompt", "completion"}'
            )
        plain, special = self._plain(["a"])[0], tokenizer("a")["input_ids"]
        start = next(i for i in range(len(special)) if special[i : i + len(plain)] == plain)
        self._bos = special[:start]  # empty for tokenizers that put nothing before a text
        newline, b, newline_b = self._plain(["\n", "b", "\nb"])
        # Llama 2's and Mistral's tokenizers put a space before whatever they are given; so "b" alone is " b".
        self._anchor = [] if newline + b == newline_b else newline

    def _plain(self, texts: Sequence[str]) -> list[list[int]]:
        if not texts:  # the library cannot tokenise an empty list
            return []
        return self._tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning about rows longer than the model's context: they are cut and counted here
        )["input_ids"]

    def _beginnings(self, texts: Sequence[str]) -> list[list[int]]:
        """As generation tokenises a prompt; one BOS, also where the text itself starts with it."""
        bos = self._bos
        return [ids if ids[: len(bos)] == bos else bos + ids for ids in self._plain(texts)]

    def _continuations(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of texts that follow others, so that joined tokens decode to joined texts."""
        n = len(self._anchor)
        if n == 0:
            return self._plain(texts)
        anchored = self._plain([f"\n{text}" for text in texts])
        # Where the anchor merged with the text, a space too many is the lesser harm.
        return [
            ids[n:] if ids[:n] == self._anchor else self._plain([text])[0]
            for text, ids in zip(texts, anchored, strict=True)
        ]

    def _ended(self, ids: list[int]) -> list[int]:
        eos = self._tokenizer.eos_token_id
        return ids if ids and ids[-1] == eos else [*ids, eos]

    def _prompts(self, values: list[tuple[str, str]], lines: list[int]) -> list[Document]:
        prompts = self._beginnings([prompt for prompt, _ in values])
        completions = map(self._ended, self._continuations([completion for _, completion in values]))
        loss_on_prompt = b"\1" if self._train_on_all else b"\0"
        return [
            (prompt + completion, loss_on_prompt * len(prompt) + b"\1" * len(completion))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    def _texts(self, values: list[str], lines: list[int]) -> list[Document]:
        return [(ids, b"\1" * len(ids)) for ids in map(self._ended, self._beginnings(values))]

    def _ready(self, values: list[tuple[np.ndarray, np.ndarray]], lines: list[int]) -> list[Document]:
        return [
            (ids.tolist(), b"\1" * len(ids) if self._train_on_all else trained.tobytes()) for ids, trained in values
        ]

    def _conversations(self, values: list[list[dict[str, str]]], lines: list[int]) -> list[Document]:
        """What the chat template writes, cut at the borders of the assistant's messages and tokenised apart."""
        problems = Problems(self._path)
        conversations = []
        for messages, line in zip(values, lines, strict=True):
            try:
                conversations.append(spans(self._tokenizer, messages, self._train_on_all))
            except BadRowError as error:
                problems.add(line, str(error))
        problems.raise_if_any()
        # No BOS is added: the template writes it where the model wants one, and so it is in generation.
        first = iter(self._plain([parts[0][0] for parts in conversations]))
        later = iter(self._continuations([text for parts in conversations for text, _ in parts[1:]]))
        documents = []
        for parts in conversations:
            runs = [next(later if number else first) for number in range(len(parts))]
            mask = b"".join((b"\1" if loss else b"\0") * len(run) for run, (_, loss) in zip(runs, parts, strict=True))
            documents.append(([token for run in runs for token in run], mask))
        return documents
