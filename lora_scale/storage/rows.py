"""From a JSONL file to checked rows: what forms there are, what is wrong with a line, which rows are held out.

Knows JSON and line numbers; refuses to know tokenizers, sequence lengths and ranks.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lora_scale.spec.errors import ConfigError, DataError
from lora_scale.storage.problems import BadRowError, Problems

Form = Literal["input_ids", "messages", "prompt", "text"]

# Looked for in this order in the first row; the first form whose keys are all there is the file's.
FORM_KEYS: dict[Form, tuple[str, ...]] = {
    "input_ids": ("input_ids",),
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
}
FORM_NAMES: dict[Form, str] = {
    "input_ids": '{"input_ids"}',
    "messages": '{"messages"}',
    "prompt": '{"prompt", "completion"}',
    "text": '{"text"}',
}
_ALL_FORMS = ", ".join(FORM_NAMES.values())


@dataclass(frozen=True, slots=True)
class Rows:
    """Checked rows of one file; `lines[i]` is the line (from 1) of `values[i]`.

    A value holds only what is trained on: (prompt, completion), the list of messages, the text, or (ids, trained) as
    numpy arrays. Everything is in memory at once: about the size of the file, on every rank.
    """

    path: Path
    form: Form
    values: list[Any]
    lines: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def take(self, keep: np.ndarray) -> "Rows":
        """The rows where the boolean `keep` is true, in the same order."""
        return Rows(self.path, self.form, [self.values[i] for i in np.flatnonzero(keep)], self.lines[keep])


def read_rows(path: Path, max_rows: int | None = None) -> Rows:
    """Every row of a JSONL file, or its first `max_rows`; a DataError names the first few lines that cannot be used."""
    # Plain json, not the `datasets` library: that one names no line, converts types silently and writes a cache.
    problems = Problems(path)
    values: list[Any] = []
    lines: list[int] = []
    form: Form | None = None
    with _open(path) as file:
        for line, raw in enumerate(file, start=1):  # in bytes: text mode would also end lines at a lone carriage return
            if max_rows is not None and line > max_rows:
                break
            try:
                row = _parse(raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw)
                found = _form(row, form, lines[0] if lines else 0)
                values.append(_CHECKS[found](row))
            except BadRowError as error:
                problems.add(line, str(error))
                continue
            form = found
            lines.append(line)
    problems.raise_if_any()
    if form is None:
        raise DataError(f"{path} is empty; it needs one JSON object a line, of the form {_ALL_FORMS}")
    return Rows(path, form, values, np.array(lines, dtype=np.int64))


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
        digest.update(json.dumps(value, sort_keys=True).encode())
    return int.from_bytes(digest.digest()[:8], "little")


def _open(path: Path) -> Any:
    if path.is_dir():
        raise DataError(f"{path} is a folder; give one JSONL file")
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; data.train and data.validation name JSONL files") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None
    start = file.read(4)
    file.seek(0)
    for magic, what, cure in _MAGIC:
        if start.startswith(magic):
            file.close()
            raise DataError(f"{path} is {what}, not JSON lines; {cure}")
    return file


_MAGIC = (
    (b"\x1f\x8b", "a gzip file", "unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it with unzstd"),
    (b"PAR1", "a parquet file", "write it out as JSONL, for example with pandas or datasets (to_json)"),
    (b"PK\x03\x04", "a zip file", "unpack it with unzip"),
    (b"\xff\xfe", "UTF-16 text", "convert it with iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "convert it with iconv -f UTF-16 -t UTF-8"),
)


def _parse(raw: bytes) -> dict[str, Any]:
    if not raw.strip():
        raise BadRowError("is empty; every line holds one JSON object (delete the line)")
    try:
        row = json.loads(raw.rstrip(b"\r\n").decode())
    except UnicodeDecodeError as error:
        raise BadRowError(f"is not UTF-8 (byte {error.start}); convert the file, for example with iconv") from None
    except json.JSONDecodeError as error:
        cure = "write a list out as one object a line: jq -c '.[]'" if raw.lstrip()[:1] == b"[" else "one object a line"
        raise BadRowError(f"is not JSON ({error.msg} at column {error.colno}); {cure}") from None
    except RecursionError:
        raise BadRowError("is JSON nested too deeply; a row is a flat object") from None
    if isinstance(row, list):
        raise BadRowError("is a JSON list; write it out as one object a line: jq -c '.[]'")
    if not isinstance(row, dict):
        raise BadRowError(f"is {_kind(row)}; a row is a JSON object of the form {_ALL_FORMS}")
    return row


def _form(row: dict[str, Any], file_form: Form | None, first_line: int) -> Form:
    """The file's form where the row has it; for the first row, the first form that fits."""
    if file_form is not None and all(key in row for key in FORM_KEYS[file_form]):
        return file_form
    fits: Form | None = next((form for form, keys in FORM_KEYS.items() if all(key in row for key in keys)), None)
    if file_form is not None and fits is not None:
        raise BadRowError(
            f"is of the form {FORM_NAMES[fits]}, but line {first_line} of {FORM_NAMES[file_form]}; "
            "one file holds one form"
        )
    if fits is not None:
        return fits
    for key, other in (("prompt", "completion"), ("completion", "prompt")):
        if key in row and file_form in (None, "prompt"):
            raise BadRowError(f'has "{key}" but no "{other}"; a row needs both')
    keys = ", ".join(json.dumps(key) for key in list(row)[:8]) or "none"
    wanted = f"of the form {FORM_NAMES[file_form]}, as line {first_line}" if file_form else f"one of {_ALL_FORMS}"
    raise BadRowError(f"has the keys {keys}; it must be {wanted}; rename the keys")


