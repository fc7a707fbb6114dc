#!/usr/bin/env python3
"""The task "Debian package description -> its one-line synopsis" as JSONL, from apt's own index.

Knows apt's files and how rows are chosen and split; standard library only. Refuses to know the trainer and the model.
Needs no root: apt works in a folder of ours. Where apt cannot deliver, the sample in tests/data is used, and said so.

    python scripts/get_data.py [--out data/synopsis] [--sample]
"""

import argparse
import hashlib
import itertools
import json
import os
import pwd
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

RELEASE = "bookworm"  # one release for everybody: the rows do not depend on the Debian that runs this
ARCHITECTURE = "amd64"
SAMPLE = Path(__file__).resolve().parent.parent / "tests" / "data"
SPLITS = ("train", "val", "test")
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

SECONDARY = re.compile(r"-(dbg|dbgsym|doc|dev|data|common|l10n.*|locales?)$")
GENERATED = re.compile(r"packaged by debcargo|This package contains the source for the Rust")

# Read after the machine's own settings (proxies stay). The user _apt may not write into our folder; the machine's hooks
# after an update are not ours to run; plain-text lists need no decompressor here.
APT_CONF = """\
Dir::State::Lists "{folder}/lists";
Dir::Cache "{folder}/cache";
Dir::Etc::SourceList "{folder}/sources.list";
Dir::Etc::SourceParts "{folder}/parts";
APT::Architecture "{architecture}";
#clear APT::Architectures;
APT::Architectures {{ "{architecture}"; }};
APT::Sandbox::User "{user}";
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::Languages;
Acquire::Languages {{ "en"; }};
Acquire::GzipIndexes "false";
Acquire::Retries "2";
Acquire::http::Timeout "30";
"""


class NoArchive(Exception):
    """apt cannot deliver the index; says why in one line."""


def apt_update(folder: Path) -> Path:
    """Fetch the package index and the English descriptions into `folder`; return the folder of plain-text lists.

    Uses the first Debian mirror among the machine's own sources, so that proxies and local mirrors keep working.
    """
    if shutil.which("apt-get") is None:
        raise NoArchive("there is no apt-get on this machine")
    for name in ("lists/partial", "cache/archives/partial", "parts"):
        (folder / name).mkdir(parents=True)
    mirror = debian_mirror(folder)
    options = f"arch={ARCHITECTURE}" + (f" signed-by={KEYRING}" if KEYRING.exists() else "")
    (folder / "sources.list").write_text(f"deb [{options}] {mirror} {RELEASE} main\n")
    conf = APT_CONF.format(folder=folder, architecture=ARCHITECTURE, user=user_name())
    (folder / "apt.conf").write_text(conf)
    command = ["apt-get", "-c", str(folder / "apt.conf"), "--error-on=any", "update"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith(("E:", "W:", "Err"))]
        raise NoArchive(f"apt-get update failed: {lines[0] if lines else f'exit code {done.returncode}'}")
    return folder / "lists"


def debian_mirror(folder: Path) -> str:
    """The URI of the first source that serves a Debian release (not its security or third-party archives)."""
    command = ["apt-get", "update", "--print-uris", "-o", f"Dir::State::Lists={folder}/lists"]
    listed = subprocess.run(command, capture_output=True, text=True).stdout
    for uri, suite in re.findall(r"^'(\S+)/dists/([^/\s]+)/InRelease'", listed, re.M):
        if uri.endswith("/debian") and "-" not in suite:
            return uri
    raise NoArchive("apt's sources on this machine name no Debian mirror")


def user_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return "root"  # without an entry of its own the process is not root, and apt does not change user


def stanzas(path: Path) -> Iterator[dict[str, str]]:
    """The paragraphs of a Debian control file that belong to a package; continuation lines keep their indent."""
    fields: dict[str, str] = {}
    last = ""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            line = line.rstrip("\n")
            if not line:
                if "Package" in fields:
                    yield fields
                fields = {}
            elif line[0] in " \t":
                fields[last] += "\n" + line[1:]
            else:
                last, _, value = line.partition(":")
                fields[last] = value.strip()
    if "Package" in fields:
        yield fields


def unwrap(text: str) -> str:
    """A control file's long description as plain text: wrapped lines joined, one line a paragraph or list item."""
    paragraphs: list[str] = []
    current = ""
    for line in text.split("\n"):
        is_item = re.match(r"\s+\S|\s*[*-] ", line) is not None
        if line.strip() == "." or is_item:
            paragraphs.append(current)
            current = re.sub(r"\s+", " ", line.strip()) if is_item else ""
        else:
            current = f"{current} {line.strip()}".strip()
    return "\n".join(paragraph for paragraph in [*paragraphs, current] if paragraph)


