"""What a tensor on its way to frozen linear layers carries, beside its values: how it can be made again, where the
gradients of its readers are added up, and what it still waits for. The marks are of the Python object: what is computed
from the tensor has none.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_scale.adapters import products

NARROW = 64  # columns of a product that costs its sum's traffic, not its arithmetic
FEW = 4  # a matrix with so many times fewer rows than columns waits for the one that it lies beside


@dataclass(frozen=True, slots=True)
class Origin:
    """How a tensor comes to be again: `make(*kept)`.

    `product`: `product(narrow, *kept)` is narrow^T times it, for `narrow` (tokens, r), without making it.
    `share`: `make` gives this rank's tokens only; a gradient of all tokens, of which this rank has a part, must go
    through it to be summed over the ranks and cut to them. It begins that, and gives what waits for the end.
    """

    make: Callable[..., Tensor]
    kept: tuple[Tensor, ...]
    share: Callable[[Tensor], Callable[[], Tensor]] | None = None
    product: Callable[..., Tensor] | None = None


def origin(x: Tensor) -> Origin:
    """What to keep in place of `x`: `x` itself where nothing smaller is known."""
    return getattr(x, "_origin", None) or Origin(itself, (x.detach(),))


def with_origin(y: Tensor, made: Origin) -> Tensor:
    """`y`, marked; the mark goes with this Python object only, not with what is computed from it."""
    y._origin = made  # type: ignore[attr-defined]
    return y


def same(y: Tensor, x: Tensor) -> Tensor:
    """`y` holds what `x` does."""
    return with_origin(y, x._origin) if hasattr(x, "_origin") else y


def gathered(y: Tensor, x: Tensor, share: Callable[[Tensor], Callable[[], Tensor]]) -> Tensor:
    """`y` is all ranks' `x` side by side along the tokens."""
    own = origin(x)
    return with_origin(y, replace(own, share=share))


class Sum:
    """The gradient of a tensor that several linear layers read, added up by their products and not beside them.

    A product with few columns costs what reading and writing the sum costs: those of adapters are held back, to be
    added together; those of k and v, to be one with q's where their matrices lie end to end.
    """

    def __init__(self) -> None:
        self.total: Tensor | None = None  # (tokens, features)
        self._readers = self._added = 0
        self._held: list[tuple[Tensor, Tensor]] = []
        self._beside: list[tuple[Tensor, Tensor]] = []  # held back too, in the order of memory

    def expect(self) -> None:
        """One more reader will add its part."""
        self._readers += 1

    def add(self, dy: Tensor, weight: Tensor) -> None:
        """`dy` (tokens, out) times `weight` (out, features)."""
        self._added += 1
        is_last = self._added == self._readers
        if is_narrow := len(weight) <= NARROW:
            self._held.append((dy, weight))
        elif self._beside and _follows(self._beside[0][1], weight):
            self._beside.insert(0, (dy, weight))
        else:
            self._add_beside(False)
            self._beside.append((dy, weight))
        if is_last:
            self.add_held()
        elif not is_narrow and len(weight) * FEW > weight.shape[1]:
            self._add_beside(False)

    def add_held(self) -> None:
        """Nothing is held back any more: there will be no other, or the sum is wanted."""
        if self._held:
            gradients, weights = zip(*self._held, strict=True)
            self._held.clear()
            self.add_product(torch.cat(gradients, 1), torch.cat(weights), not self._beside)
        self._add_beside(True)

    def _add_beside(self, is_last: bool) -> None:
        held, self._beside = self._beside, []
        if len(held) > 1:
            gradients, weights = zip(*held, strict=True)
            rows = sum(map(len, weights))
            whole = weights[0].as_strided((rows, weights[0].shape[1]), weights[0].stride())
            self.add_product(torch.cat(gradients, 1), whole, is_last)
        elif held:
            self.add_product(*held[0], is_last)

    def add_product(self, dy: Tensor, weight: Tensor, is_last: bool) -> None:
        """At once. `is_last`: there will be no other."""
        if self.total is None:
            self.total = products.mm(dy, weight)
        else:
            products.add_mm(self.total, dy, weight)

    def take(self) -> Tensor | None:
        self.add_held()
        total, self.total = self.total, None
        return total


