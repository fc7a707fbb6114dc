"""Tensor parallelism around one-process layers: operators put on modules from outside, and adapters cut to one rank's
part. The base itself is cut while it is read (`parallel.load`); how is `spec.splits`' knowledge.

    block (attention, MLP)   input: identity, and in backward a sum over the group; q, k and v share it
    colwise layer            nothing: each rank computes its own output features
    rowwise layer            output: a sum over the group, of the base and the adapter together
    token table              a rank looks up its own tokens, the sum brings all of them together
    output layer             input as a block's; logits stay cut, and so does the loss (`parallel.vocabulary`)

With `sequence_parallel` the ranks share the tokens between blocks, so that norms, residuals and what recompute keeps
are one rank's part: a block's input is gathered along the sequence, a rowwise layer's output summed and scattered. The
first decoder layer takes its part of the tokens, and behind the last norm all of them come together again.

The operators stand around the whole adapted layer, so the adapter's part of each sum costs nothing more. Of a colwise
layer lora_A is whole and lora_B cut, of a rowwise layer the other way round; a whole factor's gradient on one rank is
only its part, and is summed once a step (`parallel.gradients`).
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lora_scale.adapters import tokens, trained
from lora_scale.adapters.lora import DoRALinear, adapted_layers, file_name
from lora_scale.adapters.peft import MAGNITUDE
from lora_scale.parallel import collectives, exchange, overlap, recompute, zero3
from lora_scale.parallel.grid import Grid
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.families import Family, has_suffix
from lora_scale.spec.splits import Part, Split, magnitude_split
from lora_scale.spec.splits import factor_splits as split_factors
from lora_scale.spec.splits import trained as trained_split


def trained_splits(model: nn.Module, splits: Mapping[str, Split]) -> dict[str, Split]:
    """How what trains is cut, by parameter name; a parameter that is not named is whole."""
    found: dict[str, Split | None] = {}
    for name, layer in adapted_layers(model).items():
        split = splits.get(file_name(f"{name}.base_layer.weight"))
        of_a, of_b = split_factors(split, conv1d=not isinstance(layer.base_layer, nn.Linear))
        found |= {f"{name}.lora_A": of_a, f"{name}.lora_B": of_b}
        if isinstance(layer, DoRALinear):
            found[f"{name}.{MAGNITUDE}"] = magnitude_split(of_b)
    found |= {name: trained_split(splits.get(file_name(name))) for name in trained.parameters(model)}
    return {name: split for name, split in found.items() if split is not None}


def shared_elements(
    model: nn.Module, splits: Mapping[str, Split], grid: Grid, sequence_parallel: bool
) -> dict[str, list[tuple[int, int]]]:
    """Of what trains, the elements that several ranks keep and of whose gradient each sees a part, as spans of this
    rank's flattened shard.

    All of a whole factor or magnitude of a cut layer; what belongs to a shared key head; a bias that one rank adds; the
    rows of new tokens; and with `sequence_parallel` the norms' biases, of which a rank sees its own tokens.
    """
    cuts, found = trained_splits(model, splits), {}
    layers, base = adapted_layers(model), trained.parameters(model)
    for name, parameter in model.named_parameters():
        module, numel = name.rpartition(".")[0], zero3.numel(parameter)
        if (split := cuts.get(name)) is not None:
            if rows := split.shared_spans(grid.tp_rank, grid.tp_size):
                length = zero3.shape(parameter)[split.dim]
                found[name] = [(start * numel // length, stop * numel // length) for start, stop in rows]
        elif module in layers and parameter.requires_grad:
            if file_name(f"{module}.base_layer.weight") in splits:
                found[name] = [(0, numel)]
        elif name.endswith(f".{tokens.DELTA}"):
            found[name] = [(0, numel)]
        elif name in base:
            is_norm = isinstance(base[name], trained.BiasedLayerNorm)
            if file_name(name) in splits or (is_norm and sequence_parallel):
                found[name] = [(0, numel)]
    return found


def alike(model: nn.Module, splits: Mapping[str, Split], shared: Mapping[str, list[tuple[int, int]]]) -> frozenset[str]:
    """What trains and is whole on every rank, each of which sees all of its gradient."""
    trains = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return frozenset(trains - trained_splits(model, splits).keys() - shared.keys())


def apply(
    model: nn.Module,
    row: Family,
    splits: Mapping[str, Split],
    grid: Grid,
    *,
    sequence_parallel: bool = False,
    overlaps: bool = False,
) -> str:
    """Cut the adapters and put the operators around the layers; the base may be on meta, whole. A note for the user,
    "" where there is none. Collective."""
    _check_trained(model, splits)
    _cut_adapters(model, trained_splits(model, splits), grid)
    for name, layer in trained.parameters(model).items():
        if grid.tp_rank and trained_split(split := splits.get(file_name(name))) is not split:
            layer.share = 0.0  # type: ignore[assignment]
    enter = collectives.gather_sequence if sequence_parallel else collectives.sum_gradient
    leave = collectives.scatter_sequence if sequence_parallel else collectives.sum_ranks
    hidden, note = exchange.choose(grid.world, grid.tp_group) if sequence_parallel and overlaps else (None, "")
    modules = dict(model.named_modules())
    blocks: set[str] = set()
    for parameter in splits:
        module, _, leaf = parameter.rpartition(".")
        if leaf == "bias" or module not in modules:  # a tied output layer is found by its own name below
            continue
        if parameter.endswith(tuple(row.packed)):  # experts: the router shares the block's input and weighs its output
            block = module.rpartition(".")[0]
            if block not in blocks:
                _after(modules[block], leave, grid)
            blocks.add(block)
        elif has_suffix(module, row.colwise):
            blocks.add(module.rpartition(".")[0])
        elif has_suffix(module, row.rowwise) and not (hidden and overlap.scatter_output(modules[module], hidden)):
            _after(modules[module], leave, grid)
    for block in blocks:
        enters = overlap.gatherer(hidden) if hidden and overlap.reads_in_parts(modules[block]) else enter
        _before(modules[block], enters, grid)
        _divide(modules[block], row.divided, grid.tp_size)
    _cut_vocabulary(model, grid)
    if sequence_parallel:
        _before(recompute.decoder_layers(model)[0], collectives.take_sequence, grid)
        _after(_last_norm(model), collectives.gather_sequence, grid)
    else:
        _before(model.get_output_embeddings(), collectives.sum_gradient, grid)  # type: ignore[operator]
    return note


def _last_norm(model: nn.Module) -> nn.Module:
    """What stands behind the decoder layers: the last part of the base model that has parameters."""
    parts = model.get_submodule(str(model.base_model_prefix)).children()
    return [part for part in parts if next(part.parameters(), None) is not None][-1]


def _check_trained(model: nn.Module, splits: Mapping[str, Split]) -> None:
    """ConfigError for a part of the base that trains in a place where its gradient is not known to be whole."""
    for name, module in trained.parameters(model).items():
        known = isinstance(module, trained.BiasedLayerNorm | trained.TrainedEmbedding)
        if not known and file_name(name) not in splits:
            raise ConfigError(
                f"{name} would train under tensor parallelism, which does not cut it; leave it out of "
                "lora.modules_to_save and lora.bias, or set parallel.tensor_parallel_size=1"
            )


def _cut_adapters(model: nn.Module, cuts: Mapping[str, Split], grid: Grid) -> None:
    """Factors, magnitudes, and what goes with them, to this rank's part."""
    for name, layer in adapted_layers(model).items():
        for key, beside in (("lora_A", "start_A"), ("lora_B", "start_B"), (MAGNITUDE, "squares")):
            if (split := cuts.get(f"{name}.{key}")) is not None:
                whole = getattr(layer, key)
                whole.data = cut(whole.data, split, grid.tp_rank, grid.tp_size)
                if (other := getattr(layer, beside)) is not None:
                    setattr(layer, beside, cut(other, split, grid.tp_rank, grid.tp_size))
        if (split := cuts.get(f"{name}.lora_A")) is not None:
            layer.first_feature = split.spans(layer.in_features, grid.tp_rank, grid.tp_size)[0][0]
            if isinstance(layer, DoRALinear):
                layer.sum_parts = partial(collectives.total, group=grid.tp_group)


