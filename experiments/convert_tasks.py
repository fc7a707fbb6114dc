#!/usr/bin/env python3
"""The LoRA paper's data sets, as their authors publish them, to our JSONL rows {"prompt", "completion"}.

Knows eight formats; standard library only. Refuses to know the trainer. A file that is not what it is said to be ends
in one line, and nothing is written.

    python experiments/convert_tasks.py e2e trainset.csv --out data/e2e/train.jsonl
    python experiments/convert_tasks.py wikisql train.jsonl train.tables.jsonl --out data/wikisql/train.jsonl
    python experiments/convert_tasks.py webnlg test.json --out data/webnlg/test.jsonl --group

Where an input has several references, each makes a row; with --group they make one, its first the completion and all
of them in "references" (training ignores that key; scoring wants it).
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

AGGREGATES = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")  # WikiSQL's codes
CONDITIONS = ("=", ">", "<", "OP")
GLUE: dict[str, tuple[tuple[str, ...], str, dict[str, str]]] = {  # task: text columns, label column, label -> word
    "sst2": (("sentence",), "label", {"0": "negative", "1": "positive"}),
    "cola": (("3",), "1", {"0": "unacceptable", "1": "acceptable"}),  # without a header: columns by number
    "mrpc": (("#1 String", "#2 String"), "Quality", {"0": "different", "1": "equivalent"}),
    "qqp": (("question1", "question2"), "is_duplicate", {"0": "different", "1": "duplicate"}),
    "qnli": (("question", "sentence"), "label", {"entailment": "yes", "not_entailment": "no"}),
    "rte": (("sentence1", "sentence2"), "label", {"entailment": "yes", "not_entailment": "no"}),
}
MNLI = {"entailment": "yes", "neutral": "maybe", "contradiction": "no"}
Row = dict[str, str]


class BadInput(Exception):
    """A file that cannot be converted; says where and why in one line."""


def pair(prompt: str, completion: str) -> Row:
    """A row; the space before the completion belongs to it, since nothing is put between the two."""
    return {"prompt": prompt.strip(), "completion": f" {completion.strip()}"}


def e2e(path: Path) -> Iterator[Row]:
    """CSV with the columns mr and ref: `name[Alimentum], area[city centre]`."""
    for number, row in table(path, ",", ("mr", "ref")):
        fields = [field.partition("[") for field in row["mr"].split("], ")]
        if not all(bracket for _, bracket, _ in fields):
            raise BadInput(f"{path}: row {number}: mr is {row['mr']!r}, not `name[value], ...`")
        facts = " | ".join(f"{name} : {value.rstrip(']')}" for name, _, value in fields)
        yield pair(f"{facts}\nText:", row["ref"])


def webnlg(path: Path) -> Iterator[Row]:
    """The challenge's JSON: entries, each with modifiedtripleset and lexicalisations."""
    for number, entry in enumerate(load(path)["entries"], start=1):
        (content,) = entry.values()
        triples = [(t["subject"], t["property"], t["object"]) for t in content["modifiedtripleset"]]
        texts = [lex["lex"] for lex in content["lexicalisations"] if lex.get("comment", "good") == "good"]
        yield from from_triples(triples, texts, f"{path}: entry {number}")


def dart(path: Path) -> Iterator[Row]:
    """JSON: a list of {tripleset: [[s, p, o], ...], annotations: [{text}, ...]}."""
    for number, entry in enumerate(load(path), start=1):
        texts = [annotation["text"] for annotation in entry["annotations"]]
        yield from from_triples(entry["tripleset"], texts, f"{path}: entry {number}")


def from_triples(triples: Sequence[Sequence[str]], texts: Sequence[str], where: str) -> Iterator[Row]:
    if not triples or any(len(triple) != 3 for triple in triples):
        raise BadInput(f"{where}: a triple does not have three parts")
    facts = " | ".join(" : ".join(part.replace("_", " ") for part in triple) for triple in triples)
    yield from (pair(f"{facts}\nText:", text) for text in texts)


def wikisql(questions: Path, tables: Path) -> Iterator[Row]:
    """JSON lines of questions with coded SQL, and those of their tables (header names by table id)."""
    headers = {table["id"]: table["header"] for _, table in lines(tables)}
    for number, row in lines(questions):
        if row["table_id"] not in headers:
            raise BadInput(f"{questions}: line {number}: table {row['table_id']} is not in {tables}")
        header, sql = headers[row["table_id"]], row["sql"]
        column = header[sql["sel"]]
        chosen = f"{AGGREGATES[sql['agg']]}({column})" if sql["agg"] else column
        where = " AND ".join(f"{header[c]} {CONDITIONS[op]} {value}" for c, op, value in sql["conds"])
        query = f"SELECT {chosen} FROM table" + (f" WHERE {where}" if where else "")
        yield pair(f"Columns: {', '.join(header)}\nQuestion: {row['question']}\nSQL:", query)


