"""A base model's folder: what it holds, whether it is whole, and which file tensors make a parameter of the model.

Knows Hugging Face's files and names, not their elements: only headers and a few sampled bytes are read here. Which
byte ranges a rank keeps is `spec.layout`'s. Forms that are not read are named by `storage.recognise`.
"""

import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from lora_scale.spec.errors import ModelError
from lora_scale.spec.families import family
from lora_scale.spec.layout import ByteRange, TensorEntry
from lora_scale.storage import blocks, recognise, weights
from lora_scale.storage.recognise import INDEX, SINGLE

WEIGHT_DTYPES = ("BF16", "F16", "F32")
SAMPLE_BYTES = 512

_HARMLESS = re.compile(r".*(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.position_ids)")
"""Tensors in older files that models now compute for themselves."""


@dataclass(frozen=True)
class ModelFolder:
    """A base model as its headers describe it; every header is checked."""

    path: Path
    config: dict[str, Any]  # config.json
    tensors: dict[str, TensorEntry]
    files: tuple[Path, ...]
    nbytes: int  # of all tensors, as they are stored

    @property
    def has_blocks(self) -> bool:
        """Whether some of it is stored in fp8 blocks, to be dequantised while it is read."""
        return any(entry.blocks for entry in self.tensors.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors but the scales of blocks."""
        scales = {entry.blocks.scales.name for entry in self.tensors.values() if entry.blocks}
        return {name: entry.shape for name, entry in self.tensors.items() if name not in scales}


def open_folder(path: Path | str, trust_remote_code: bool = False) -> ModelFolder:
    """Reads config.json, the index and every header, or raises ModelError: what is wrong, where, and the way out."""
    path = Path(path)
    try:
        names = {entry.name for entry in path.iterdir()}
        if "config.json" not in names:
            recognise.refuse_without_config(path, names)
        config = _read_json(path / "config.json")
        if not trust_remote_code:
            recognise.refuse_remote_code(path, config)
        recognise.refuse_quantised(path, config, names)
        files = _weight_files(path, names)
    except NotADirectoryError:
        recognise.refuse_file(path)
    except FileNotFoundError as error:
        raise ModelError(f"{error.filename} does not exist") from error
    except OSError as error:
        raise ModelError(f"{error.filename}: cannot be read: {error.strerror}") from error
    tensors: dict[str, TensorEntry] = {}
    for name, expected in files.items():
        found, _ = weights.read_safetensors(path / name)
        _agree_with_index(path / name, expected, found, tensors)
        tensors |= found
    if (size := blocks.block_size(config)) is not None:
        tensors = blocks.with_scales(tensors, size)
    for entry in tensors.values():
        if entry.name.endswith("weight"):
            _check_dtype(entry)
    if not tensors:
        raise ModelError(f"{path} holds no tensors; download it again")
    nbytes = sum(entry.nbytes for entry in tensors.values())
    return ModelFolder(path, config, tensors, tuple(path / name for name in files), nbytes)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} does not hold a JSON object; download it again")
    return value


def _weight_files(path: Path, names: set[str]) -> Mapping[str, set[str] | None]:
    """The weight files, sorted, each with the tensors that the index puts there (None: there is no index)."""
    if INDEX not in names:
        if SINGLE not in names:
            recognise.refuse_without_weights(path, names)
        return {SINGLE: None}
    weight_map = _read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise ModelError(f"{path / INDEX} has no weight_map of tensor names to file names; download it again")
    files: dict[str, set[str]] = {file: set() for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        files[file].add(name)
    if SINGLE in names and SINGLE not in files:
        raise ModelError(f"{path} holds both {SINGLE} and an index of other files; remove the one that is out of date")
    _refuse_outside(path, files)
    missing = [file for file in files if not (path / file).exists()]
    if missing:
        raise ModelError(f"{path} lacks {_few(missing)} of the {len(files)} files of its index; download it again")
    return files


def _refuse_outside(path: Path, files: Iterable[str]) -> None:
    """The index stays in its folder. A *file* in it may be a link out: the hub's cache links each to ../../blobs."""
    inside = path.resolve()
    for file in files:
        parts = PurePosixPath(file)
        outside = parts.is_absolute() or ".." in parts.parts or "\0" in file
        if outside or not (path / file).parent.resolve().is_relative_to(inside):
            raise ModelError(f"{path / INDEX} names {file!r}, which is outside its folder; do not use this model")


def _agree_with_index(
    file: Path, expected: set[str] | None, found: Mapping[str, TensorEntry], earlier: Mapping[str, TensorEntry]
) -> None:
    for name in found.keys() & earlier.keys():
        raise ModelError(
            f"{file}: tensor {name!r} is also in {Path(earlier[name].file).name}; download the folder again"
        )
    if expected is None:
        return
    if missing := sorted(expected - found.keys()):
        raise ModelError(f"{file}: lacks {_few(missing)}, which the index puts there; download the folder again")
    if extra := sorted(found.keys() - expected):
        raise ModelError(f"{file}: holds {_few(extra)}, which the index does not name; download the folder again")


def fingerprint(folder: ModelFolder) -> str:
    """A hash that is the same wherever the folder lies, and another one for another base.

    Covers, for every tensor: its name, file name, dtype, shape, place in the file and SAMPLE_BYTES bytes in its middle.
    It sees any training, merging or reshuffling of files; it cannot see a change outside the samples, such as a few
    edited rows of an embedding, nor one of config.json. It is no check for damage.
    """
    by_file: dict[str, list[TensorEntry]] = {}
    for entry in folder.tensors.values():
        by_file.setdefault(entry.file, []).append(entry)

    with weights.Reader() as reader, ThreadPoolExecutor(16) as pool:  # threads: a remote file system answers in 1-10 ms

        def digest(file: str) -> bytes:
            result = hashlib.sha256()
            for entry in by_file[file]:
                sample = bytearray(min(SAMPLE_BYTES, entry.nbytes))
                middle = entry.offset + (entry.nbytes - len(sample)) // 2
                reader.read_into(ByteRange(file, middle, len(sample), entry.dtype), sample)
                where = str(Path(file).relative_to(folder.path))
                result.update(json.dumps([entry.name, where, entry.dtype, entry.shape, entry.offset]).encode() + sample)
            return result.digest()

        digests = b"".join(pool.map(digest, by_file))
    return f"sha256:{hashlib.sha256(digests).hexdigest()}"


def sources(
    folder: ModelFolder,
    parameter: str,
    shape: tuple[int, ...],
    base_model_prefix: str = "",
    tied: Mapping[str, str] | None = None,
) -> list[TensorEntry]:
    """The file tensors that make one parameter of the built model, end to end: one, except for fused experts.

    Found with or without transformers' `base_model_prefix` ("model", "transformer") and, when absent, under the name it
    is tied to (`tied`: transformers' _tied_weights_keys, in both directions). Shapes and dtypes are checked.
    """
    same = [parameter, *(b for a, b in (tied or {}).items() if a == parameter)]
    same += [a for a, b in (tied or {}).items() if b == parameter]
    row = family(str(folder.config.get("model_type")))
    for name in same:
        for names in ((name,), row.file_tensors(name, shape[0] if len(shape) == 3 else 0) if row else ()):
            found = [_find(folder, part, base_model_prefix) for part in names]
            if found and all(found):
                entries = [entry for entry in found if entry]
                _check_shapes(parameter, shape, entries)
                return entries
    nearest = difflib.get_close_matches(parameter, folder.tensors, n=3) or sorted(folder.tensors)[:3]
    raise ModelError(
        f"{folder.path} has no tensor for {parameter}, which the model of config.json needs; nearest: {_few(nearest)}"
    )


def _find(folder: ModelFolder, name: str, prefix: str) -> TensorEntry | None:
    for candidate in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if candidate in folder.tensors:
            return folder.tensors[candidate]
    return None


def _check_shapes(parameter: str, shape: tuple[int, ...], entries: Sequence[TensorEntry]) -> None:
    if len(entries[0].shape) == len(shape):
        fits = entries[0].shape == shape
    else:  # fused experts: for each expert its matrices, one below the other
        per_expert = len(entries) // shape[0]
        groups = [entries[i : i + per_expert] for i in range(0, len(entries), per_expert)]
        fits = all(
            sum(e.shape[0] for e in group) == shape[1] and all(e.shape[1:] == shape[2:] for e in group)
            for group in groups
        )
    if not fits:
        counted = Counter(entry.shape for entry in entries)
        found = " and ".join(f"{n} x {s}" if n > 1 else f"{s}" for s, n in counted.items())
        raise ModelError(
            f"{entries[0].file}: {entries[0].name} has shape {found}, but the model of config.json needs {shape} for "
            f"{parameter}; config.json belongs to another model"
        )
    for entry in entries:
        _check_dtype(entry)


def _check_dtype(entry: TensorEntry) -> None:
    if entry.dtype not in WEIGHT_DTYPES and entry.blocks is None:
        raise ModelError(f"{entry.file}: {entry.name} is {entry.dtype}; use a checkpoint in bf16, fp16 or fp32")


def unused(folder: ModelFolder, used: Iterable[TensorEntry], tied: Mapping[str, str] | None = None) -> list[str]:
    """Names of file tensors that no parameter took, without those that are known to be harmless."""
    taken = set(tied or {})
    for entry in used:
        taken |= {entry.name, entry.blocks.scales.name} if entry.blocks else {entry.name}
    return [name for name in folder.tensors if name not in taken and not _HARMLESS.fullmatch(name)]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
