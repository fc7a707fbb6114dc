"""From raw rows to checked ones: what forms there are, what is wrong with a row, which rows are held out.

Knows keys and types; refuses to know files, tokenizers, sequence lengths and ranks.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lora_scale.spec.errors import ConfigError, DataError
from lora_scale.storage import conversations, sources
from lora_scale.storage.conversations import text_of
from lora_scale.storage.problems import BadRowError, Problems
from lora_scale.storage.sources import kind

Form = Literal["input_ids", "messages", "conversations", "prompt", "instruction", "text"]
Written = Literal["input_ids", "messages", "prompt", "text"]

# Looked for in this order in the first row; the first form whose keys are all there is the file's.
FORM_KEYS: dict[Form, tuple[str, ...]] = {
    "input_ids": ("input_ids",),
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
    "text": ("text",),
}
FORM_NAMES: dict[Form, str] = {
    form: "{" + ", ".join(f'"{key}"' for key in keys) + "}" for form, keys in FORM_KEYS.items()
}
ALSO = ("labels", "input", "system", "history", "tools")  # keys that some form reads where a row has them
ANSWERS = {"prompt": "completion", "instruction": "output"}
_ALL_FORMS = ", ".join(FORM_NAMES.values())


@dataclass(frozen=True, slots=True)
class Rows:
    """Checked rows of one source; `lines[i]` is the line, or row, (from 1) of `values[i]`.

    A value holds only what is trained on: (prompt, completion), a Conversation, the text, or (ids, trained) as
    numpy arrays. Everything is in memory at once: about the size of the file, on one rank.
    """

    path: Path
    form: Written
    values: list[Any]
    lines: np.ndarray
    unit: str = "line"

    def __len__(self) -> int:
        return len(self.values)

    def take(self, keep: np.ndarray) -> "Rows":
        """The rows where the boolean `keep` is true, in the same order."""
        return Rows(self.path, self.form, [self.values[i] for i in np.flatnonzero(keep)], self.lines[keep], self.unit)


def read_rows(
    path: Path,
    max_rows: int | None = None,
    fields: Mapping[str, str] | None = None,
    split: str = "train",
    subset: str | None = None,
    answered: bool = True,
) -> Rows:
    """Every row of a source, or its first `max_rows`; a DataError names the first few that cannot be used.

    `fields` says what a row calls what we call otherwise: {"prompt": "question"}. Unless rows must be `answered`, a
    prompt may stand without its completion, which then is "".
    """
    records = sources.open_records(path, split, subset)
    problems = Problems(path, records.unit)
    values: list[Any] = []
    lines: list[int] = []
    form: Form | None = None
    for count, (line, record) in enumerate(records.rows, start=1):
        if max_rows is not None and count > max_rows:
            break
        try:
            if isinstance(record, BadRowError):
                raise record
            row = _renamed(record, fields, answered) if fields else record
            row = row if answered else _answered(row)
            found = _form(row, form, f"{records.unit} {lines[0]}" if lines else "")
            values.append(_CHECKS[found](row))
        except BadRowError as error:
            problems.add(line, str(error))
            continue
        form = found
        lines.append(line)
    problems.raise_if_any()
    if form is None:
        raise DataError(f"{path} is empty; it needs rows of the form {_ALL_FORMS}")
    written: Written = "messages" if form in ("conversations", "instruction") else form  # type: ignore[assignment]
    return Rows(path, written, values, np.array(lines, dtype=np.int64), records.unit)


def check_fields(fields: Mapping[str, str]) -> None:
    """A ConfigError where `data.fields` renames into a name that no form reads."""
    ours = {*ALSO, *(key for keys in FORM_KEYS.values() for key in keys)}
    if strange := [name for name in fields if name not in ours]:
        raise ConfigError(
            f"data.fields has {strange[0]}, which no form reads; write our name first, "
            f"{{prompt: question}}; ours are {', '.join(sorted(ours))}"
        )


def _answered(row: dict[str, Any]) -> dict[str, Any]:
    """With an empty answer where a form that has one lacks it."""
    for asked, answer in ANSWERS.items():
        if asked in row and answer not in row:
            return {**row, answer: ""}
    return row


def _renamed(row: dict[str, Any], fields: Mapping[str, str], answered: bool) -> dict[str, Any]:
    optional = ALSO if answered else (*ALSO, *ANSWERS.values())
    if absent := [theirs for ours, theirs in fields.items() if theirs not in row and ours not in optional]:
        keys = ", ".join(json.dumps(key) for key in list(row)[:8]) or "none"
        raise BadRowError(f'has no "{absent[0]}", which data.fields names; it has the keys {keys}')
    return row | {ours: row[theirs] for ours, theirs in fields.items() if theirs in row}


def split(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    """(training rows, validation rows): a row's side depends on its content and the seed only.

    So equal rows never stand on both sides, and rows added later move no other row.
    """
    hashes = np.array([_hash(value, seed) for value in rows.values], dtype=np.uint64)
    held_out = hashes < np.uint64(int(fraction * 2.0**63) * 2)
    n_held_out = int(held_out.sum())
    if n_held_out in (0, len(rows)):
        side = "validation" if n_held_out == 0 else "training"
        raise ConfigError(
            f"data.validation is {fraction}; of the {len(rows):,} rows of {rows.path} that leaves none for {side}; "
            "give another fraction, or a file of its own"
        )
    return rows.take(~held_out), rows.take(held_out)


def _hash(value: Any, seed: int) -> int:
    digest = hashlib.sha256(f"{seed}\n".encode())
    if isinstance(value, tuple) and isinstance(value[0], np.ndarray):
        ids, trained = value
        digest.update(ids.tobytes())
        digest.update(trained.tobytes())
    else:
        digest.update(json.dumps(value, sort_keys=True, default=str).encode())
    return int.from_bytes(digest.digest()[:8], "little")


def _form(row: dict[str, Any], file_form: Form | None, first: str) -> Form:
    """The file's form where the row has it; for the first row, the first form that fits."""
    if file_form is not None and all(key in row for key in FORM_KEYS[file_form]):
        return file_form
    fits: Form | None = next((form for form, keys in FORM_KEYS.items() if all(key in row for key in keys)), None)
    if file_form is not None and fits is not None:
        raise BadRowError(
            f"is of the form {FORM_NAMES[fits]}, but {first} of {FORM_NAMES[file_form]}; one file holds one form"
        )
    if fits is not None:
        return fits
    for key, other in (("prompt", "completion"), ("completion", "prompt")):
        if key in row and file_form in (None, "prompt"):
            raise BadRowError(f'has "{key}" but no "{other}"; a row needs both')
    keys = ", ".join(json.dumps(key) for key in list(row)[:8]) or "none"
    wanted = f"of the form {FORM_NAMES[file_form]}, as {first}" if file_form else f"one of {_ALL_FORMS}"
    raise BadRowError(
        f"has the keys {keys}; it must be {wanted}; rename the keys, or say in data.fields what they hold"
    )


