"""Tokenised and packed data: made once from the sources, kept in a folder, mapped into memory by every rank.

    <cache>/<key>/  info.json   train-0.ids.npy  train-0.trained.npy ...  validation-0.ids.npy ...

The key is a hash of everything that decides what is in the folder: the sources' bytes, the tokenizer's, the template's,
the options. So the folder is never out of date, and several runs share it. Knows no ranks.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from lora_scale.spec.baselines import prefix_tokens
from lora_scale.spec.config import RunConfig, Source
from lora_scale.spec.errors import DataError, LoraScaleError
from lora_scale.storage import dataset, encoder, packing, sources
from lora_scale.storage.chat import template_of
from lora_scale.storage.dataset import Documents
from lora_scale.storage.durable import whole_directory, write_file
from lora_scale.storage.mixture import Mixture
from lora_scale.storage.packing import Blocks
from lora_scale.storage.rows import Rows, check_fields, read_rows, split

FORMAT = 1  # to be raised whenever the same input gives other arrays
INFO = "info.json"
TOKENIZER = ("*token*", "vocab*", "merges*", "*.model", "chat_template*", "*.tiktoken", "added_tokens.json")
_ARRAYS = ("ids", "trained", "offsets", "lines", "truncated_lines", "dropped_lines")  # of Documents
Progress = Callable[[str, int, int], None]  # file, rows done, of so many


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run's blocks, and the name by which a resumed run knows its training data again."""

    train: Mixture
    validation: Mixture | None
    fingerprint: str


def silent(file: str, done: int, total: int) -> None:
    """No progress."""


def sources_of(cfg: RunConfig) -> tuple[Source, ...]:
    """`data.train` as a list of sources, with what `data` says for all of them."""
    data = cfg.data
    given = data.train if isinstance(data.train, tuple) else (Source(path=str(data.train)),)
    return tuple(
        source.model_copy(
            update={
                "max_rows": source.max_rows or data.max_rows,
                "fields": data.fields if source.fields is None else source.fields,
            }
        )
        for source in given
    )


def folder_of(cfg: RunConfig) -> Path:
    """Where tokenised data of this and other runs is kept."""
    return (cfg.data.cache or cfg.run_dir.parent / "prepared").expanduser()


def key(cfg: RunConfig, model: Path, vocab_size: int | None) -> str:
    """Hash of all that decides the blocks. Reads the sources once: about a second a gigabyte."""
    data, digest = cfg.data, hashlib.sha256()
    template = template_of(data.chat_template) if data.chat_template else None
    held_out = [data.validation, cfg.seed] if isinstance(data.validation, float) else []
    options = [FORMAT, _versions(), data.seq_len, data.packing, data.train_on, template, vocab_size, held_out]
    options.append(prefix_tokens(cfg))
    digest.update(json.dumps(options).encode())
    for file in sorted({file for pattern in TOKENIZER for file in model.glob(pattern) if file.is_file()}):
        digest.update(f"\n{file.name}\n".encode() + file.read_bytes())
    parts = [(source.path, source) for source in sources_of(cfg)]
    if isinstance(data.validation, Path):
        parts.append((str(data.validation), Source(path=str(data.validation), fields=data.fields)))
    for path, source in parts:
        digest.update(json.dumps([path, source.max_rows, source.split, source.subset, source.fields]).encode())
        for piece in sources.identity(Path(path), source.split, source.subset):
            digest.update(piece)
    return digest.hexdigest()[:16]


def _versions() -> list[str]:
    found = []
    for package in ("transformers", "tokenizers"):  # both have changed what they make of a text
        try:
            found.append(version(package))
        except PackageNotFoundError:
            found.append("")
    return found


def open_or_build(
    cfg: RunConfig, model: Path, vocab_size: int | None, progress: Progress = silent
) -> tuple[Path, bool]:
    """The folder with this run's blocks, and whether it had to be made; for one process at a time."""
    folder = folder_of(cfg) / key(cfg, model, vocab_size)
    if (folder / INFO).is_file():
        return folder, False
    train, validation = blocks_of_run(cfg, model, vocab_size, progress)
    try:
        with whole_directory(folder) as partial:
            _save(partial, train, validation)
    except (OSError, LoraScaleError) as error:
        if (folder / INFO).is_file():  # another job was faster
            return folder, False
        raise DataError(f"{folder} cannot be written ({error}); set data.cache to another folder") from None
    return folder, True


