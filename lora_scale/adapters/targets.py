"""Which modules of a model are adapted, with what r and alpha. Names and shapes only: nothing is changed here."""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TypeVar

from torch import nn

from lora_scale.spec import families
from lora_scale.spec.config import LoraConfig
from lora_scale.spec.errors import ConfigError

REGEX = "re:"

Value = TypeVar("Value", int, float)


def is_linear(module: nn.Module) -> bool:
    """nn.Linear, or transformers' Conv1D (recognised by name: this floor does not import transformers)."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def features(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear layer with a whole weight, which is (out, in) for nn.Linear and (in, out) for Conv1D."""
    assert is_linear(module) and isinstance(module.weight, nn.Parameter), type(module).__name__
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)


def select_targets(model: nn.Module, cfg: LoraConfig) -> dict[str, tuple[int, float]]:
    """(r, lora_alpha) of every module that `cfg.target_modules` names, in module order.

    An entry, or a key of rank_pattern or alpha_pattern, that matches nothing is a ConfigError that says what there is.
    """
    if not cfg.target_modules:
        raise ConfigError("lora.target_modules is empty; name at least one, for example lora.target_modules=[q,v]")
    modules = {name: module for name, module in model.named_modules() if name}
    chosen = {name for entry in cfg.target_modules for name in _matches(model, modules, entry)}
    refuse_tied_output(model, modules, chosen)
    ordered = [name for name in modules if name in chosen]
    _check_patterns("rank_pattern", cfg.rank_pattern, ordered)
    _check_patterns("alpha_pattern", cfg.alpha_pattern, ordered)
    return {
        name: (by_pattern(cfg.rank_pattern, name, cfg.r), by_pattern(cfg.alpha_pattern, name, cfg.lora_alpha))
        for name in ordered
    }


def by_pattern(patterns: Mapping[str, Value], name: str, default: Value) -> Value:
    """PEFT's rule: the first pattern that matches the whole name, or its end after a dot, decides."""
    return next((value for pattern, value in patterns.items() if pattern_matches(pattern, name)), default)


def fused_notes(model: nn.Module, cfg: LoraConfig) -> list[str]:
    """One sentence for each projection that holds more roles than were asked for; its one update covers them all."""
    roles = families.roles(_model_type(model))
    asked = set(roles) if families.ALL_LINEAR in cfg.target_modules else set(cfg.target_modules)
    notes = {}
    for role in [role for role in roles if role in asked]:
        for suffix in roles[role]:
            extra = [other for other in roles if suffix in roles[other] and other not in asked]
            if extra:
                notes[suffix] = f"{suffix} holds {', '.join(extra)} as well as {role}: one adapter covers all of it"
    return list(notes.values())


def _matches(model: nn.Module, modules: Mapping[str, nn.Module], entry: str) -> list[str]:
    """The linear modules that one entry of target_modules names; ConfigError if none, or if it names something else."""
    if entry == families.ALL_LINEAR:
        output = _output_embedding(model)  # PEFT leaves it out too
        found = [name for name, module in modules.items() if is_linear(module) and module is not output]
    elif entry.startswith(REGEX):
        hits = _fullmatches(entry, modules)
        found = [
            name for name in hits if is_linear(modules[name])
        ] or hits  # `layers\.0\..*` passes norms and blocks by
    else:
        found = [name for name in modules if families.has_suffix(name, _suffixes(model, modules, entry))]
    if not found:
        raise ConfigError(_nothing_matches(modules, entry))
    for name in found:
        if not is_linear(modules[name]):
            raise ConfigError(
                f"lora.target_modules has {entry!r}, but {name} ({type(modules[name]).__name__}) is no linear layer; "
                f"only those are adapted: this model has {_inventory(modules)}"
            )
    return found


def _suffixes(model: nn.Module, modules: Mapping[str, nn.Module], entry: str) -> tuple[str, ...]:
    if entry not in families.ROLES:
        return (entry,)
    kind = _model_type(model)
    suffixes = families.roles(kind).get(entry, ())
    if not suffixes:
        raise ConfigError(
            f"lora.target_modules has the role {entry!r}, for which type {kind!r} has no known linear layer; "
            f"name layers as in the model, which has {_inventory(modules)}"
        )
    return suffixes


def _fullmatches(entry: str, names: Iterable[str]) -> list[str]:
    try:
        pattern = re.compile(entry.removeprefix(REGEX))
    except re.error as error:
        raise ConfigError(f"lora.target_modules has {entry!r}, which is no regular expression: {error}") from None
    return [name for name in names if pattern.fullmatch(name)]


def pattern_matches(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def exact_suffixes(modules: Iterable[str], chosen: Iterable[str]) -> list[str] | str:
    """The shortest ends of names, at a dot, that PEFT's rule matches to `chosen` and to no other of `modules`.

    Where a whole name is the end of another module's, no list is exact, and this is a regular expression.
    """
    chosen = list(chosen)
    everywhere = Counter(end for name in modules for end in _ends(name))
    wanted = Counter(end for name in chosen for end in _ends(name))
    ends = [next((end for end in _ends(name) if everywhere[end] == wanted[end]), None) for name in chosen]
    if None in ends:
        return "|".join(re.escape(name) for name in chosen)
    return [end for end in dict.fromkeys(ends) if end is not None]


def _ends(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[start:]) for start in reversed(range(len(parts))))


def _check_patterns(key: str, patterns: Mapping[str, object], targets: list[str]) -> None:
    for pattern in patterns:
        try:
            used = any(pattern_matches(pattern, name) for name in targets)
        except re.error as error:
            raise ConfigError(f"lora.{key} has {pattern!r}, which is no regular expression: {error}") from None
        if not used:
            raise ConfigError(
                f"lora.{key} has {pattern!r}, which matches none of the {len(targets)} adapted modules (the first is "
                f"{targets[0]}); a pattern matches a whole name or its end after a dot"
            )


def refuse_tied_output(model: nn.Module, modules: Mapping[str, nn.Module], chosen: set[str]) -> None:
    """ConfigError when an output layer that shares its weight with the input embedding is to be adapted."""
    output = _output_embedding(model)
    if output is None:
        return
    tied = any(module is not output and getattr(module, "weight", None) is output.weight for module in modules.values())
    for name in chosen:
        if tied and modules[name] is output:
            raise ConfigError(
                f"lora.target_modules names {name}, whose weight is the input embedding's too: an update of one "
                "would be lost on merging; leave it out"
            )


def _output_embedding(model: nn.Module) -> nn.Module | None:
    get_output = getattr(model, "get_output_embeddings", None)
    return None if get_output is None else get_output()


def _model_type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def _nothing_matches(modules: Mapping[str, nn.Module], entry: str) -> str:
    names = {name.rsplit(".", 1)[-1] for name, module in modules.items() if is_linear(module)}
    close = difflib.get_close_matches(entry, sorted({*names, *families.ROLES, families.ALL_LINEAR}), n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"lora.target_modules has {entry!r}, which matches no module{hint}; this model has {_inventory(modules)}"


def _inventory(modules: Mapping[str, nn.Module]) -> str:
    """The distinct linear layers: the end of the name, how many there are, (in -> out)."""
    counts = Counter(
        (".".join(part for part in name.split(".")[-2:] if not part.isdigit()), *features(module))
        for name, module in modules.items()
        if is_linear(module)
    )
    listed = ", ".join(f"{end} x{count} ({n_in} -> {n_out})" for (end, n_in, n_out), count in counts.items())
    return listed or "no linear layer"