def _check_prompt(row: dict[str, Any]) -> tuple[str, str]:
    return text_of(row, "prompt"), text_of(row, "completion")


def _check_text(row: dict[str, Any]) -> str:
    return text_of(row, "text")


def _check_ids(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(ids as int32, which of them carry loss)."""
    ids = _integers(row, "input_ids")
    if len(ids) == 0:
        raise BadRowError('"input_ids" is an empty list; delete the row')
    if row.get("labels") is None:
        return ids, np.ones(len(ids), dtype=bool)
    labels = _integers(row, "labels")
    if len(labels) != len(ids):
        raise BadRowError(f'"labels" has {len(labels)} entries and "input_ids" {len(ids)}; there is one label a token')
    wrong = np.flatnonzero((labels != ids) & (labels != -100))
    if len(wrong):
        at = int(wrong[0])
        raise BadRowError(
            f'"labels"[{at}] is {labels[at]} and "input_ids"[{at}] is {ids[at]}; a label is its own token or -100 '
            "(labels are not shifted)"
        )
    return ids, labels != -100


def _integers(row: dict[str, Any], key: str) -> np.ndarray:
    value = row[key]
    if not isinstance(value, list):
        raise BadRowError(f'"{key}" is {kind(value)}; it must be a list of integers')
    for at, entry in enumerate(value):
        if type(entry) is not int:  # True is an int to Python, and no token
            raise BadRowError(f'"{key}"[{at}] is {kind(entry)}; it must be an integer')
        if not -(2**31) <= entry < 2**31:
            raise BadRowError(f'"{key}"[{at}] is {entry}; it lies outside every vocabulary')
    return np.array(value, dtype=np.int32)


_CHECKS: dict[Form, Callable[[dict[str, Any]], Any]] = {
    "input_ids": _check_ids,
    "messages": conversations.of_messages,
    "conversations": conversations.of_sharegpt,
    "prompt": _check_prompt,
    "instruction": conversations.of_alpaca,
    "text": _check_text,
}
