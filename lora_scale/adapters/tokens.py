"""New tokens: rows of the input embedding that train (PEFT's trainable_token_indices), and with an output layer that
shares its weight the same rows there.

The table stays frozen and as it is: a token of these ids gets its trained row instead, and so does its logit. One
process; a rank that has part of the vocabulary is told which by `keep`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lora_scale.spec.errors import ConfigError

NAME, DELTA = "token_adapter", "trainable_tokens_delta"  # PEFT's: the rows themselves, not a difference


class TokenRows(nn.Module):
    """The rows of `ids`, in place of those of an embedding; a module of its own, so that ZeRO-3 gathers them."""

    def __init__(self, ids: Sequence[int], width: int, padding: int | None) -> None:
        super().__init__()
        self.trainable_tokens_delta = nn.Parameter(torch.zeros(len(ids), width, dtype=torch.float32, device="cpu"))
        given = torch.tensor(ids, dtype=torch.long, device="cpu")
        order = given.argsort()
        self.ids: Tensor  # ascending
        self.rows: Tensor  # of each, its row
        self.columns: Tensor  # numbers in `ids` of those in this rank's part of the vocabulary
        self.register_buffer("ids", given[order], persistent=False)
        self.register_buffer("rows", order, persistent=False)
        self.register_buffer("columns", torch.arange(len(ids), device="cpu"), persistent=False)
        self.first = 0
        self.hooks: list[RemovableHandle] = []
        self.padding = ids.index(padding) if padding in ids else None  # its gradient is zero, as nn.Embedding's

    def given(self) -> list[int]:
        """The ids in the order of the rows."""
        return self.ids[self.rows.argsort()].tolist()

    def keep(self, first: int, last: int) -> None:
        """This rank has the tokens [first, last) of the vocabulary, and counts them from 0."""
        self.first = first
        self.columns = ((self.ids >= first) & (self.ids < last)).nonzero().flatten()

    def forward(self, x: Tensor, y: Tensor, scale: Tensor | None, is_output: bool) -> Tensor:
        """`y`, which the table makes of token ids `x` or the output layer of hidden states, with the trained rows."""
        values = self.trainable_tokens_delta
        if is_output:
            own = self.ids[self.columns] - self.first
            return y.index_copy(-1, own, F.linear(x, values[self.rows[self.columns]].to(x.dtype)))
        place = torch.searchsorted(self.ids, x + self.first).clamp(max=len(self.ids) - 1)
        new = F.embedding(self.rows[place], values, self.padding).to(y.dtype)
        new = new if scale is None else new * scale.to(y.dtype)
        return torch.where((self.ids[place] == x + self.first)[..., None], new, y)


def insert(model: nn.Module, ids: Sequence[int]) -> None:
    """Let the rows of `ids` train, in place; they begin at zero where the model is on meta. ConfigError where the table
    has no such row."""
    if not ids:
        return
    table, output = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    tokens, width = table.weight.shape
    if bad := [str(i) for i in ids if i >= tokens]:
        raise ConfigError(
            f"lora.trainable_token_indices has {bad[0]}, but the embedding has rows 0 to {tokens - 1}; give the base "
            "rows for new tokens first (transformers: resize_token_embeddings)"
        )
    rows = TokenRows(list(ids), width, table.padding_idx)
    if not table.weight.is_meta:
        begin_at(rows, table.weight[list(ids)])
    table.add_module(NAME, rows)

    def embedded(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        return rows(args[0], y, getattr(module, "embed_scale", None), False)

    def projected(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> Tensor:
        return rows(args[0], y, None, True)

    rows.hooks.append(table.register_forward_hook(embedded))
    if output is not None and output.weight is table.weight:
        rows.hooks.append(output.register_forward_hook(projected))


def begin_at(rows: TokenRows, values: Tensor) -> None:
    with torch.no_grad():
        rows.trainable_tokens_delta.copy_(values)


def rows_of(model: nn.Module) -> tuple[str, TokenRows] | None:
    """The module with the rows, and its name."""
    return next(((name, module) for name, module in model.named_modules() if isinstance(module, TokenRows)), None)


def remove(model: nn.Module) -> None:
    """Undo `insert`."""
    if (found := rows_of(model)) is not None:
        for hook in found[1].hooks:
            hook.remove()
        delattr(model.get_submodule(found[0].rpartition(".")[0]), NAME)
