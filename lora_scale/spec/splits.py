"""Which part of each parameter a tensor-parallel rank keeps. Names and integers only: no torch, no process groups.

A parameter is cut along one dim. Along it lie parts: a fused matrix is q, k and v side by side, and a rank keeps its
piece of each. What is not named here is whole on every rank.
"""

from dataclasses import dataclass
from typing import Literal

from lora_scale.spec.architecture import Architecture, Parameter
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.families import Family, family, has_suffix

EXPERTS_UNIT = 8  # torch's grouped product wants rows of multiples of 16 bytes: 8 features in 16-bit precision

Span = tuple[int, int]  # [start, stop) along the cut dim


@dataclass(frozen=True, slots=True)
class Part:
    """A run along the cut dim: in pieces, one a rank; or the same on each; or on the first alone and zeros on the
    others (a bias that a sum over the ranks must count once)."""

    size: int
    kept: Literal["pieces", "whole", "first"] = "pieces"

    def span(self, rank: int, ranks: int) -> Span:
        """What `rank` reads of it. Pieces are as even as can be: only a vocabulary does not divide."""
        if self.kept == "pieces":
            return self.size * rank // ranks, self.size * (rank + 1) // ranks
        return (0, self.size) if self.kept == "whole" or rank == 0 else (0, 0)


@dataclass(frozen=True, slots=True)
class Split:
    """How a parameter is cut."""

    dim: int  # from the end, because the tensors of a packed parameter have fewer dims in files
    parts: tuple[Part, ...]

    def spans(self, size: int, rank: int, ranks: int) -> tuple[Span, ...]:
        """What `rank` reads of a tensor that has `size` along `dim`: the whole parameter, or one of its equal parts."""
        parts = self.parts if size == sum(part.size for part in self.parts) else self.parts[:1]
        assert size == sum(part.size for part in parts), f"{size} is neither all of {self} nor one part"
        spans, start = [], 0
        for part in parts:
            first, last = part.span(rank, ranks)
            if first < last:
                spans.append((start + first, start + last))
            start += part.size
        return tuple(spans)

    def shape(self, whole: tuple[int, ...], rank: int, ranks: int) -> tuple[int, ...]:
        """Shape of `rank`'s shard."""
        dim = self.dim % len(whole)
        if any(part.kept == "first" for part in self.parts):
            return whole
        size = sum(stop - start for start, stop in self.spans(whole[dim], rank, ranks))
        return (*whole[:dim], size, *whole[dim + 1 :])

    def is_even(self, ranks: int) -> bool:
        """Whether the ranks' shards have one shape."""
        return not any(part.kept == "pieces" and part.size % ranks for part in self.parts)

    def shared_spans(self, rank: int, ranks: int) -> list[Span]:
        """Along `dim` of the rank's shard, what every rank keeps alike."""
        found, done = [], 0
        for part in self.parts:
            start, stop = part.span(rank, ranks)
            if part.kept == "whole":
                found.append((done, done + stop - start))
            done += stop - start
        return found


def splits(model: Architecture, ranks: int) -> dict[str, Split]:
    """Every cut parameter by name, as transformers' `named_parameters`; {} for one rank.

    ConfigError where the family is not offered or a size does not divide, with the numbers of ranks that would work.
    """
    if ranks == 1:
        return {}
    row = _row(model, ranks)
    found = {p.name: split for p in model.parameters if (split := _split(p, row, model)) is not None}
    if bad := _indivisible(model, row, found, ranks):
        works = [str(n) for n in range(1, model.heads + 1) if not _indivisible(model, row, found, n)]
        raise ConfigError(
            f"parallel.tensor_parallel_size is {ranks}, by which this model's {bad} do not divide; "
            f"{', '.join(works)} would work"
        )
    return found


