"""Read a config file and `key=value` overrides into a RunConfig, or say in plain words what is wrong with them.

Knows YAML and pydantic's errors. What the keys mean is `spec.config`'s; no file that a config names is opened here.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.keys import (
    Key,
    inner_key,
    inner_names,
    is_suspicious,
    key_names,
    keys,
    missing,
    sections,
    show,
    unknown,
    wrong,
)

MAX_BYTES = 1 << 20  # a config is some kilobytes; more is another file given by mistake
YAML_PROBLEMS = {  # how the reader's message begins: what to do about it
    r'found duplicate key "(?P<key>.*?)"': "the key {key} stands twice; keep one",
    r"found character '\\t'": "a tab; YAML is indented with spaces",
    r"found character '(?P<char>.)' that cannot start": "a text that begins with {char} needs quotes",
    r"mapping values are not allowed": "a ': ' too many, or wrong indentation; a text with ': ' in it needs quotes",
    r"found unknown escape": "an unknown \\ escape; patterns stand in single quotes, where \\ is an ordinary character",
    r"could not determine a constructor for the tag '(?P<tag>.*)'": "the tag {tag} is not read",
    r"but found another document": "a second document ('---'); one config a file",
    r"expected ',' or": "brackets that do not match, or a text with brackets or commas in it that needs quotes",
    r"(year|month|day|hour|minute|second)\b.* (must be|is out of)": "a text that looks like a date needs quotes",
    r"Exceeds the limit": "a number with thousands of digits",
}


def load(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read the YAML file at `path`, apply `key=value` overrides in their order, and check every key.

    All mistakes are named in one ConfigError, a line each. A relative path in a config starts at the current directory,
    as on the command line, not at the config's folder; `~/` is the home folder.
    """
    return _checked(_mapping(_parse(_read(Path(path)), str(path)), str(path)), overrides)


