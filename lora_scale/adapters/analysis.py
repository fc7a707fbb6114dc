"""What a low-rank update looks like, and what it is to its weight: spectra, subspaces, amplification. Arithmetic only.

Knows tensors of one module; refuses to know files, runs and pictures. After Section 7 of the LoRA paper
(https://arxiv.org/abs/2106.09685). An update B A is never multiplied out: its SVD is that of an r x r matrix between
two QR decompositions. A weight is walked through in blocks of rows, so that one tensor in the files' dtype is the
largest thing in memory.
"""

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 19  # elements of a weight that are in fp32 at once: 2 MiB, which caches hold between two products
EXACT_DIM = 2048  # up to this smaller dim a weight's singular values are exact (a second); above, randomised
OVERSAMPLE, ROUNDS = 10, 8  # of the randomised SVD; trained weights' spectra are nearly flat, and need the rounds


@dataclass(frozen=True, slots=True)
class Update:
    """dW = scaling B A = left diag(values) right^T, columns orthonormal, values falling; fp64."""

    left: Tensor  # (out, k), k = min(r, in, out): directions the layer's output moves in
    values: Tensor  # (k,)
    right: Tensor  # (in, k): directions of the input that it listens to
    a_right: (
        Tensor  # (in, k): right-singular vectors of A alone, which the paper compares; they depend on how B A is cut
    )

    @property
    def norm(self) -> float:
        """||dW||_F"""
        return self.values.norm().item()


@dataclass(frozen=True, slots=True)
class Top:
    """The largest singular values of a weight."""

    values: Tensor  # (count,), fp64, falling
    error: float  # 0 where exact; else each value lies within error * values[0] of a singular value of the weight


@dataclass(frozen=True, slots=True)
class Leading:
    """The part of rank `count` of a weight that is nearest to it: left diag(values) right^T, values falling."""

    left: Tensor  # (out, count), columns of length 1 or, where the value is 0, 0
    values: Tensor  # (count,)
    right: Tensor  # (in, count), the same
    error: float  # as in Top


@dataclass(frozen=True, slots=True)
class Correlation:
    """One row of the paper's Table 7: ||U^T W V||_F for k directions U, V taken from the update, W itself, chance."""

    rank: int
    weight_norm: float  # ||W||_F
    update_norm: float
    from_update: float
    from_weight: float
    from_random: float  # one draw
    random_expected: float  # the root of the mean square over all draws: k ||W||_F / sqrt(in out)
    error: float  # of from_weight, relative: Top.error

    @property
    def amplification(self) -> float:
        """||dW||_F / ||U^T W V||_F: how much larger the update is than what W does in the same directions."""
        return self.update_norm / self.from_update if self.from_update else math.inf


def decompose(lora_a: Tensor, lora_b: Tensor, scaling: float) -> Update:
    """The SVD of scaling B A from A (r, in) and B (out, r)."""
    left, upper_b = torch.linalg.qr(lora_b.double())
    right, upper_a = torch.linalg.qr(lora_a.double().T)
    u, values, vh = torch.linalg.svd(scaling * upper_b @ upper_a.T, full_matrices=False)
    of_a = torch.linalg.svd(upper_a, full_matrices=False)[0]
    return Update(left @ u, values, right @ vh.T, right @ of_a)


def update_norm(lora_a: Tensor, lora_b: Tensor, scaling: float) -> float:
    """||scaling B A||_F from the two r x r Gram matrices."""
    a, b = lora_a.double(), lora_b.double()
    squared = ((b.T @ b) * (a @ a.T)).sum().item()
    return abs(scaling) * math.sqrt(max(0.0, squared))


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the normalised singular values, between 1 and their number.

    O. Roy, M. Vetterli: The effective rank, EUSIPCO 2007. 0 for an update that is zero.
    """
    total = values.sum()
    if total == 0:
        return 0.0
    p = values / total
    return torch.special.entr(p).sum().exp().item()


def directions_for(values: Tensor, share: float = 0.9) -> int:
    """How many of the first directions hold `share` of ||dW||_F^2."""
    energy = values.square().cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1 if energy[-1] > 0 else 0


def similarity(one: Tensor, other: Tensor) -> Tensor:
    """phi(i, j) = ||U_i^T V_j||_F^2 / min(i, j) for the first i and j columns: (i, j), between 0 and 1.

    Columns are orthonormal. Section 7.2; for i = j = p and d the projection metric it is 1 - d^2 / p (Appendix G has
    the sign and the factor otherwise, and calls right-singular vectors left).
    """
    overlap = (one.T.double() @ other.double()).square().cumsum(0).cumsum(1)
    return overlap / smaller(*overlap.shape)


def chance(rows: int, columns: int, dim: int) -> Tensor:
    """The mean of `similarity` over independent random subspaces of R^dim: i j / dim / min(i, j) = max(i, j) / dim."""
    i, j = torch.arange(1, rows + 1)[:, None], torch.arange(1, columns + 1)[None]
    return torch.maximum(i, j).double() / dim


def smaller(rows: int, columns: int) -> Tensor:
    """min(i, j), counted from 1: (rows, columns)."""
    return torch.minimum(torch.arange(1, rows + 1)[:, None], torch.arange(1, columns + 1)[None])


def random_directions(dim: int, count: int, generator: torch.Generator) -> Tensor:
    """A uniformly random orthonormal basis of `count` directions: (dim, count), fp64."""
    return torch.linalg.qr(torch.randn(dim, count, dtype=torch.float64, generator=generator))[0]


def correlate(weight: Tensor, update: Update, top: Top, weight_norm: float, generator: torch.Generator) -> Correlation:
    """Table 7's row for all k directions of `update`; `top` has at least as many values. Two passes over `weight`."""
    n_out, n_in = weight.shape
    rank = len(update.values)
    draws = random_directions(n_out, rank, generator), random_directions(n_in, rank, generator)
    return Correlation(
        rank=rank,
        weight_norm=weight_norm,
        update_norm=update.norm,
        from_update=_between(weight, update.left, update.right),
        from_weight=top.values[:rank].norm().item(),
        from_random=_between(weight, *draws),
        random_expected=rank * weight_norm / math.sqrt(n_in * n_out),
        error=top.error,
    )