def factor_splits(split: Split | None, conv1d: bool) -> tuple[Split | None, Split | None]:
    """How lora_A (r, in) and lora_B (out, r) are cut where their layer's weight is: the factor on the cut side like it,
    the other not at all. A Conv1D's weight is (in, out)."""
    if split is None:
        return None, None
    if (split.dim == -1) is conv1d:  # output features
        return None, Split(-2, split.parts)
    return Split(-1, split.parts), None


def trained(split: Split | None) -> Split | None:
    """The same of a parameter that trains: a bias that one rank adds is whole on each, and so are its moments."""
    return None if split is not None and any(part.kept == "first" for part in split.parts) else split


def magnitude_split(of_b: Split | None) -> Split | None:
    """How DoRA's magnitudes (out,) are cut where lora_B is."""
    return None if of_b is None else Split(-1, of_b.parts)


def _row(model: Architecture, ranks: int) -> Family:
    row, model_type = family(model.model_type), model.model_type
    why = ""
    if row is None or not row.colwise:
        why = f"how to cut a model of type {model_type!r} is not known here"
    elif model.alibi:
        why = f"this {model_type} model's ALiBi covers all heads at once"
    if why:
        raise ConfigError(
            f"parallel.tensor_parallel_size is {ranks}, but {why}; set it to 1: ZeRO-3 shards every model"
        )
    assert row is not None
    return row


def _indivisible(model: Architecture, row: Family, found: dict[str, Split], ranks: int) -> str:
    """What `ranks` does not divide, in words; "" where it divides everything."""
    if model.heads % ranks:
        return f"{model.heads} attention heads"
    if model.kv_heads % ranks and not _shares_key_head(model, row):
        return f"{model.kv_heads} key and value heads"
    if model.vocabulary < ranks:
        return f"{model.vocabulary} tokens of vocabulary"
    for parameter in model.parameters:
        if parameter.kind in ("table", "output") or parameter.name not in found:
            continue
        unit = ranks * EXPERTS_UNIT if parameter.kind == "experts" and ranks > 1 else ranks
        if odd := [part.size for part in found[parameter.name].parts if part.kept == "pieces" and part.size % unit]:
            runs = f" (in runs of {EXPERTS_UNIT})" if unit > ranks else ""
            return f"{odd[0]} features of {parameter.module.rpartition('.')[2]}{runs}"
    return ""


def _shares_key_head(model: Architecture, row: Family) -> bool:
    """Whether one key and value head serves every query head, and lies in the fused matrix: each rank keeps it."""
    return row.fused is not None and model.kv_heads == 1 < model.heads


def _split(parameter: Parameter, row: Family, model: Architecture) -> Split | None:
    name, kind, shape = parameter.name, parameter.kind, parameter.shape
    if kind in ("table", "output"):
        return Split(-2, (Part(shape[0]),))
    if kind == "experts":  # gate and up are halves of one matrix
        return Split(-1, (Part(shape[-1]),)) if "down" in name else Split(-2, (Part(shape[-2] // 2),) * 2)
    bias = name.endswith(".bias")
    if has_suffix(parameter.module, row.rowwise):
        if bias:
            return Split(-1, (Part(shape[0], "first"),))
        dim = -2 if kind == "conv1d" else -1
        return Split(dim, (Part(shape[dim]),))
    if has_suffix(parameter.module, row.colwise):
        dim = -1 if bias or kind == "conv1d" else -2
        return Split(dim, _output_parts(parameter.module, shape[dim], row, model))
    return None


def _output_parts(module: str, size: int, row: Family, model: Architecture) -> tuple[Part, ...]:
    """What lies side by side along a colwise layer's output features."""
    if has_suffix(module, row.halves):
        return (Part(size // 2),) * 2
    if not has_suffix(module, row.q) or row.fused is None:
        return (Part(size),)
    queries, keys = (heads * model.head_dim for heads in (model.heads, model.kv_heads))
    if _shares_key_head(model, row):
        return Part(queries), Part(keys, "whole"), Part(keys, "whole")
    return (Part(queries), Part(keys), Part(keys)) if row.fused == "parts" else (Part(size),)
