"""Masks as a pure function: of what they depend on, that they are random enough, that slices and devices agree."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lora_scale.adapters import dropout
from lora_scale.adapters.dropout import DropoutContext, keep_mask
from lora_scale.spec.errors import ConfigError

BATCH, SEQUENCE, FEATURES = 2, 96, 300
MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1


def context(seed: int = 1, step: int = 7, first_sample: int = 100, device: str = "cpu") -> DropoutContext:
    samples = torch.arange(first_sample, first_sample + BATCH, device=device)[:, None].expand(BATCH, SEQUENCE)
    filled = DropoutContext(seed)
    filled.set(step, samples, torch.arange(SEQUENCE, device=device).expand(BATCH, SEQUENCE))
    return filled


def mask(filled: DropoutContext, module: str = "a", p: float = 0.5, features: int = FEATURES) -> Tensor:
    return filled.drop(torch.ones(BATCH, SEQUENCE, features), module, p) != 0


def test_kept_values_are_scaled_and_the_rest_is_zero_also_in_the_gradient() -> None:
    x = torch.randn(BATCH, SEQUENCE, FEATURES, dtype=torch.float64, requires_grad=True)
    y = context().drop(x, "a", 0.25)
    kept = mask(context(), p=0.25)
    torch.testing.assert_close(y, torch.where(kept, x / 0.75, 0.0))
    y.sum().backward()
    assert torch.equal(x.grad != 0, kept) and x.grad.max().item() == pytest.approx(1 / 0.75)
    for dtype in (torch.bfloat16, torch.float16):
        assert context().drop(x.detach().to(dtype), "a", 0.25).dtype == dtype


def test_nothing_but_its_arguments_decides() -> None:
    first = mask(context())
    torch.manual_seed(123)
    torch.rand(7)
    assert torch.equal(first, mask(context()))


def test_a_python_integer_implementation_gives_the_same_bits() -> None:
    """Holds the wrapping int32 and int64 arithmetic to integers that do not wrap by themselves."""

    def mix64(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK64
        return z ^ (z >> 31)

    def keeps(token: int, feature: int, p: float) -> bool:
        cell = mix64(feature + 0x9E3779B97F4A7C15 & MASK64) & MASK32 ^ token & MASK32
        cell = cell * 0x7FEB352D & MASK32
        cell ^= cell >> 15
        cell = (cell + (token >> 32)) * 0x846CA68B & MASK32
        signed = cell - (1 << 32) if cell >> 31 else cell
        return signed >= round(p * (1 << 32)) - (1 << 31)

    tokens = [0, 1, 2**63, 2**64 - 1, *(mix64(n) for n in range(60))]
    signed = torch.tensor([t - (1 << 64) if t >> 63 else t for t in tokens])
    for p in (0.1, 0.5, 0.9):
        expected = [[keeps(token, feature, p) for feature in range(5, 55)] for token in tokens]
        assert keep_mask(signed, 5, 50, p).tolist() == expected


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_the_share_kept_is_one_minus_p_overall_and_along_each_dim(p: float) -> None:
    kept = mask(context(), p=p, features=2000).double()
    sigma = math.sqrt(p * (1 - p))
    assert abs(kept.mean() - (1 - p)) < 4 * sigma / math.sqrt(kept.numel())
    for dims in ((0, 1), (2,)):  # by feature and by token; the largest of 2,000 normal deviates stays below 5
        shares = kept.mean(dims).flatten()
        n = kept.numel() / shares.numel()
        z = (shares - (1 - p)) / (sigma / math.sqrt(n))
        assert z.abs().max() < 5.5
        assert z.std() == pytest.approx(1, abs=0.2)  # neither clumped nor too even


CHANGES = {
    "seed": (context(seed=2), "a"),
    "step": (context(step=8), "a"),
    "module": (context(), "b"),
    "sample": (context(first_sample=102), "a"),
    "far sample": (context(first_sample=100 + 2**32), "a"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_masks_are_independent_between_seeds_steps_modules_and_samples(change: str) -> None:
    other, module = CHANGES[change]
    assert abs(_correlation(mask(context()), mask(other, module))) < 4.5


@pytest.mark.parametrize(("dim", "shift"), [(d, s) for d in (1, 2) for s in (1, 2, 3, 4, 8, 16, 32, 64)])
def test_masks_are_independent_between_positions_and_features(dim: int, shift: int) -> None:
    kept = mask(context())
    length = kept.shape[dim] - shift
    assert abs(_correlation(kept.narrow(dim, 0, length), kept.narrow(dim, shift, length))) < 4.5


def test_no_two_tokens_or_features_share_a_mask() -> None:
    kept = mask(context(), features=256).flatten(0, 1)
    for rows in (kept, kept.T):
        agreement = (rows.double() * 2 - 1) @ (rows.double() * 2 - 1).T / math.sqrt(rows.shape[1])
        agreement.fill_diagonal_(0)
        assert agreement.abs().max() < 6  # about 30,000 pairs of independent bits: 4.3 is expected


def test_the_values_are_uniform_not_only_the_bits() -> None:
    """The masks at p and q of one cell nest: a cell kept at 0.3 is kept at 0.2, and the shares fit."""
    filled = context()
    masks = [mask(filled, p=p) for p in (0.1, 0.2, 0.3, 0.7, 0.95)]
    for low, high in pairwise(masks):
        assert not (high & ~low).any()


def test_a_slice_of_features_has_the_slice_of_the_mask() -> None:
    whole = mask(context())
    x = torch.ones(BATCH, SEQUENCE, FEATURES)
    for start, stop in ((0, 75), (75, 150), (299, 300), (1, 299)):
        part = context().drop(x[..., start:stop], "a", 0.5, first_feature=start) != 0
        assert torch.equal(part, whole[..., start:stop])


def test_the_layout_of_the_batch_does_not_matter() -> None:
    """The same tokens, packed into other rows and in another order, get the same masks."""
    filled = context()
    assert filled.sample_ids is not None and filled.position_ids is not None
    order = torch.randperm(BATCH * SEQUENCE, generator=torch.Generator().manual_seed(0))
    shuffled = DropoutContext(filled.seed)
    shuffled.set(
        filled.step, filled.sample_ids.flatten()[order].view(4, -1), filled.position_ids.flatten()[order].view(4, -1)
    )
    got = shuffled.drop(torch.ones(4, 48, FEATURES), "a", 0.5) != 0
    assert torch.equal(got.flatten(0, 1), mask(filled).flatten(0, 1)[order])


def test_a_module_may_see_the_tokens_of_a_batch_in_one_row() -> None:
    flat = context().drop(torch.ones(BATCH * SEQUENCE, FEATURES), "a", 0.5)
    assert torch.equal(flat.view(BATCH, SEQUENCE, FEATURES) != 0, mask(context()))


def test_the_size_of_the_chunks_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = mask(context())
    for cells in (1, 1000, 7 * FEATURES):
        monkeypatch.setattr(dropout, "_CHUNK_CELLS", cells)
        assert torch.equal(mask(context()), whole)


@pytest.mark.gpu
def test_cpu_and_gpu_agree_bit_for_bit() -> None:
    for p in (0.05, 0.5):
        on_gpu = context(device="cuda").drop(torch.ones(BATCH, SEQUENCE, 5000, device="cuda"), "a", p) != 0
        assert torch.equal(on_gpu.cpu(), mask(context(), p=p, features=5000))


def test_misuse_is_caught() -> None:
    with pytest.raises(AssertionError, match="no batch"):
        DropoutContext(0).drop(torch.ones(1, 1, 1), "a", 0.5)
    with pytest.raises(
        ConfigError, match=r"a sees its tokens as \(7,\), the batch is \(2, 96\): .* set lora.dropout=0"
    ):
        context().drop(torch.ones(7, FEATURES), "a", 0.5)
    with pytest.raises(AttributeError):
        context().sample = torch.zeros(1)  # type: ignore[attr-defined]


def _correlation(one: Tensor, other: Tensor) -> float:
    """Of two masks with p = 0.5, in standard deviations of what independent bits would give."""
    product = (one.double() * 2 - 1) * (other.double() * 2 - 1)
    return (product.sum() / math.sqrt(product.numel())).item()
