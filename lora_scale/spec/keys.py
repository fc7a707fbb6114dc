"""Every key of a run in one flat table: name, what it takes, default, meaning; and the words for a wrong one.

All of it is read off the fields of `spec.config`, for messages, `--help` and docs/config.md. Knows no YAML.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from lora_scale.spec import elsewhere
from lora_scale.spec.config import RunConfig, Section

Limits = tuple[Any, ...]  # annotated_types' Ge, Gt, Lt, Le; whatever else stands in an annotation is ignored
WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    Path: "a path",
    NoneType: "null",
}
LIMITS = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
NOT_A_PATH = {
    "",
    "on",
    "off",
    "yes",
    "no",
    "true",
    "false",
    "none",
    "null",
}  # meant as a switch, though a file may be called so


@dataclass(frozen=True, slots=True)
class Key:
    """One key of a config, `lora.r`. `alternatives` are the types it takes, each with its limits."""

    name: str
    section: str  # "" at the top level
    alternatives: tuple[tuple[Any, Limits], ...]
    required: bool
    default: Any
    meaning: str

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    def accepts(self, *kinds: type) -> bool:
        return any((get_origin(base) or base) in kinds for base, _ in self.alternatives)

    @property
    def choices(self) -> tuple[Any, ...]:
        return tuple(
            choice for base, _ in self.alternatives if get_origin(base) is Literal for choice in get_args(base)
        )

    @property
    def takes(self) -> str:
        """What may be written, in words: "'all', 'none' or a whole number of at least 0"."""
        words = [show(choice) for choice in self.choices]
        words += [_in_words(base, limits) for base, limits in self.alternatives if get_origin(base) is not Literal]
        return _either(words)


@cache
def keys() -> dict[str, Key]:
    """All keys by dotted name, in the order of the config's fields."""
    table = {}
    for name, field in RunConfig.model_fields.items():
        section = section_of(field)
        if section is None:
            table[name] = _key(name, "", field)
            continue
        for leaf, inner in section.model_fields.items():
            table[f"{name}.{leaf}"] = _key(f"{name}.{leaf}", name, inner)
    return table


@cache
def sections() -> dict[str, str]:
    """Name and meaning of every section."""
    found = {name: section_of(field) for name, field in RunConfig.model_fields.items()}
    return {name: (section.__doc__ or "").strip() for name, section in found.items() if section is not None}


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field of RunConfig holds, or None where it holds a value."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _element(key: Key) -> type[Section] | None:
    """The section that a list under this key holds."""
    parts = [part for base, _ in key.alternatives for part in get_args(base)]
    return next((part for part in parts if isinstance(part, type) and issubclass(part, Section)), None)


def inner_key(key: Key, element: str, leaf: str) -> Key | None:
    """The key `data.train[0].weight`, if a list under `data.train` holds such."""
    section = _element(key)
    if section is None or leaf not in section.model_fields:
        return None
    return _key(f"{element}.{leaf}", key.section, section.model_fields[leaf])


def elements(name: str) -> list[Key]:
    """The keys of an element of the list under a key."""
    section = _element(keys()[name])
    assert section is not None
    return [_key(leaf, "", field) for leaf, field in section.model_fields.items()]


def inner_names(key: Key) -> str:
    """What the elements of a list under this key take."""
    section = _element(key)
    return ", ".join(section.model_fields) if section else ""


def unknown(name: str) -> str:
    """The message for a key that does not exist, with the one that was probably meant."""
    section, _, leaf = name.rpartition(".")
    name = name if name.isprintable() and len(name) <= 80 else show(name)
    meant = [key.name for key in keys().values() if key.leaf == leaf]
    if not meant and (rows := elsewhere.found(leaf) or elsewhere.found(section)):
        ours = list(dict.fromkeys(row.ours for row in rows if row.ours))
        how = "; ".join(dict.fromkeys(row.how for row in rows if row.how and (row.ours or not ours)))
        if ours:
            return f"unknown key {name}; did you mean {' or '.join(ours)}?{f' ({how})' if how else ''}"
        return f"unknown key {name}; leave it out: {how}"
    if not meant:
        here = {key.leaf: key.name for key in keys().values() if key.section == section}
        anywhere = {key.leaf: key.name for key in keys().values()}
        whole = {known: known for known in [*keys(), *sections()] if section not in sections()}
        for names, cutoff in ((here, 0.6), (anywhere, 0.75), (whole, 0.75)):
            meant = meant or [
                names[close] for close in get_close_matches(leaf if names is not whole else name, names, 1, cutoff)
            ]
    if meant:
        return f"unknown key {name}; did you mean {' or '.join(meant)}?"
    if section in sections():
        return f"unknown key {name}; keys of {section}: {key_names(section)}"
    return f"unknown key {name}; keys at the top: {key_names('')}; sections: {', '.join(sections())}"