def _text(row: dict[str, Any], key: str, where: str = "") -> str:
    value = row[key]
    if not isinstance(value, str):
        hint = '; write a conversation as {"messages"}' if isinstance(value, list) and not where else ""
        raise BadRowError(f'"{key}"{where} is {_kind(value)}; it must be a string{hint}')
    try:
        value.encode()
    except (
        UnicodeEncodeError
    ) as error:  # "\ud800" is valid JSON but no text; tokenizers fail on it without a line number
        raise BadRowError(
            f'"{key}"{where} holds half a surrogate pair (character {error.start}); replace it by U+FFFD'
        ) from None
    return value


def _check_prompt(row: dict[str, Any]) -> tuple[str, str]:
    return _text(row, "prompt"), _text(row, "completion")


def _check_text(row: dict[str, Any]) -> str:
    return _text(row, "text")


def _check_messages(row: dict[str, Any]) -> list[dict[str, str]]:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        kind = "an empty list" if isinstance(messages, list) else _kind(messages)
        raise BadRowError(f'"messages" is {kind}; it must be a list of {{"role", "content"}}')
    checked = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise BadRowError(f'message {number} is {_kind(message)}; it must be an object with "role" and "content"')
        for key in ("role", "content"):
            if key not in message:
                hint = '; rename "from" and "value"' if "from" in message else ""
                raise BadRowError(f'message {number} has no "{key}"; it needs "role" and "content"{hint}')
        where = f" of message {number}"
        if message.get("tool_calls"):
            raise BadRowError(f"message {number} has tool_calls; only plain text messages can be trained on")
        checked.append({"role": _text(message, "role", where), "content": _text(message, "content", where)})
    return checked


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
        raise BadRowError(f'"{key}" is {_kind(value)}; it must be a list of integers')
    for at, entry in enumerate(value):
        if type(entry) is not int:  # True is an int to Python, and no token
            raise BadRowError(f'"{key}"[{at}] is {_kind(entry)}; it must be an integer')
        if not -(2**31) <= entry < 2**31:
            raise BadRowError(f'"{key}"[{at}] is {entry}; it lies outside every vocabulary')
    return np.array(value, dtype=np.int32)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names[type(value)]


_CHECKS: dict[Form, Callable[[dict[str, Any]], Any]] = {
    "input_ids": _check_ids,
    "messages": _check_messages,
    "prompt": _check_prompt,
    "text": _check_text,
}
