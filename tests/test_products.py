"""Products by a kernel that cuBLASLt proposes: torch's own results, and torch's own everywhere else."""

from collections.abc import Iterator

import pytest
import torch

from lora_scale.adapters import products

needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


SHAPES = [(4096, 14336, 4096), (2048, 8192, 8192), (4096, 1024, 10240), (4000, 4104, 4096)]


@pytest.fixture(autouse=True)
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(products, "_is_on", False)
    products.choose_kernels()
    yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elsewhere_they_are_torchs(dtype: torch.dtype) -> None:
    a, b = torch.randn(6, 4, dtype=dtype), torch.randn(4, 10, dtype=dtype)
    out = torch.full((6, 10), 7.0, dtype=dtype)
    assert products.mm(a, b, out) is out and torch.equal(out, a @ b) and torch.equal(products.mm(a, b), a @ b)
    products.add_mm(out, a, b)
    assert torch.equal(out, torch.addmm(a @ b, a, b))
    c = torch.randn(6, 10, dtype=dtype)
    assert torch.equal(products.sum_mm(c, a, b), torch.addmm(c, a, b))


@pytest.mark.gpu
@needs_hopper
@pytest.mark.parametrize(
    ("m", "n", "k"), [(4096, 14336, 4096), (2048, 8192, 8192), (4096, 1024, 10240), (4000, 4104, 4096)]
)
@pytest.mark.parametrize("is_transposed", [True, False])
def test_the_same_bits(m: int, n: int, k: int, is_transposed: bool) -> None:
    """Each element is summed along k in the same order, whatever the tile: bitwise."""
    torch.manual_seed(0)
    a = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    b = torch.randn((n, k) if is_transposed else (k, n), device="cuda", dtype=torch.bfloat16) * 0.02
    b = b.t() if is_transposed else b
    if n >= 4096:
        assert products._kernel(m, n, k, is_transposed, 0) is not None, "no kernel of 256 x 128 is proposed"
    found, theirs = products.mm(a, b), torch.mm(a, b)
    assert torch.equal(found, theirs)
    products.add_mm(found, a, b)
    assert torch.equal(found, theirs.addmm_(a, b))
    kept = found.clone()
    assert torch.equal(products.sum_mm(found, a, b), torch.addmm(found, a, b)) and torch.equal(found, kept)


@pytest.mark.gpu
@needs_hopper
def test_what_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small, strided, unaligned and fp32 matrices; right all the same."""
    asked: list[tuple[int, ...]] = []
    monkeypatch.setattr(products, "_kernel", lambda *shape: asked.append(shape))
    a, b = (torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flat = torch.randn(4096 * 4096 + 8, device="cuda", dtype=torch.bfloat16)
    odd = flat[8:].view(4096, 4096)
    cases = [(a[:256], b[:, :512]), (a[:, ::2], b[::2]), (a, odd), (odd, b), (a.float(), b.float())]
    for left, right in cases:
        assert torch.equal(products.mm(left, right), torch.mm(left, right))
    assert not asked
    products.mm(a, b)
    assert asked == [(4096, 4096, 4096, False, 0)]


@pytest.mark.gpu
@needs_hopper
def test_on_another_stream_too() -> None:
    a, b = (torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        a2 = a * 2
        found = products.mm(a2, b)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(found, torch.mm(a * 2, b))