def described_packages(lists: Path) -> dict[str, list[dict[str, str]]]:
    """Source package -> its binary packages that have a synopsis and a long description."""
    english = {}
    for path in lists.glob(f"*_dists_{RELEASE}_main_i18n_Translation-en"):
        english |= {(s["Package"], s["Description-md5"]): s["Description-en"] for s in stanzas(path)}
    by_source = defaultdict(list)
    for path in sorted(lists.glob(f"*_dists_{RELEASE}_main_binary-*_Packages")):
        for fields in stanzas(path):
            full = english.get((fields["Package"], fields.get("Description-md5", "")), "")
            synopsis, newline, long = full.partition("\n")
            if newline:
                source = fields.get("Source", fields["Package"]).split(" ")[0]
                row = {
                    "package": fields["Package"],
                    "source": source,
                    "synopsis": re.sub(r"\s+", " ", synopsis.strip()),
                    "long": unwrap(long),
                }
                by_source[source].append(row)
    return by_source


def main_package(source: str, packages: list[dict[str, str]]) -> dict[str, str]:
    """The package that stands for its source: the one of the same name, else the longest description."""
    primary = [p for p in packages if not SECONDARY.search(p["package"])] or packages
    same_name = [p for p in primary if p["package"] == source]
    return same_name[0] if same_name else max(primary, key=lambda p: len(p["long"]))


def choose(by_source: dict[str, list[dict[str, str]]]) -> list[dict[str, str]]:
    """One row a source; no two rows with the same synopsis or the same beginning; nothing generated by a tool."""
    rows = []
    seen_long: set[str] = set()
    seen_synopsis: set[str] = set()
    for source in sorted(by_source):
        row = main_package(source, by_source[source])
        long, synopsis = row["long"], row["synopsis"]
        beginning = re.sub(r"\W+", "", long.lower())[:200]
        usable = 120 <= len(long) <= 2400 and 10 <= len(synopsis) <= 100 and not GENERATED.search(long)
        if not usable or beginning in seen_long or synopsis.lower() in seen_synopsis:
            continue
        seen_long.add(beginning)
        seen_synopsis.add(synopsis.lower())
        if sum(ord(char) > 127 for char in long) <= 10:
            rows.append(row)
    return rows


def number_of(source: str) -> int:
    return int(hashlib.sha1(source.encode()).hexdigest(), 16)


def split_of(source: str) -> str:
    """8% test, 4% validation, the rest training: a function of the source package's name only."""
    bucket = number_of(source) % 100
    return "test" if bucket < 8 else "val" if bucket < 12 else "train"


def split_rows(rows: list[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """The examples by split, in an order that is random but fixed: the first n rows are a fair sample."""
    ordered = sorted(rows, key=lambda row: number_of(row["source"]))
    splits = {split: [row for row in ordered if split_of(row["source"]) == split] for split in SPLITS}
    sources = {split: {row["source"] for row in splits[split]} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not sources[one] & sources[other], f"a source package is in {one} and in {other}"
    return {split: [as_example(row) for row in splits[split]] for split in SPLITS}


def as_example(row: dict[str, str]) -> dict[str, str]:
    prompt = f"Package: {row['package']}\nDescription: {row['long']}\nSynopsis:"
    return {"prompt": prompt, "completion": f" {row['synopsis']}", "package": row["package"]}


def write(out: Path, rows: dict[str, list[dict[str, str]]], origin: str) -> None:
    """The three files and `source.json`, written beside `out` and renamed: whole or not there."""
    temporary = out.with_name(f".{out.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for split in SPLITS:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[split])
        (temporary / f"{split}.jsonl").write_text(text, encoding="utf-8")
    counts = {split: len(rows[split]) for split in SPLITS}
    (temporary / "source.json").write_text(json.dumps({"origin": origin, "rows": counts}, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


def from_archive(parent: Path) -> dict[str, list[dict[str, str]]]:
    parent.mkdir(parents=True, exist_ok=True)
    for leftover in parent.glob(".apt-*"):
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(prefix=".apt-", dir=parent) as folder:
        by_source = described_packages(apt_update(Path(folder).resolve()))
    splits = split_rows(choose(by_source))
    if not all(splits.values()):
        raise NoArchive("apt's index holds too few English descriptions")
    return splits


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def from_sample() -> dict[str, list[dict[str, str]]]:
    return {split: read_rows(SAMPLE / f"synopsis-{split}.jsonl") for split in SPLITS}


def described(counts: dict[str, int]) -> str:
    return ", ".join(f"{split} {count:,}" for split, count in counts.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/synopsis"))
    parser.add_argument("--sample", action="store_true", help="use the sample of the repository; download nothing")
    args = parser.parse_args()
    record = args.out / "source.json"
    if record.exists():
        there = json.loads(record.read_text())
        if args.sample or there["origin"] != "sample":
            print(f"data: {args.out} is there ({there['origin']}; {described(there['rows'])})")
            return 0
    try:
        if args.sample:
            raise NoArchive("asked for with --sample")
        print("data: fetching Debian's package index and English descriptions (15 MB, about 15 s)", flush=True)
        rows, origin = from_archive(args.out.parent), f"Debian {RELEASE}"
    except NoArchive as reason:
        print(f"data: using the sample in tests/data instead of the whole archive: {reason}")
        rows, origin = from_sample(), "sample"
    write(args.out, rows, origin)
    print(f"data: {args.out}: {described({split: len(rows[split]) for split in SPLITS})} rows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