def mnli(path: Path) -> Iterator[Row]:
    """JSON lines or TSV with sentence1, sentence2, gold_label; pairs without agreement ("-") are left out."""
    rows = lines(path) if path.suffix == ".jsonl" else table(path, "\t", ("sentence1", "sentence2", "gold_label"))
    for number, row in rows:
        if row["gold_label"] == "-":
            continue
        if row["gold_label"] not in MNLI:
            raise BadInput(f"{path}: row {number}: gold_label is {row['gold_label']!r}, none of {', '.join(MNLI)}")
        yield pair(f"Premise: {row['sentence1']}\nHypothesis: {row['sentence2']}\nEntailed:", MNLI[row["gold_label"]])


def samsum(path: Path) -> Iterator[Row]:
    """JSON: a list of {dialogue, summary}."""
    for entry in load(path):
        dialogue = entry["dialogue"].replace("\r\n", "\n")
        yield pair(f"{dialogue}\nSummary:", entry["summary"])


def glue(task: str) -> Callable[[Path], Iterator[Row]]:
    """TSV of a GLUE task, as its zip holds it: tab-separated, unquoted; CoLA's has no header."""
    columns, label, words = GLUE[task]

    def convert(path: Path) -> Iterator[Row]:
        for number, row in table(path, "\t", (*columns, label), header=task != "cola"):
            if row[label] not in words:
                raise BadInput(f"{path}: row {number}: {label} is {row[label]!r}, none of {', '.join(words)}")
            names = ["Sentence"] if len(columns) == 1 else ["First", "Second"]
            text = "\n".join(f"{name}: {row[column].strip()}" for name, column in zip(names, columns, strict=True))
            yield pair(f"{text}\nLabel:", words[row[label]])

    return convert


FORMATS: dict[str, Callable[..., Iterator[Row]]] = {
    "e2e": e2e,
    "webnlg": webnlg,
    "dart": dart,
    "wikisql": wikisql,
    "mnli": mnli,
    "samsum": samsum,
    **{task: glue(task) for task in GLUE},
}


def table(path: Path, separator: str, columns: Sequence[str], header: bool = True) -> Iterator[tuple[int, Row]]:
    """(number, row by column) of a table; GLUE's and MNLI's hold lone quotation marks, so tabs mean no quoting."""
    quoting = csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE
    csv.field_size_limit(sys.maxsize)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=separator, quoting=quoting)
        names: list[str] | None = next(reader, []) if header else None
        missing = [name for name in columns if names is not None and name not in names]
        if missing:
            raise BadInput(f"{path}: has no column {missing[0]}; it has {', '.join(names or [])[:200] or 'nothing'}")
        for number, cells in enumerate(reader, start=1):
            row = dict(zip(names or map(str, range(len(cells))), cells, strict=False))
            if absent := [name for name in columns if name not in row]:
                raise BadInput(f"{path}: row {number} ends before column {absent[0]}")
            yield number, row


def load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInput(f"{path}: is not valid JSON: {error}") from None


def lines(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield number, json.loads(line)
            except ValueError as error:
                raise BadInput(f"{path}: line {number} is not valid JSON: {error}") from None


def grouped(rows: Iterator[Row]) -> Iterator[dict[str, Any]]:
    """One row for each prompt, in the order of the file."""
    references: dict[str, list[str]] = {}
    for row in rows:
        references.setdefault(row["prompt"], []).append(row["completion"].strip())
    for prompt, texts in references.items():
        yield {**pair(prompt, texts[0]), "references": texts}


def convert(kind: str, files: Sequence[Path], out: Path, group: bool = False) -> int:
    """Write `out`, whole or not at all; how many rows."""
    wanted = 2 if kind == "wikisql" else 1
    if len(files) != wanted:
        raise BadInput(f"{kind} takes {wanted} input file{'s' * (wanted > 1)}, {len(files)} are given")
    partial = out.with_name(f".{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        rows = FORMATS[kind](*files)
        count = 0
        with partial.open("w", encoding="utf-8") as file:
            for row in grouped(rows) if group else rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
        if not count:
            raise BadInput(f"{files[0]}: holds no rows")
        os.replace(partial, out)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise BadInput(f"{files[0]}: is not of the format {kind}: {type(error).__name__}: {error}") from error
    except OSError as error:
        raise BadInput(f"{error.filename}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    return count


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="\n".join(__doc__.splitlines()[5:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("format", choices=list(FORMATS))
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--group", action="store_true", help="one row an input, with all its references")
    args = parser.parse_args()
    try:
        count = convert(args.format, args.files, args.out, args.group)
    except BadInput as error:
        print(f"convert_tasks: {error}", file=sys.stderr)
        return 2
    print(f"convert_tasks: {args.out}: {count:,} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
