"""Two checkpoints of one model, base and tuned: whether they can be compared, and what becomes of each parameter.

Knows headers and names; reads no weights: `adapters.extraction` does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lora_scale.adapters.targets import features, select_targets
from lora_scale.spec.config import LoraConfig
from lora_scale.spec.errors import ModelError, UsageError
from lora_scale.spec.families import has_suffix
from lora_scale.spec.layout import TensorEntry
from lora_scale.storage.folder import ModelFolder, sources

_HEADS = ("model_type", "num_attention_heads", "num_key_value_heads", "head_dim")  # what shapes need not show
_OF_NO_WEIGHT = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures")


@dataclass(frozen=True, slots=True)
class Pair:
    """One tensor in both models' files."""

    base: TensorEntry
    tuned: TensorEntry


@dataclass(frozen=True, slots=True)
class Plan:
    """What is made of each parameter."""

    layers: Mapping[str, Pair]  # by module: an update
    transposed: frozenset[str]  # of these, whose weight is (in, out)
    saved: Mapping[str, Pair]  # by parameter: taken whole
    others: Sequence[tuple[str, Pair]]  # the name in files: only measured

    @property
    def pairs(self) -> Sequence[Pair]:
        return (*self.layers.values(), *self.saved.values(), *(pair for _, pair in self.others))

    @property
    def numel(self) -> int:
        return sum(pair.base.numel for pair in self.pairs)

    def features(self, module: str) -> tuple[int, int]:
        """(in, out)"""
        rows, columns = self.layers[module].base.shape
        return (rows, columns) if module in self.transposed else (columns, rows)


def refuse_another(base: nn.Module, tuned: nn.Module, folders: tuple[ModelFolder, ModelFolder]) -> list[str]:
    """ModelError unless the two, which may be on meta, are one architecture of one size; else the other keys of
    config.json in which they differ, as sentences: no adapter carries these."""
    here, there = (model.config.to_dict() for model in (base, tuned))  # type: ignore[operator, union-attr]
    where = f"{folders[1].path} and --base {folders[0].path}"
    for key in _HEADS:
        one, other = (getattr(model.config, key, None) for model in (base, tuned))  # by the name each family has for it
        if one != other:
            raise ModelError(
                f"{where} are other architectures: {key} is {other!r} and {one!r}; give the base that was tuned"
            )
    ours, theirs = (dict(model.named_parameters()) for model in (base, tuned))
    for name in (*ours, *theirs):
        if (name in ours) != (name in theirs):
            has = folders[name not in ours].path
            raise ModelError(f"{where} are other architectures: only {has} has {name}; give the base that was tuned")
        shape, theirs_shape = tuple(ours[name].shape), tuple(theirs[name].shape)
        if shape != theirs_shape:
            grown = getattr(base, "get_input_embeddings", lambda: None)()
            is_vocabulary = shape[1:] == theirs_shape[1:] and grown is not None and shape[0] == len(grown.weight)
            way_out = (
                f"a vocabulary that grew is no update of low rank: call resize_token_embeddings({shape[0]}) on the "
                "tuned model, or bring the base to its size, and save that one"
                if is_vocabulary
                else "give the base that was tuned"
            )
            raise ModelError(f"{where}: {name} has shape {theirs_shape} and {shape}; {way_out}")
    differ = [key for key in here if key in there and here[key] != there[key] and key not in _OF_NO_WEIGHT]
    return [f"config.json has {key}: {_short(here[key])} in the base, {_short(there[key])} tuned" for key in differ]


def _short(value: object) -> str:
    return text if len(text := repr(value)) <= 60 else text[:60] + "..."


def plan(folders: tuple[ModelFolder, ModelFolder], model: nn.Module, cfg: LoraConfig) -> Plan:
    """What is made of each parameter of both (base, tuned), once `refuse_another` has passed them.

    ConfigError for targets that the model does not have, UsageError for a rank or a module that it cannot have.
    """
    chosen = select_targets(model, cfg)
    modules = dict(model.named_modules())
    for name in chosen:
        n_in, n_out = features(modules[name])
        if cfg.r > min(n_in, n_out):
            raise UsageError(
                f"--r is {cfg.r}, but {name} is {n_in} -> {n_out}, of rank {min(n_in, n_out)} at most; lower --r, or "
                "name the layers in --targets without it"
            )
    saved = _saved(model, cfg.modules_to_save, set(chosen))
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    prefix = getattr(model, "base_model_prefix", "")
    layers, whole, others = {}, {}, []
    for name, parameter in model.named_parameters():
        base, tuned = (sources(folder, name, tuple(parameter.shape), prefix, tied) for folder in folders)
        if [entry.shape for entry in base] != [entry.shape for entry in tuned]:
            raise ModelError(
                f"{name} is {len(base)} tensors in {folders[0].path} and {len(tuned)} in {folders[1].path}; save both "
                "with the same version of transformers"
            )
        pairs = [Pair(*both) for both in zip(base, tuned, strict=True)]
        module, _, leaf = name.rpartition(".")
        if module in chosen and leaf == "weight":
            layers[module] = pairs[0]
        elif name in saved:
            assert len(pairs) == 1, name
            whole[name] = pairs[0]
        else:
            others += [(name if len(pairs) == 1 else pair.base.name, pair) for pair in pairs]
    transposed = frozenset(name for name in chosen if not isinstance(modules[name], nn.Linear))
    return Plan(layers, transposed, whole, others)


def _saved(model: nn.Module, wanted: Sequence[str], adapted: set[str]) -> set[str]:
    """The parameters of the modules that are taken whole."""
    shared = [id(p) for p in dict(model.named_parameters(remove_duplicate=False)).values()]
    found: set[str] = set()
    for entry in wanted:
        hits = {
            f"{name}.{leaf}": parameter
            for name, module in model.named_modules()
            if has_suffix(name, (entry,))
            for leaf, parameter in module.named_parameters(recurse=False)
        }
        if not hits:
            raise UsageError(f"--modules-to-save has {entry!r}, which names no module that has parameters of its own")
        for name, parameter in hits.items():
            if name.rpartition(".")[0] in adapted:
                raise UsageError(f"--modules-to-save has {entry!r}, but {name} is adapted; leave it out of one of both")
            if shared.count(id(parameter)) > 1:
                raise UsageError(
                    f"--modules-to-save has {entry!r}, but {name} is another layer's weight too: PEFT parts them"
                )
        found |= hits.keys()
    return found
