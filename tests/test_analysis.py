"""Spectra, subspaces and amplification on updates whose answers are known."""

import math

import pytest
import torch
from torch import Tensor

from lora_scale.adapters import analysis


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def basis(dim: int, count: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(draw(dim, count, seed=seed))[0]


@pytest.mark.parametrize(("n_out", "n_in", "r"), [(24, 40, 5), (40, 24, 5), (6, 4, 9)])  # the last: r above both dims
def test_an_update_is_that_of_its_product(n_out: int, n_in: int, r: int) -> None:
    a, b = draw(r, n_in), draw(n_out, r, seed=1)
    update = analysis.decompose(a, b, 2.5)
    k = min(n_out, n_in, r)
    torch.testing.assert_close(update.left * update.values @ update.right.T, 2.5 * b @ a)
    torch.testing.assert_close(update.values, torch.linalg.svdvals(2.5 * b @ a)[:k])
    for columns in (update.left, update.right, update.a_right):
        torch.testing.assert_close(columns.T @ columns, torch.eye(columns.shape[1], dtype=torch.float64))
    assert analysis.update_norm(a, b, 2.5) == pytest.approx(update.norm, rel=1e-12)
    assert analysis.update_norm(a, b, -2.5) == pytest.approx(update.norm, rel=1e-12)


def test_the_cut_of_a_product_changes_a_but_not_the_update() -> None:
    """B A = (B G^-1) (G A): the update's directions are its own, A's are not (save all of them together)."""
    a, b, g = draw(4, 30), draw(20, 4, seed=1), draw(4, 4, seed=2)
    one, other = analysis.decompose(a, b, 1.0), analysis.decompose(g @ a, b @ g.inverse(), 1.0)
    for side in ("left", "right"):
        torch.testing.assert_close(
            analysis.similarity(getattr(one, side), getattr(other, side)).diagonal(), torch.ones(4).double()
        )
    of_a = analysis.similarity(one.a_right, other.a_right)
    assert of_a[-1, -1] == pytest.approx(1.0) and of_a[0, 0] < 0.99


def test_right_singular_vectors_of_a_are_those_of_torch() -> None:
    a = draw(4, 30)
    expected = torch.linalg.svd(a, full_matrices=False)[2].T
    found = analysis.decompose(a, draw(20, 4, seed=1), 1.0).a_right
    torch.testing.assert_close((found.T @ expected).abs(), torch.eye(4, dtype=torch.float64))


def test_equal_subspaces_are_similar_by_1_and_orthogonal_ones_by_0() -> None:
    both = basis(32, 8)
    one, other = both[:, :4], both[:, 4:]
    turned = one @ basis(4, 4, seed=1)
    assert analysis.similarity(one, turned)[-1, -1] == pytest.approx(1.0)
    torch.testing.assert_close(analysis.similarity(one, other), torch.zeros(4, 4, dtype=torch.float64))
    contained = analysis.similarity(one[:, :2], one)  # the first two of four: 1 once j has reached i
    torch.testing.assert_close(contained, torch.tensor([[1.0] * 4, [0.5 * 2] + [1.0] * 3]).double())


def test_half_shared_directions_count_half() -> None:
    both = basis(32, 6)
    phi = analysis.similarity(both[:, :4], both[:, 2:])
    assert phi[-1, -1] == pytest.approx(0.5)
    assert phi[1, -1] == pytest.approx(0.0) and phi[2, 0] == pytest.approx(1.0)  # the third of one is the other's first


def test_similarity_is_one_minus_the_projection_metric() -> None:
    """d = || U U^T - V V^T ||_F / sqrt(2), and phi = 1 - d^2 / p: the identity of Appendix G as it should read."""
    one, other, p = basis(20, 3), basis(20, 3, seed=5), 3
    metric = (one @ one.T - other @ other.T).norm() / math.sqrt(2)
    assert analysis.similarity(one, other)[-1, -1] == pytest.approx(1 - metric.item() ** 2 / p)


def test_random_subspaces_lie_at_the_theoretical_mean() -> None:
    """||U^T V||_F^2 / min(i, j) of random subspaces: mean max(i, j) / d. Of one direction each it is Beta(1/2,
    (d-1)/2), whose deviation is below sqrt(2) / d; the mean of n draws is allowed five of its own deviations."""
    dim, i, j, n = 64, 3, 5, 300
    generator = torch.Generator().manual_seed(0)
    drawn = [
        analysis.similarity(*(analysis.random_directions(dim, count, generator) for count in (i, j))) for _ in range(n)
    ]
    mean, expected = torch.stack(drawn).mean(0), analysis.chance(i, j, dim)
    assert expected[2, 4] == 5 / dim and expected[0, 0] == 1 / dim
    assert (mean - expected).abs().max() < 5 * math.sqrt(2) / dim / math.sqrt(n)


def test_effective_rank_and_directions_of_known_spectra() -> None:
    flat, one = torch.ones(8).double(), torch.tensor([3.0, 0.0, 0.0]).double()
    assert analysis.effective_rank(flat) == pytest.approx(8.0) and analysis.effective_rank(one) == pytest.approx(1.0)
    assert analysis.directions_for(flat) == 8 and analysis.directions_for(one) == 1
    assert analysis.directions_for(torch.tensor([3.0, 1.0]).double()) == 1  # 9 of 10 is 90%
    assert analysis.directions_for(torch.tensor([2.0, 1.0]).double()) == 2
    zero = torch.zeros(4).double()
    assert analysis.effective_rank(zero) == 0.0 and analysis.directions_for(zero) == 0


def test_amplification_of_a_planted_direction_is_exact() -> None:
    """W does 0.3 along u v^T; an update of norm 6 along it amplifies by 20."""
    u, v = basis(40, 4), basis(24, 4, seed=1)
    weight = (u * torch.tensor([9.0, 7.0, 5.0, 0.3], dtype=torch.float64)) @ v.T
    update = analysis.decompose(v[:, 3:].T, 6 * u[:, 3:], 1.0)
    found = correlation(weight, update)
    assert found.from_update == pytest.approx(0.3, rel=1e-10)
    assert found.from_weight == pytest.approx(9.0, rel=1e-10)
    assert found.amplification == pytest.approx(20.0, rel=1e-10)
    assert found.update_norm == pytest.approx(6.0) and found.error == 0.0


def test_the_weights_own_directions_do_as_much_as_the_weight() -> None:
    weight = draw(40, 24)
    u, values, vh = torch.linalg.svd(weight, full_matrices=False)
    found = correlation(weight, analysis.decompose(vh[:5], u[:, :5], 1.0))
    assert found.from_update == pytest.approx(found.from_weight, rel=1e-10)
    assert found.from_weight == pytest.approx(values[:5].norm().item(), rel=1e-10)


def test_a_random_direction_does_what_is_expected_in_the_mean() -> None:
    """The mean square of n draws, within five of its standard errors."""
    weight, update, n = draw(32, 48), analysis.decompose(draw(3, 48, seed=1), draw(32, 3, seed=2), 1.0), 200
    generator = torch.Generator().manual_seed(3)
    top, norm = analysis.top_values(weight, 3, generator), analysis.frobenius(weight)
    found = [analysis.correlate(weight, update, top, norm, generator) for _ in range(n)]
    squares = torch.tensor([c.from_random**2 for c in found])
    assert abs(squares.mean() - found[0].random_expected ** 2) < 5 * squares.std() / math.sqrt(n)


def correlation(weight: Tensor, update: analysis.Update) -> analysis.Correlation:
    generator = torch.Generator().manual_seed(0)
    top = analysis.top_values(weight, len(update.values), generator)
    return analysis.correlate(weight, update, top, analysis.frobenius(weight), generator)


@pytest.mark.parametrize("shape", [(60, 30), (30, 60)])
def test_blocks_do_not_change_an_answer(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    weight = draw(*shape).bfloat16()
    update = analysis.decompose(draw(4, shape[1]), draw(shape[0], 4, seed=1), 1.0)
    whole = correlation(weight, update)
    monkeypatch.setattr(analysis, "BLOCK", 7 * shape[1])
    for field in ("from_update", "from_weight", "from_random", "weight_norm"):
        # fp32 sums in another order
        assert getattr(correlation(weight, update), field) == pytest.approx(getattr(whole, field), rel=1e-5)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_the_randomised_svd_keeps_within_the_error_it_says(
    shape: tuple[int, int], decay: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a flat Gaussian spectrum, the worst there is, and on one that falls as those of trained weights do."""
    u, values, vh = torch.linalg.svd(draw(*shape), full_matrices=False)
    weight = u * (values * torch.arange(1, 201).double() ** -decay) @ vh
    exact = analysis.top_values(weight, 8, torch.Generator()).values
    torch.testing.assert_close(exact, torch.linalg.svdvals(weight)[:8])
    monkeypatch.setattr(analysis, "EXACT_DIM", 100)
    found = analysis.top_values(weight, 8, torch.Generator().manual_seed(0))
    assert 0 < found.error < 0.2
    assert (found.values <= exact * (1 + 1e-6)).all(), "a projection is never larger"
    every = torch.linalg.svdvals(weight)
    nearest = (found.values[:, None] - every[None]).abs().min(dim=1).values
    assert (nearest <= found.error * found.values[0] * (1 + 1e-5)).all()
    if decay:
        assert (exact - found.values).max() <= found.error * found.values[0]
        # what the page shows; seen at most 2e-5 for 8 values of SmolLM2's q, v and down (docs/log.md)
        assert found.values.norm().item() == pytest.approx(exact.norm().item(), rel=1e-4)