def _follows(second: Tensor, first: Tensor) -> bool:
    """Whether a matrix begins in memory where the first one ends."""
    one_memory = first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    alike = first.dtype == second.dtype and first.shape[1] == second.shape[1]
    dense = first.is_contiguous() and second.is_contiguous()
    return one_memory and alike and dense and first.data_ptr() + first.nbytes == second.data_ptr()


Arrival = tuple[int, int, Callable[[], Any]]  # first row, how many, and what waits for them


def let_readers_add(x: Tensor, total: Sum) -> None:
    """From now on linear layers that read `x` give their part of its gradient to `total`."""
    x._sum = total  # type: ignore[attr-defined]


def let_arrive(x: Tensor, arrivals: list[Arrival]) -> None:
    """`x` is on its way: its first reader waits for each run of rows before it uses them."""
    x._arrivals = arrivals  # type: ignore[attr-defined]


def arriving(x: Tensor) -> list[Arrival]:
    """What `x` still waits for; whoever asks must wait. Nothing remembers it: it would keep `x` alive."""
    arrivals: list[Arrival] = getattr(x, "_arrivals", [])
    taken = arrivals.copy()
    arrivals.clear()
    return taken


class _Read(torch.autograd.Function):
    """Identity. Autograd runs its backward after that of all readers, those that gave their part to `Sum` too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, total: Sum) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.total, ctx.shape = total, x.shape
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        dx, total = grads[0], ctx.total.take()
        if total is None:
            return dx, None
        node, _ = ctx.next_functions[0]
        _let_overwrite(node)  # no one else has this sum
        total = total.view(ctx.shape)
        return total if dx is None else dx + total, None


def share_inputs(model: nn.Module) -> None:
    """Let the layers that read one input (q, k and v; gate and up) add up its gradient in place. To be called when all
    other hooks are there: what a block reads is what the last of them gives."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        x = args[0] if args else kwargs["hidden_states"]
        if not (torch.is_grad_enabled() and x.requires_grad) or hasattr(x, "_sum"):
            return None
        total = Sum()
        y = same(_Read.apply(x, total), x)
        let_readers_add(y, total)
        return ((y, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": y})

    for module in model.modules():
        children = dict(module.named_children())
        if {"q_proj", "k_proj", "v_proj"} <= children.keys() or {"gate_proj", "up_proj"} <= children.keys():
            module.register_forward_pre_hook(before, with_kwargs=True)


def sum_of(x: Tensor) -> Sum | None:
    """Where a reader of `x` must give its part of the gradient to, if it must."""
    total: Sum | None = getattr(x, "_sum", None)
    if total is not None:
        total.expect()
    return total


def let_overwrite_gradient(x: Tensor) -> None:
    """The gradient that `x` gets is nobody else's: what gave `x` may write into it. torch's own nodes cannot know."""
    _let_overwrite(x.grad_fn)


def _let_overwrite(node: Any) -> None:
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        node._owns_gradient = True  # type: ignore[attr-defined]


def owns_gradient(ctx: Any) -> bool:
    """Whether the node of an operation was told so."""
    return getattr(ctx, "_owns_gradient", False)


def lent(y: Tensor) -> Tensor:
    """`y` lies in memory that will soon hold something else."""
    y._lent = True  # type: ignore[attr-defined]
    return y


def kept(x: Tensor) -> Tensor:
    """The values of `x`, to be kept until backward."""
    return x.detach().clone() if hasattr(x, "_lent") else x.detach()


def itself(x: Tensor) -> Tensor:
    return x