def of_model(path: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a model alone: what a run needs beside it has values that nothing reads."""
    unused = {"data": {"train": "-"}, "run_dir": "-", "train": {"max_steps": 1}}
    return _checked({"model": {"path": path}, **unused}, overrides)


def _checked(tree: dict[str, Any], overrides: Sequence[str]) -> RunConfig:
    errors = [error for override in overrides for error in _override(tree, override)]
    values, strange, broken = _sorted_out(tree)
    errors += strange
    complaints: dict[str, str] = {}
    config = None
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        for name, text in _reworded(error, values):
            if name.partition(".")[0] not in broken:
                complaints.setdefault(name, text)
    for key in keys().values():
        value = _at(values, key)
        if value is not None and key.name not in complaints and is_suspicious(key, value):
            complaints[key.name] = wrong(key, value)
    errors += [complaints[name] for name in [*keys(), ""] if name in complaints]
    if errors or config is None:
        raise ConfigError("\n".join(errors))
    return config


def origins(path: Path | str, overrides: Sequence[str] = ()) -> dict[str, str]:
    """Where the value of each key comes from: "default", the file's name, or the override as it was given."""
    tree = _mapping(_parse(_read(Path(path)), str(path)), str(path))
    found = {
        key.name: str(path) if _at(_sorted_out(tree)[0], key) is not None else "default" for key in keys().values()
    }
    for override in overrides:
        before = _sorted_out(tree)[0]
        _override(tree, override)
        after = _sorted_out(tree)[0]
        found |= {key.name: override for key in keys().values() if _at(before, key) != _at(after, key)}
    return found


def schema() -> dict[str, Any]:
    """JSON Schema of a config file, for editors."""
    made = RunConfig.model_json_schema()
    made["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    made["title"] = "A run of lora-scale"
    made["properties"]["model"] = {"anyOf": [{"type": "string"}, made["properties"]["model"]]}
    for name in sections():  # an empty section is its defaults
        if name not in made["required"]:
            made["properties"][name] = {"anyOf": [{"type": "null"}, made["properties"][name]]}
    return made


def resolved_json(config: RunConfig) -> str:
    """Every key with its value, defaults included. `load` reads it back."""
    return json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def config_sha256(config: RunConfig) -> str:
    """Hash of everything that decides a run's results: not where it lies, how long a job may take, who looks on."""
    aside: Any = {"run_dir": True, "resume": True, "max_hours": True, "track": True, "data": {"cache"}}
    deciding = config.model_dump(mode="json", exclude=aside)
    return hashlib.sha256(json.dumps(deciding, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed from one resolved config to another, a line a key: "lora.r: 8 -> 16"."""
    before, after = _flat(old), _flat(new)
    changed = [
        name for name in {**before, **after} if (name in before, before.get(name)) != (name in after, after.get(name))
    ]
    return [f"{name}: {_shown(before, name)} -> {_shown(after, name)}" for name in changed]


def _shown(flat: Mapping[str, Any], name: str) -> str:
    return show(flat[name]) if name in flat else "absent"


def _flat(tree: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{where}{name}.") if isinstance(value, Mapping) else {f"{where}{name}": value}
    return flat


def _read(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ConfigError(f"{path} has {size:,} bytes; a config is a small YAML file")
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; it must be a config, a YAML file") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; it must be a config, a YAML file") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 from byte {error.start:,} on; a config is a YAML file in UTF-8"
        ) from None


def _parse(text: str, where: str) -> Any:
    """Read YAML 1.2: 2e-4 is a number, off and no are words, a key that stands twice is an error."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except (YAMLError, ValueError, RecursionError) as error:  # ValueError: an impossible date, a number of 5000 digits
        mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
        line = f", line {mark.line + 1}" if mark is not None and "\n" in text.strip() else ""
        raise ConfigError(f"{where}{line}: {_yaml_problem(error)}") from None


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    problem = (error.problem if isinstance(error, MarkedYAMLError) else None) or str(error).partition("\n")[0]
    for pattern, words in YAML_PROBLEMS.items():
        if match := re.match(pattern, problem):
            return words.format(**match.groupdict())
    return problem


def _mapping(data: Any, where: str) -> dict[str, Any]:
    if data is None:
        required = ", ".join(key.name for key in keys().values() if key.required)
        raise ConfigError(f"{where} is empty; a config has at least {required} and train.epochs")
    if not isinstance(data, dict):
        raise ConfigError(
            f"{where} holds {show(data)}; a config is a mapping, `key: value` with a space after the colon"
        )
    tree = {str(name): value for name, value in data.items()}
    if isinstance(tree.get("model"), str):
        tree["model"] = {"path": tree["model"]}
    return {name: {} if value is None and name in sections() else value for name, value in tree.items()}


def _override(tree: dict[str, Any], override: str) -> list[str]:
    """Set one `key=value` in the tree; what is wrong with it is the answer. A mapping is merged into a section."""
    name, equals, text = override.partition("=")
    name = name.strip()
    if not name or not equals:
        return [f"override {show(override)} is not of the form key=value"]
    if not text.strip():
        return [f"override {show(override)} has no value; for nothing write {name}=null"]
    try:
        value = _parse(text, f"override {show(override)}")
    except ConfigError as error:
        return [str(error)]
    if name == "model" and isinstance(value, str):
        name = "model.path"
    if name in sections() and isinstance(value, dict):
        return [error for leaf, inner in value.items() for error in _set(tree, f"{name}.{leaf}", inner)]
    return _set(tree, name, value)


def _set(tree: dict[str, Any], name: str, value: Any) -> list[str]:
    """Copies what it changes: two sections may be one object, by a YAML anchor."""
    pattern = next((key.name for key in keys().values() if key.accepts(dict) and name.startswith(f"{key.name}.")), "")
    key = pattern or name
    if key not in keys() and key not in sections():
        return [unknown(name)]
    section, _, leaf = key.rpartition(".")
    inside = tree.get(section, {})
    if not section:
        tree[key] = value
    elif isinstance(inside, dict):  # where it is not, `_sorted_out` says so
        if pattern:  # lora.rank_pattern.layers.0.q_proj=4: what follows the key is a pattern, dots and all
            before = inside.get(leaf)
            value = {**(before if isinstance(before, dict) else {}), name.removeprefix(f"{pattern}."): value}
        tree[section] = {**inside, leaf: value}
    return []


def _sorted_out(tree: Mapping[str, Any]) -> tuple[dict[str, Any], list[str], set[str]]:
    """The known keys, ready for validation; messages about all others; and the sections that are no mappings."""
    values: dict[str, Any] = {name: {} for name in sections()}
    errors, broken = [], set()
    for name, value in tree.items():
        if name in sections() and isinstance(value, dict):
            for leaf, inner in value.items():
                if (key := keys().get(f"{name}.{leaf}")) is not None:
                    values[name][leaf] = _at_home(key, inner)
                else:
                    errors.append(unknown(f"{name}.{leaf}"))
        elif name in sections():
            broken.add(name)
            errors.append(f"{name} is {show(value)}; it must be a mapping of the keys {key_names(name)}")
        elif name in keys() and not keys()[name].section:
            values[name] = _at_home(keys()[name], value)
        elif name in keys():
            key = keys()[name]
            errors.append(
                f"{name} in one piece is for the command line; in a file {key.leaf} stands below {key.section}:"
            )
        else:
            errors += (
                [unknown(f"{name}.{leaf}") for leaf in value] if isinstance(value, dict) and value else [unknown(name)]
            )
    return values, errors, broken


def _at_home(key: Key, value: Any) -> Any:
    is_home = isinstance(value, str) and value.startswith("~/") and key.accepts(str, Path)
    return os.path.expanduser(value) if is_home else value


def _at(values: Mapping[str, Any], key: Key) -> Any:
    return (values[key.section] if key.section else values).get(key.leaf)


def _reworded(error: ValidationError, values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Key and message for each of pydantic's errors; a key with several branches has several, all worded alike."""
    for item in sorted(error.errors(include_url=False), key=lambda item: -len(item["loc"])):  # the nearest first
        where = item["loc"]
        if not where:  # a rule between keys, worded in spec.config
            yield "", str(item.get("ctx", {})["error"])
            continue
        depth = 2 if where[0] in sections() else 1
        key = keys()[".".join(map(str, where[:depth]))]
        value = _at(values, key)
        if item["type"] == "missing" and len(where) == depth:
            yield key.name, missing(key)
            continue
        yield key.name, _inside(key, value, () if "[key]" in where else where[depth:], item["type"])


def _inside(key: Key, value: Any, parts: Sequence[Any], kind: str) -> str:
    """The message for an error of this kind somewhere in a key's value."""
    element, inner = key.name, value
    for number, part in enumerate(parts):
        if isinstance(inner, dict) and (known := inner_key(key, element, str(part))):
            return missing(known) if kind == "missing" else wrong(known, inner[part])
        if isinstance(inner, dict) and kind == "extra_forbidden":
            return f"unknown key {element}.{part}; keys there: {inner_names(key)}"
        if isinstance(inner, list) and isinstance(part, int) and part < len(inner):
            element, inner = f"{element}[{part}]", inner[part]
        elif isinstance(inner, dict) and part in inner:
            element, inner = f"{element}.{part}", inner[part]
        elif number:  # the rest names a branch of the type, not a place in the value; so can the first
            break
    return wrong(key, value) if element == key.name else wrong(key, value, element, inner)