def key_names(section: str) -> str:
    """The keys of a section, or of the top level (""), by their short names."""
    return ", ".join(key.leaf for key in keys().values() if key.section == section)


def missing(key: Key) -> str:
    return f"missing key {key.name}; it must be {key.takes}: {key.meaning.partition('. ')[0].rstrip('.')}"


def wrong(key: Key, value: Any, element: str = "", inner: Any = None) -> str:
    """The message for a value that `key` does not take; `element` names the part of it, `inner`, that is the reason."""
    if element:
        return f"{element} is {show(inner)}; {key.name} must be {key.takes}"
    shown = f"{value} (a date)" if isinstance(value, date) else show(value)
    verb = "write" if key.accepts(bool) else "choose" if len(key.alternatives) == 1 and key.choices else "it must be"
    return f"{key.name} is {shown}; {verb} {key.takes}{_hint(key, value)}"


def is_suspicious(key: Key, value: Any) -> bool:
    """Whether pydantic takes a value that was surely not meant: a path `off`, a fraction in quotes, a stage `true`."""
    if isinstance(value, str) and key.accepts(str, Path) and value not in key.choices:
        return value.strip().lower() in NOT_A_PATH or (key.accepts(int, float) and _is_number(value))
    return any(value == choice and type(value) is not type(choice) for choice in key.choices)


def _hint(key: Key, value: Any) -> str:
    plain = key.accepts(int, float) and isinstance(value, str) and _is_number(value)
    if plain or (key.accepts(bool) and value in ("true", "false")):
        return ", without quotes"
    if isinstance(value, str) and len(value) > 80:
        return ""
    if isinstance(value, str) and key.accepts(tuple) and not key.accepts(Path):
        return f"; for one write [{value}]"
    if isinstance(value, str) and value.strip() and key.accepts(Path, str):
        return "; for nothing write null" if key.accepts(NoneType) else f"; a file of that name is ./{value}"
    quotable = isinstance(value, int | float | date) and not isinstance(value, bool)
    return ", in quotes" if quotable and key.accepts(str, Path) else ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def show(value: Any, width: int = 80) -> str:
    """A value as a message shows it: as it would be written in the config, and never long."""
    if isinstance(value, str):
        text = repr(value)
    elif isinstance(value, tuple | list | dict | bool | NoneType):
        text = _as_json(value)
    else:
        text = str(value)
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, default=str, ensure_ascii=False)
    except (ValueError, TypeError, RecursionError):  # an anchor that holds itself, a key that is a list
        return f"a {type(value).__name__}"


def _key(name: str, section: str, field: FieldInfo) -> Key:
    assert field.description, f"{name} has no docstring in spec.config"
    alternatives = tuple(_alternatives(field.annotation, tuple(field.metadata)))
    meaning = " ".join(field.description.split())
    return Key(
        name, section, alternatives, field.is_required(), None if field.is_required() else field.default, meaning
    )


def _alternatives(annotation: Any, limits: Limits) -> Iterator[tuple[Any, Limits]]:
    if get_origin(annotation) is Annotated:
        base, *extra = get_args(annotation)
        nested = [limit for item in extra for limit in getattr(item, "metadata", [item])]
        yield from _alternatives(base, (*limits, *nested))
    elif get_origin(annotation) in (Union, UnionType):
        for branch in get_args(annotation):
            yield from _alternatives(branch, limits)
    else:
        yield annotation, limits


def _in_words(base: Any, limits: Limits) -> str:
    if isinstance(base, type) and issubclass(base, Section):
        return f"a mapping of {', '.join(base.model_fields)}"
    inner = [next(_alternatives(part, ())) for part in get_args(base) if part is not Ellipsis]
    if get_origin(base) is dict:
        if inner[1][0] in (str, Any):  # names of fields, keys of other programs: no patterns
            return "a mapping"
        return f"a mapping from patterns to {_plural(_in_words(*inner[1]))}"
    if get_origin(base) is tuple:
        count = "" if get_args(base)[-1] is Ellipsis else f"{len(inner)} "
        return f"a list of {count}{_plural(_in_words(*inner[0]))}"
    bounds = [
        f"{words} {getattr(limit, name):g}"
        for limit in limits
        for name, words in LIMITS.items()
        if hasattr(limit, name)
    ]
    return " ".join([WORDS[base], " and ".join(bounds)]).strip()


def _plural(words: str) -> str:
    words = words.removeprefix("a ").replace("number", "numbers").replace("string", "strings")
    return words.replace("mapping of", "mappings of", 1)


def _either(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