def frobenius(weight: Tensor) -> float:
    return math.sqrt(sum(block.norm(dim=1).double().square().sum().item() for _, block in _blocks(weight)))


def top_values(weight: Tensor, count: int, generator: torch.Generator) -> Top:
    """The `count` largest singular values of `weight` (out, in), or all there are."""
    count = min(count, *weight.shape)
    if min(weight.shape) <= EXACT_DIM:
        return Top(_exact(weight)[:count], 0.0)
    found = _randomised(weight, count, generator)
    return Top(found.values.double(), found.error)


def leading(weight: Tensor, count: int, generator: torch.Generator) -> Leading:
    """The first `count` pairs of singular vectors of `weight` (out, in), fp64 where exact; the largest entry of each
    right one is positive. Exact or randomised as `top_values`: then a projection of the weight that is nearly as near.
    """
    if min(weight.shape) > EXACT_DIM:
        found = _randomised(weight, count, generator)
    elif weight.shape[0] >= weight.shape[1]:
        right = torch.linalg.eigh(_gram(weight))[1].flip(1)[:, :count]
        left, values = _lengths(torch.cat([block.double() @ right for _, block in _blocks(weight)]))
        found = Leading(left, values, right, 0.0)
    else:
        other = leading(weight.T, count, generator)
        found = Leading(other.right, other.values, other.left, 0.0)
    signs = found.right.gather(0, found.right.abs().argmax(0, keepdim=True)).sign()
    return Leading(found.left * signs, found.values, found.right * signs, found.error)


def workspace(shape: tuple[int, int], count: int) -> int:
    """Bytes that `leading` takes at most beside an fp32 weight of that shape: a few copies of what it works with."""
    if (smaller := min(shape)) <= EXACT_DIM:
        return 8 * (6 * smaller**2 + 4 * sum(shape) * count) + 8 * BLOCK
    return 4 * 4 * sum(shape) * (count + OVERSAMPLE) * ROUNDS + 8 * BLOCK


def _lengths(columns: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of length 1, and how long they were."""
    values = columns.norm(dim=0)
    return columns / torch.where(values > 0, values, 1.0), values


def _exact(weight: Tensor) -> Tensor:
    """All singular values, as roots of the eigenvalues of the smaller Gram matrix. In fp64 squaring costs nothing that
    shows: a value of 1e-7 of the largest is still right to some digits."""
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    return torch.linalg.eigvalsh(_gram(tall)).flip(0).clamp(min=0.0).sqrt()


def _gram(weight: Tensor) -> Tensor:
    """W^T W: (in, in), fp64."""
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64)
    for _, block in _blocks(weight):
        gram += block.double().T @ block.double()
    return gram


def _randomised(weight: Tensor, count: int, generator: torch.Generator) -> Leading:
    """Block Krylov (Musco and Musco, https://arxiv.org/abs/1504.05477): all rounds of a power iteration from a random
    start together span the space in which the small SVD is exact; the last round alone, as usual, is far worse here.

    The values are never above the true ones. Of (u, s, v) found here W v = s u holds exactly; the other equation's
    residual bounds the error: a singular value lies within ||W^T u - s v|| / sqrt(2) of s. ROUNDS + 2 passes over W.
    """
    wide = min(count + OVERSAMPLE, *weight.shape)
    rounds = [_orthonormal(_gram_times(weight, torch.randn(weight.shape[1], wide, generator=generator)))]
    while len(rounds) < ROUNDS and (len(rounds) + 1) * wide <= min(weight.shape):
        rounds.append(_orthonormal(_gram_times(weight, rounds[-1])))
    basis = _orthonormal(torch.cat(rounds, dim=1))
    u, values, vh = torch.linalg.svd(_times(weight, basis), full_matrices=False)
    left, values, right = u[:, :count], values[:count], basis @ vh[:count].T
    residual = _transposed_times(weight, left) - right * values
    error = residual.norm(dim=0).max().item() / math.sqrt(2) / values[0].item()
    return Leading(left, values, right, error)


def _orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns)[0]


def _between(weight: Tensor, left: Tensor, right: Tensor) -> float:
    """||left^T W right||_F"""
    return (left.T @ _times(weight, right).double()).norm().item()


def _times(weight: Tensor, columns: Tensor) -> Tensor:
    """W X: (out, k)"""
    return torch.cat([block @ columns.to(block.dtype) for _, block in _blocks(weight)])


def _transposed_times(weight: Tensor, columns: Tensor) -> Tensor:
    """W^T X: (in, k)"""
    return _sum(columns[rows].to(block.dtype).T @ block for rows, block in _blocks(weight)).T


def _gram_times(weight: Tensor, columns: Tensor) -> Tensor:
    """W^T W X: (in, k), in one pass over W."""
    return _sum((block @ columns.to(block.dtype)).T @ block for _, block in _blocks(weight)).T


def _sum(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(Tensor.add_, parts)


def _blocks(weight: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight in turn, in fp32 (fp64 stays), at most BLOCK elements of them at once."""
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    step = max(1, BLOCK // weight.shape[1])
    for start in range(0, len(weight), step):
        rows = slice(start, start + step)
        yield rows, weight[rows].to(dtype)
