"""From what `data.train` names to raw rows: JSON lines, a JSON list, CSV, Parquet, a folder of `datasets`, a hub name.

Knows file formats and where in them a row stands; refuses to know what a row should hold.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_scale.spec.errors import DataError
from lora_scale.storage.problems import BadRowError

Row = dict[str, Any] | BadRowError

_MAGIC = (
    (b"\x1f\x8b", "a gzip file", "unpack it with gunzip"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it with unzstd"),
    (b"PK\x03\x04", "a zip file", "unpack it with unzip"),
    (b"\xff\xfe", "UTF-16 text", "convert it with iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "UTF-16 text", "convert it with iconv -f UTF-16 -t UTF-8"),
    (b"ARROW1", "an Arrow file", "give the folder that the datasets library saved"),
)


@dataclass(frozen=True, slots=True)
class Records:
    """Raw rows with their numbers from 1: lines of a text file, else the rows' own places."""

    unit: str  # "line" or "row", for messages
    rows: Iterable[tuple[int, Row]]


def is_hub_name(path: Path) -> bool:
    """Whether it can only be a data set's name on the hub: `owner/name`, and nothing of that name is here."""
    text = str(path)
    return not path.exists() and text.count("/") == 1 and not text.startswith(("/", ".", "~")) and not path.suffix


def open_records(path: Path, split: str = "train", subset: str | None = None) -> Records:
    """The rows of a source, read as they are asked for. A row that cannot be read is a BadRowError in its place."""
    path = path.expanduser()
    if path.is_dir() or is_hub_name(path):
        return Records("row", _plain(_dataset(path, split, subset)))
    start = _first_bytes(path)
    if start.startswith(b"PAR1"):
        return Records("row", _plain(_parquet(path)))
    if path.suffix in (".csv", ".tsv"):
        return Records("line", _csv(path))
    if path.suffix == ".json" and start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        return Records("row", _json_list(path))
    return Records("line", _json_lines(path))


def identity(path: Path, split: str, subset: str | None) -> Iterator[bytes]:
    """The source's content in pieces, to be hashed; of a data set of the hub the library's own fingerprint."""
    path = path.expanduser()
    if is_hub_name(path):
        yield str(_dataset(path, split, subset)._fingerprint).encode()
        return
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        yield f"\n{file.relative_to(path)}\n".encode()
        with _opened(file) as stream:
            while piece := stream.read(1 << 22):
                yield piece


def fetch(path: Path, split: str, subset: str | None) -> None:
    """Bring a data set of the hub into the cache of this machine."""
    if is_hub_name(path):
        _dataset(path, split, subset)


def _first_bytes(path: Path) -> bytes:
    with _opened(path) as file:
        start = file.read(64)
    for magic, what, cure in _MAGIC:
        if start.startswith(magic):
            raise DataError(f"{path} is {what}, not JSON lines; {cure}")
    return start


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise DataError(
            f"{path} does not exist; data.train and data.validation name a JSONL, JSON, CSV or Parquet file, a folder "
            "of the datasets library, or a name on the hub"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None
    with file:
        yield file


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    # Plain json, not the `datasets` library: that one names no line, converts types silently and writes a cache.
    with _opened(path) as file:
        for line, raw in enumerate(file, start=1):  # in bytes: text mode would also end lines at a lone carriage return
            try:
                yield line, _parse(raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw)
            except BadRowError as error:
                yield line, error


def _parse(raw: bytes) -> dict[str, Any]:
    if not raw.strip():
        raise BadRowError("is empty; every line holds one JSON object (delete the line)")
    try:
        row = json.loads(raw.rstrip(b"\r\n").decode())
    except UnicodeDecodeError as error:
        raise BadRowError(f"is not UTF-8 (byte {error.start}); convert the file, for example with iconv") from None
    except json.JSONDecodeError as error:
        cure = "a list belongs in a file called .json" if raw.lstrip()[:1] == b"[" else "one object a line"
        raise BadRowError(f"is not JSON ({error.msg} at column {error.colno}); {cure}") from None
    except (RecursionError, ValueError) as error:  # ValueError: an integer of thousands of digits
        what = (
            "JSON nested too deeply" if isinstance(error, RecursionError) else "JSON with a number of too many digits"
        )
        raise BadRowError(f"is {what}; a row is a flat object") from None
    if isinstance(row, list):
        raise BadRowError("is a JSON list; call the file .json, or write one object a line: jq -c '.[]'")
    return _object(row)


def _object(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise BadRowError(f"is {kind(row)}; a row is a JSON object")
    return row


def _json_list(path: Path) -> Iterator[tuple[int, Row]]:
    with _opened(path) as file:
        raw = file.read()
    try:
        rows = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors both
        where = f"line {error.lineno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{path} is not a JSON list ({where}); one object a line is a .jsonl file") from None
    for number, row in enumerate(rows, start=1):
        try:
            yield number, _object(row)
        except BadRowError as error:
            yield number, error


def _csv(path: Path) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(1 << 30)
    with _opened(path) as file:
        lines = (line.decode("utf-8-sig" if first else "utf-8") for first, line in _numbered(file))
        reader = csv.DictReader(lines, delimiter="\t" if path.suffix == ".tsv" else ",", strict=True)
        try:
            for row in reader:
                if None in row or None in row.values():
                    n = len([value for key, value in row.items() if key is not None and value is not None])
                    n += len(row.get(None) or [])
                    have = len(reader.fieldnames or [])
                    yield reader.line_num, BadRowError(f"has {n} fields; the head of the file has {have}")
                else:
                    yield reader.line_num, dict(row)
        except csv.Error as error:
            raise DataError(
                f"{path}, line {reader.reader.line_num}: is not CSV ({error}); quotes inside a field are doubled"
            ) from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path}, line {reader.line_num + 1}: is not UTF-8 (byte {error.start})") from None


def _numbered(file: Iterable[bytes]) -> Iterator[tuple[bool, bytes]]:
    for number, line in enumerate(file):
        yield number == 0, line


def _parquet(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{path} is a Parquet file, which needs pyarrow: pip install 'lora-scale[data]'") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise DataError(f"{path} is a damaged Parquet file ({first}); write or copy it anew") from None


def _dataset(path: Path, split: str, subset: str | None) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{path} needs the datasets library: pip install 'lora-scale[data]'") from None
    saved = path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    if not os.isatty(2):
        datasets.disable_progress_bars()
    try:
        found = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path), subset, split=split)
        if saved and isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise DataError(f"{path} has the splits {', '.join(found)}, not {split}; set split in data.train")
            found = found[split]
    except DataError:
        raise
    except Exception as error:  # the library raises whatever its parts raise
        first = (str(error).strip().splitlines() or [""])[0]
        where = (
            "as a folder of the datasets library"
            if path.is_dir()
            else ("and no data set of that name is in the cache, or on the hub; `lora-scale prepare` fetches it")
        )
        raise DataError(f"{path} cannot be read {where} ({type(error).__name__}: {first})") from None
    return found


def _plain(rows: Iterable[dict[str, Any]]) -> Iterator[tuple[int, Row]]:
    """Columns that a table fills with null, because another row has them, are left out again, at any depth."""
    for number, row in enumerate(rows, start=1):
        yield number, {key: _without_null(value) for key, value in row.items() if value is not None}


def _without_null(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null(item) for key, item in value.items() if item is not None}
    return [_without_null(item) for item in value] if isinstance(value, list) else value


def kind(value: Any) -> str:
    """What a value is, in JSON's words."""
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
    return names.get(type(value), f"a {type(value).__name__}")
