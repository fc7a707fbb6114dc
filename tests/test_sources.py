"""Every kind of file gives the same rows, and a bad one is named by its place."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lora_scale.spec.errors import ConfigError, DataError
from lora_scale.storage.rows import check_fields, read_rows
from lora_scale.storage.sources import is_hub_name

ROWS = [{"prompt": f'a "q" {n},\nb', "completion": f" c{n} é"} for n in range(5)]
WANTED = [(row["prompt"], row["completion"]) for row in ROWS]


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pip install 'lora-scale[data]'")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def files(folder: Path) -> dict[str, Path]:
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "a.json").write_text(json.dumps(ROWS, indent=1))
    return {
        "jsonl": folder / "a.jsonl",
        "json": folder / "a.json",
        "csv": write_csv(folder / "a.csv", ROWS),
        "tsv": write_csv(folder / "a.tsv", ROWS, "\t"),
        "parquet": write_parquet(folder / "a.parquet", ROWS),
    }


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    for name, path in files(tmp_path).items():
        rows = read_rows(path)
        assert (rows.values, rows.form) == (WANTED, "prompt"), name
        assert rows.unit == ("row" if name in ("json", "parquet") else "line")
        assert read_rows(path, max_rows=2).values == WANTED[:2]
    assert read_rows(tmp_path / "a.csv").lines.tolist() == [3, 5, 7, 9, 11], "the last line of each row"


def test_a_folder_of_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns that only some rows have come back as null, at any depth, and are left out again."""
    datasets = pytest.importorskip("datasets", reason="needs pip install 'lora-scale[data]'")
    call = [{"function": {"name": "f", "arguments": '{"x": 1}'}}]
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": call}]},
    ]
    made = datasets.Dataset.from_list(rows)
    made.save_to_disk(str(tmp_path / "one"))
    (first, second) = read_rows(tmp_path / "one").values
    assert first.messages == rows[0]["messages"] and first.tools is None
    assert second.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(str(tmp_path / "two"))
    assert len(read_rows(tmp_path / "two", split="test")) == 1
    with pytest.raises(DataError, match=r"has the splits train, test, not dev; set split in data.train"):
        read_rows(tmp_path / "two", split="dev")


def test_a_name_on_the_hub_that_is_not_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name(Path("owner/rows")) and not is_hub_name(Path("rows")) and not is_hub_name(Path("a/b.jsonl"))
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "rows").write_text('{"text": "a"}\n')
    assert not is_hub_name(Path("owner/rows")) and read_rows(Path("owner/rows")).values == ["a"]


GOOD = '{"prompt": "p", "completion": "c"}'
WRONG = {
    "a.csv": ("prompt,completion\na,b\nc\n", ", line 3: has 1 fields; the head of the file has 2"),
    "b.csv": ("prompt,completion\na,b,c\n", ", line 2: has 3 fields; the head of the file has 2"),
    "c.csv": ('prompt,completion\n"a"x,b\n', ", line 2: is not CSV ("),
    "d.csv": ("", " is empty; it needs rows of the form"),
    "e.csv": (b"prompt,completion\na,\xe9\n", ", line 2: is not UTF-8 (byte "),
    "a.json": (f"[{GOOD}, 3, {GOOD}]", ", row 2: is a number; a row is a JSON object"),
    "b.json": (f"[{GOOD}", " is not a JSON list (line 1: Expecting ',' delimiter)"),
    "c.json": ("[]", " is empty; it needs rows of the form"),
    "d.json": (f"{GOOD}\n{{}}\n", ", line 2: has the keys none"),
    "a.parquet": (b"PAR1" + b"x" * 40 + b"PAR1", " is a damaged Parquet file ("),
    "a.arrow": (b"ARROW1\0\0", " is an Arrow file, not JSON lines; give the folder that the datasets library saved"),
    "a.jsonl": ('{"text": ' + "1" * 5000 + "}", ", line 1: is JSON with a number of too many digits"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_named_by_their_place(name: str, tmp_path: Path) -> None:
    content, message = WRONG[name]
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert str(error.value).startswith(f"{path}{message}"), error.value


def test_other_names_for_what_a_row_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "q", "answer": "a", "text": "x"}\n{"question": "r"}\n')
    fields = {"prompt": "question", "completion": "answer"}
    assert read_rows(path, 1, fields).values == [("q", "a")]
    with pytest.raises(DataError) as error:
        read_rows(path, None, fields)
    assert str(error.value).endswith('line 2: has no "answer", which data.fields names; it has the keys "question"')
    with pytest.raises(ConfigError, match=r"data.fields has question, which no form reads; write our name first"):
        check_fields({"question": "prompt"})
