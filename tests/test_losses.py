"""An output layer that tells the loss gives torch's loss and gradient, and never holds more than a chunk of logits."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from allocations import allocations
from ranks import run_ranks
from torch import Tensor, nn

from lora_scale.adapters.frozen import freeze_linears
from lora_scale.parallel import losses
from lora_scale.parallel.vocabulary import IGNORED
from lora_scale.spec import memory, named, output
from lora_scale.spec.config import RunConfig
from lora_scale.spec.shapes import architecture

TOKENS, FEATURES, WORDS = 2 * 150, 48, 517


def head(bias: bool = False) -> losses.LossHead:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, WORDS, bias=bias)).requires_grad_(False)
    freeze_linears(model)
    model[0].__class__ = losses.LossHead
    model[0].cut = model[0].labels = None  # type: ignore[assignment]
    return model[0]  # type: ignore[return-value]


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, TOKENS // 2, FEATURES, generator=generator) * 3
    labels = torch.randint(WORDS, (TOKENS,), generator=generator)
    labels[::3] = IGNORED
    return x, labels


def told(layer: losses.LossHead, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    layer.labels = labels
    loss = layer(x)
    (loss * 0.37).backward()
    assert x.grad is not None
    return loss.detach(), x.grad


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 128, 1024])
def test_loss_and_gradient_are_torchs(rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "LARGEST", rows * WORDS * 8)
    layer, (x, labels) = head(bias), inputs()
    loss, dx = told(layer, x, labels)
    own = x.clone().requires_grad_()
    theirs = F.cross_entropy(F.linear(own, layer.weight, layer.bias).flatten(0, 1), labels, reduction="sum")
    (theirs * 0.37).backward()
    torch.testing.assert_close(loss, theirs.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(dx, own.grad, rtol=1e-5, atol=1e-6)
    assert layer.labels is None and layer(x).shape == (2, TOKENS // 2, WORDS), "logits again"
    layer.labels = labels
    with torch.no_grad():
        torch.testing.assert_close(layer(x), loss, rtol=0, atol=0)


def test_bf16_is_as_near_to_fp32_as_whole_logits_are() -> None:
    """Errors of the gradient against fp32, of ours and of the plain way in bf16: at most twice as large."""
    layer, (x, labels) = head(), inputs()
    _, exact = told(layer, x, labels)
    narrow = head().to(torch.bfloat16)
    _, ours = told(narrow, x.bfloat16(), labels)  # type: ignore[arg-type]
    own = x.bfloat16().requires_grad_()
    plain = F.cross_entropy(F.linear(own, narrow.weight).float().flatten(0, 1), labels, reduction="sum") * 0.37  # type: ignore[arg-type]
    plain.backward()
    assert own.grad is not None
    assert (ours.float() - exact).norm() <= 2 * (own.grad.float() - exact).norm()


def test_no_target_at_all() -> None:
    layer, (x, labels) = head(), inputs()
    loss, dx = told(layer, x, torch.full_like(labels, IGNORED))
    assert loss == 0 and not dx.any()


@pytest.mark.parametrize(
    ("tokens", "words", "width"), [(1, 1, 2), (4096, 32000, 2), (8192, 151936, 2), (100, 10**9, 4), (16384, 262144, 4)]
)
def test_chunks_are_even_and_bounded(tokens: int, words: int, width: int) -> None:
    size = output.chunk(tokens, words, width)
    assert output.chunk(0, words, width) == 0 < size <= tokens and (size == tokens or size % output.EVEN == 0)
    assert size <= output.EVEN or size * words * output.bytes_of_a_word(width) <= output.LARGEST


def test_largest_tensor_is_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 300 tokens at 128 a chunk nothing as large as all logits is made."""
    monkeypatch.setattr(output, "LARGEST", 128 * WORDS * 8)
    sizes: list[int] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in (found if isinstance(found, tuple) else (found,)) if isinstance(t, Tensor))
            return found

    layer, (x, labels) = head(), inputs()
    with Watch():
        told(layer, x, labels)
    assert max(sizes) == max(128 * WORDS, layer.weight.numel())


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_peak_is_as_planned(precision: str, tmp_path: Path) -> None:
    """By torch's allocator: one chunk's logits and what is made of them, beside the input and its gradient. 1%: numbers
    a row are left out."""
    words, dtype = 20_000, {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    layer = nn.Linear(FEATURES, words, bias=False, dtype=dtype).requires_grad_(False)
    layer.__class__, layer.cut = losses.LossHead, None  # type: ignore[assignment]
    x, labels = torch.randn(4096, FEATURES, dtype=dtype, requires_grad=True), torch.arange(4096)

    def work() -> None:
        layer.labels = labels
        layer(x).backward()
        x.grad = None

    work()
    _, _, peak = allocations(work, tmp_path)
    shape = architecture(
        named.shape("llama-7.2b") | {"vocab_size": words, "hidden_size": FEATURES, "num_attention_heads": 3}
    )
    cfg = config(precision=precision, data={"train": "x", "seq_len": 4096})
    planned = memory.logits(shape, cfg, memory.Work(masked=False))
    own = x.numel() * x.element_size()  # the input is there before
    assert peak == pytest.approx(planned - own, rel=0.01)


def config(**changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "model": {"path": "x"},
        "data": {"train": "x", "seq_len": 8},
        "run_dir": "x",
        "train": {"max_steps": 1, "micro_batch_size": 1, "global_batch_size": 1},
    }
    return RunConfig.model_validate(tree | changes)


@pytest.mark.parametrize(
    ("model_type", "is_tied", "changes", "softcap", "is_so"),
    [
        ("llama", False, {}, None, True),
        ("llama", True, {}, None, True),
        ("llama", False, {"kernels": "none"}, None, False),
        ("llama", False, {"method": "full"}, None, False),
        ("llama", False, {"lora": {"modules_to_save": ["lm_head"]}}, None, False),
        ("llama", False, {"lora": {"modules_to_save": ["embed_tokens"]}}, None, True),
        ("llama", False, {"lora": {"trainable_token_indices": [3]}}, None, True),
        ("llama", True, {"lora": {"trainable_token_indices": [3]}}, None, False),
        ("gemma3_text", True, {}, None, True),
        ("gemma3_text", True, {}, 30.0, False),
        ("gpt2", True, {}, None, False),
    ],
)
def test_where(model_type: str, is_tied: bool, changes: dict[str, Any], softcap: float | None, is_so: bool) -> None:
    assert output.in_chunks(model_type, is_tied, config(**changes), softcap) is is_so


@pytest.mark.ranks
def test_a_vocabulary_in_two(tmp_path: Path) -> None:
    """fp32, sums in another order: some roundings of 6e-8 each."""
    for found in run_ranks(2, "loss_cases:cut_head", folder=tmp_path):
        assert found["loss"] < 1e-6 and found["dx"] < 1e-6, found