def blocks_of_run(
    cfg: RunConfig, model: Path, vocab_size: int | None, progress: Progress = silent
) -> tuple[Mixture, Mixture | None]:
    """Training and validation blocks of the whole run, from the sources."""
    for source in sources_of(cfg):
        check_fields(source.fields or {})
    tokenizer = encoder.tokenizer(model, cfg.model.trust_remote_code, cfg.data.chat_template)
    prefix = prefix_tokens(cfg)
    train, held_out = [], []
    for source in sources_of(cfg):
        rows = read_rows(Path(source.path), source.max_rows, source.fields, source.split, source.subset)
        if isinstance(cfg.data.validation, float):
            rows, other = split(rows, cfg.data.validation, cfg.seed)
            held_out.append(other)
        train.append(rows)
    if isinstance(cfg.data.validation, Path):
        held_out.append(read_rows(cfg.data.validation, None, cfg.data.fields))

    def blocks_of(part: Rows) -> Blocks:
        def tell(done: int, total: int) -> None:
            progress(part.path.name, done, total)

        found = dataset.encode(part, tokenizer, cfg.data.seq_len - prefix, cfg.data.train_on, vocab_size, tell)
        return packing.pack(packing.with_prefix(found, prefix), cfg.data.packing)

    weights = tuple(source.weight for source in sources_of(cfg))
    validation = Mixture.of(*[blocks_of(part) for part in held_out]) if held_out else None
    return Mixture(tuple(blocks_of(part) for part in train), weights), validation


def load(cfg: RunConfig, folder: Path) -> Prepared:
    """What `open_or_build` has made, without reading it: the arrays are mapped."""
    try:
        info = json.loads((folder / INFO).read_text(encoding="utf-8"))
        train = tuple(_blocks(folder, f"train-{n}", about) for n, about in enumerate(info["train"]))
        rest = tuple(_blocks(folder, f"validation-{n}", about) for n, about in enumerate(info["validation"]))
    except FileNotFoundError as error:
        raise DataError(
            f"{error.filename} is not there on this host; set data.cache to a folder that every host sees"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is damaged ({error}); delete it, and it is made anew") from None
    mixture = Mixture(train, tuple(source.weight for source in sources_of(cfg)))
    prints = [f"{part} x {weight}" for part, weight in zip(info["fingerprints"], mixture.weights, strict=True)]
    one = len(prints) == 1 and mixture.weights == (1.0,)
    return Prepared(mixture, Mixture.of(*rest) if rest else None, info["fingerprints"][0] if one else "; ".join(prints))


def _save(folder: Path, train: Mixture, validation: Mixture | None) -> None:
    info: dict[str, Any] = {
        "train": [_save_blocks(folder, f"train-{n}", part) for n, part in enumerate(train.parts)],
        "validation": [
            _save_blocks(folder, f"validation-{n}", part)
            for n, part in enumerate(validation.parts if validation else ())
        ],
        "fingerprints": [part.fingerprint() for part in train.parts],
    }
    write_file(folder / INFO, [json.dumps(info, indent=1).encode()])


def _save_blocks(folder: Path, name: str, blocks: Blocks) -> dict[str, Any]:
    for what, array in _arrays(blocks):
        np.save(folder / f"{name}.{what}.npy", array)
    plain = {field.name: getattr(blocks.documents, field.name) for field in fields(Documents)}
    return {k: str(v) if isinstance(v, Path) else v for k, v in plain.items() if k not in _ARRAYS}


def _arrays(blocks: Blocks) -> Iterator[tuple[str, np.ndarray]]:
    yield from ((name, getattr(blocks.documents, name)) for name in _ARRAYS)
    yield from (("order", blocks.order), ("starts", blocks.starts))


def _blocks(folder: Path, name: str, about: dict[str, Any]) -> Blocks:
    arrays = {what: np.load(folder / f"{name}.{what}.npy", mmap_mode="r") for what in (*_ARRAYS, "order", "starts")}
    order, starts = arrays.pop("order"), arrays.pop("starts")
    return Blocks(Documents(**{**about, "path": Path(about["path"])}, **arrays), order, starts)