def cut(whole: Tensor, split: Split, rank: int, ranks: int) -> Tensor:
    """`rank`'s shard of a whole tensor, contiguous."""
    spans = split.spans(whole.shape[split.dim], rank, ranks)
    pieces = [whole.narrow(split.dim, start, stop - start) for start, stop in spans]
    return torch.cat(pieces, split.dim).contiguous() if pieces else whole.narrow(split.dim, 0, 0).contiguous()


def join(shards: list[Tensor], split: Split, shape: tuple[int, ...]) -> Tensor:
    """The whole tensor from every rank's shard; where several keep the same elements, they are equal."""
    whole = torch.empty(shape, dtype=shards[0].dtype, device=shards[0].device)
    for rank, shard in enumerate(shards):
        done = 0
        for start, stop in split.spans(shape[split.dim], rank, len(shards)):
            whole.narrow(split.dim, start, stop - start).copy_(shard.narrow(split.dim, done, stop - start))
            done += stop - start
    return whole


Operator = Callable[[Tensor, Any], Tensor]


def _before(module: nn.Module, operator: Operator, grid: Grid) -> None:
    """The hidden states, the first argument or the one of that name, pass through the operator."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (operator(args[0], grid.tp_group), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": operator(kwargs["hidden_states"], grid.tp_group)}

    module.register_forward_pre_hook(before, with_kwargs=True)


def _after(module: nn.Module, operator: Operator, grid: Grid) -> None:
    """So does the output: hidden states, or a tuple that has them first."""

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if isinstance(output, Tensor):
            return operator(output, grid.tp_group)
        return (operator(output[0], grid.tp_group), *output[1:])

    module.register_forward_hook(after)


def _divide(block: nn.Module, names: tuple[str, ...], ranks: int) -> None:
    """Counts of heads and features that a block keeps beside its weights: make them this rank's."""
    for name in names:
        owner: Any = block
        key = name
        if name.startswith("config."):
            key = name.removeprefix("config.")
            if not hasattr(block, "config"):
                continue
            owner = block.config = copy.copy(block.config)
        if (value := getattr(owner, key, None)) is not None and value > 1:  # one key head is shared
            setattr(owner, key, value // ranks)


def _cut_vocabulary(model: nn.Module, grid: Grid) -> None:
    table = model.get_input_embeddings()  # type: ignore[operator]
    first, last = Part(table.weight.shape[0]).span(grid.tp_rank, grid.tp_size)
    if table.padding_idx is not None:
        table.padding_idx = table.padding_idx - first if first <= table.padding_idx < last else None
    if (rows := tokens.rows_of(model)) is not None:
        rows[1].keep(first, last)
    foreign: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...]) -> Any:
        elsewhere = (args[0] < first) | (args[0] >= last)
        foreign.append(elsewhere)
        return ((args[0] - first).masked_fill(elsewhere, 0), *args[1:])

    def after(module: nn.Module, args: tuple[Any, ...], embedded: Tensor) -> Tensor:
        return collectives.sum_ranks(embedded.masked_fill(foreign.pop()[..., None], 0.0), grid.tp_group)

    table.register_forward_pre_hook(before)
    table.register_forward_hook(after)
