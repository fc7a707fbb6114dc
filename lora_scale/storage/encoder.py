"""A model folder's tokenizer, and what it makes of a row: token ids, and which of them carry loss.

Knows tokenizers and chat templates; refuses to know lengths, blocks and ranks.

The boundary between prompt and completion: the two are tokenised apart, so that the prompt's tokens in training are
exactly those of generation, where the prompt stands alone. Tokenising prompt + completion in one go can merge across
the boundary into a token that generation never starts from.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lora_scale.spec.errors import ConfigError, DataError, ModelError
from lora_scale.storage.chat import TEMPLATES, Conversation, TrainOn, spans, template_of
from lora_scale.storage.problems import BadRowError, Problems
from lora_scale.storage.rows import Rows

Document = tuple[list[int], bytes]  # token ids, and for each of them 1 (loss) or 0


def tokenizer(path: Path, trust_remote_code: bool = False, chat_template: str | None = None) -> Any:
    """The tokenizer of a model folder; `chat_template` (as `data.chat_template`) takes the place of its own."""
    # transformers makes up an empty tokenizer for some model types where these are missing.
    known = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
    if not trust_remote_code and not any((path / name).is_file() for name in known):
        raise ModelError(f"{path} has no tokenizer ({', '.join(known[:3])}); copy it from where the model came from")
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # the library raises a dozen kinds here, a damaged JSON file among them
        first = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{path}: the tokenizer cannot be loaded ({type(error).__name__}: {first}); "
            "copy the tokenizer files anew from where the model came from"
        ) from error
    if chat_template is not None:
        begins = found.bos_token_id is not None and found("a")["input_ids"][0] == found.bos_token_id
        bos = "{{ bos_token }}" if begins and chat_template in TEMPLATES else ""
        found.chat_template = bos + template_of(chat_template)
    if found.chat_template:
        _check_template(found, chat_template or f"that of {path}")
    return found


def _check_template(tokenizer: Any, name: str) -> None:
    """A template that is no Jinja is refused once, not row by row."""
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ConfigError(
            f"the chat template ({name}), line {error.lineno}: {error.message}; see data.chat_template"
        ) from None
    except Exception:  # it may refuse such a short chat; what it says of the rows is told by row
        return


class Encoder:
    """A tokenizer, and what was found out about it: what it puts before a text, and whether tokens can be joined."""

    def __init__(self, tokenizer: Any, rows: Rows, train_on: TrainOn) -> None:
        self._tokenizer = tokenizer
        self._path, self._unit = rows.path, rows.unit
        self._train_on = train_on
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
                f"{rows.path} holds conversations, but the tokenizer has no chat template, as of a base model; set "
                f"data.chat_template to {' or '.join(TEMPLATES)} or a Jinja file, or write the rows as "
                '{"prompt", "completion"}'
            )
        plain, special = self._plain(["a"])[0], tokenizer("a")["input_ids"]
        start = next(i for i in range(len(special)) if special[i : i + len(plain)] == plain)
        self._bos = special[:start]  # empty for tokenizers that put nothing before a text
        newline, b, newline_b = self._plain(["\n", "b", "\nb"])
        # Llama 2's and Mistral's tokenizers put a space before whatever they are given; so "b" alone is " b".
        self._anchor = [] if newline + b == newline_b else newline
        special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self._ends = tuple({*special, tokenizer.eos_token} - {None})  # what can end a turn

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

    def beginnings(self, texts: Sequence[str]) -> list[list[int]]:
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
        prompts = self.beginnings([prompt for prompt, _ in values])
        completions = map(self._ended, self._continuations([completion for _, completion in values]))
        loss_on_prompt = b"\1" if self._train_on_all else b"\0"
        return [
            (prompt + completion, loss_on_prompt * len(prompt) + b"\1" * len(completion))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    def _texts(self, values: list[str], lines: list[int]) -> list[Document]:
        return [(ids, b"\1" * len(ids)) for ids in map(self._ended, self.beginnings(values))]

    def _ready(self, values: list[tuple[np.ndarray, np.ndarray]], lines: list[int]) -> list[Document]:
        return [
            (ids.tolist(), b"\1" * len(ids) if self._train_on_all else trained.tobytes()) for ids, trained in values
        ]

    def _conversations(self, values: list[Conversation], lines: list[int]) -> list[Document]:
        """What the chat template writes, cut at the borders of the assistant's messages and tokenised apart."""
        problems = Problems(self._path, self._unit)
        conversations = []
        for conversation, line in zip(values, lines, strict=True):
            try:
                conversations.append(spans(self._tokenizer, conversation, self._train_on, self._ends))
            except BadRowError as error:
                problems.add(line, str(error))
        problems.raise_if_any()
        first = iter(self._plain([parts[0][0] for parts in conversations]))
        later = iter(self._continuations([text for parts in conversations for text, _ in parts[1:]]))
        documents = []
        for parts in conversations:
            runs = [next(later if number else first) for number in range(len(parts))]
            mask = b"".join((b"\1" if loss else b"\0") * len(run) for run, (_, loss) in zip(runs, parts, strict=True))
            documents.append(self.with_one_bos([token for run in runs for token in run], mask))
        return documents

    def opening(self, text: str) -> list[int]:
        """Tokens of a conversation that a template has begun."""
        return self.with_one_bos(self._plain([text])[0], b"")[0]

    def with_one_bos(self, ids: list[int], mask: bytes) -> Document:
        """Not two, where the template writes one and a message another; where it writes none, generation has none."""
        n = len(self._bos)
        while n and ids[: 2 * n] == self._bos * 2:
            ids, mask = ids[n:], mask[n:]
        return ids, mask
