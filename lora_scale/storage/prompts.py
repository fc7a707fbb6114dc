"""From rows to what generation begins with: the tokens of each prompt, exactly those of training, and its reference.

Knows rows and tokenizers; refuses to know models and ranks.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_scale.spec.errors import DataError
from lora_scale.storage import chat
from lora_scale.storage.chat import Conversation
from lora_scale.storage.encoder import Encoder
from lora_scale.storage.problems import BadRowError, Problems
from lora_scale.storage.rows import Rows, read_rows


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row to be continued."""

    line: int  # of its file, from 1
    text: str
    ids: tuple[int, ...]
    reference: str | None  # what the row says should follow; None where it does not say


def read(
    path: Path, tokenizer: Any, longest: int | None, limit: int | None = None, fields: dict[str, str] | None = None
) -> list[Prompt]:
    """The prompts of a source in any form of `data.train`, an answer being the reference where a row has one.

    Of a conversation that ends with the assistant that message is the reference; of {"input_ids"} what the first
    label begins; {"text"} is continued. A row of no tokens, or of more than `longest`, is a DataError.
    """
    rows = read_rows(path, limit, fields, answered=False)
    encoder = Encoder(tokenizer, rows, "all")
    problems, found = Problems(path, rows.unit), []
    for value, line in zip(rows.values, rows.lines.tolist(), strict=True):
        try:
            text, ids, reference = _split(value, rows, encoder, tokenizer)
            if not ids:
                raise BadRowError("has an empty prompt, and this tokenizer puts no token before a text")
            if longest is not None and len(ids) > longest:
                raise BadRowError(f"has a prompt of {len(ids):,} tokens; with what is to be generated {longest:,} fit")
        except BadRowError as error:
            problems.add(line, str(error))
            continue
        found.append(Prompt(line, text, tuple(ids), reference or None))
    problems.raise_if_any()
    return found


def _split(value: Any, rows: Rows, encoder: Encoder, tokenizer: Any) -> tuple[str, list[int], str | None]:
    match rows.form:
        case "prompt":
            return value[0], encoder.beginnings([value[0]])[0], value[1]
        case "text":
            return value, encoder.beginnings([value])[0], None
        case "messages":
            messages, tools = value
            last = messages[-1]
            answered = last["role"] == "assistant" and len(messages) > 1
            asked = Conversation(messages[:-1] if answered else messages, tools)
            text = chat.render(tokenizer, asked, add_generation_prompt=True)
            return text, encoder.opening(text), last["content"] if answered else None
    ids, trained = value
    first = int(trained.argmax()) if trained.any() and not trained.all() else len(ids)
    prompt, rest = ids[:first].tolist(), ids[first:].tolist()
    return tokenizer.decode(prompt), prompt, tokenizer.decode(rest, skip_special_tokens=True)


def end_tokens(model: Path, tokenizer: Any) -> list[int]:
    """Every token that ends a text, by the tokenizer, config.json and generation_config.json."""
    found = {tokenizer.eos_token_id}
    for name in ("config.json", "generation_config.json"):
        if (model / name).is_file():
            try:
                said = json.loads((model / name).read_text(encoding="utf-8")).get("eos_token_id")
            except (ValueError, AttributeError) as error:
                raise DataError(f"{model / name} is not valid JSON ({error}); download it again") from error
            found |= set(said) if isinstance(said, list) else {said}
    return sorted(found - {None})
