"""Frozen linear layers compute what the plain ones do, and keep nothing for backward."""

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lora_scale.adapters.frozen import freeze_linears


def _pair(kind: str, bias: bool) -> tuple[nn.Module, nn.Module]:
    layers = []
    for _ in range(2):
        torch.manual_seed(0)
        layer = nn.Linear(12, 20, bias=bias) if kind == "linear" else Conv1D(20, 12)
        layers.append(layer.requires_grad_(False))
    assert freeze_linears(layers[1]) == 1
    return layers[0], layers[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "bias"), [("linear", False), ("linear", True), ("conv1d", True)])
def test_output_and_gradient_are_the_same_bits(kind: str, bias: bool, dtype: torch.dtype) -> None:
    plain, frozen = (layer.to(dtype) for layer in _pair(kind, bias))
    torch.manual_seed(1)
    x, dy = torch.randn(3, 5, 12, dtype=dtype), torch.randn(3, 5, 20, dtype=dtype)
    results = []
    for layer in (plain, frozen):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(dy)
        results.append((y.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_nothing_is_kept_for_backward(kind: str) -> None:
    """Neither the input nor the weight: under ZeRO-3 the weight is the gathered copy, which must go."""
    kept: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    plain, frozen = _pair(kind, bias=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        frozen(torch.randn(2, 3, 12, requires_grad=True))
        assert kept == []
        plain(torch.randn(2, 3, 12, requires_grad=True))
        assert kept, "the plain layer keeps its weight: the test sees what is kept"


def test_the_weight_is_looked_up_again_in_backward() -> None:
    """As ZeRO-3 does: the tensor behind the Parameter goes after forward and comes back, elsewhere, before backward."""
    _, frozen = _pair("linear", bias=False)
    weight = frozen.weight.data.clone()  # type: ignore[union-attr, operator]
    x = torch.randn(4, 12, requires_grad=True)
    y = frozen(x)
    frozen.weight.data = torch.empty(0)
    frozen.weight.data = weight.clone()
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones(4, 20) @ weight)  # type: ignore[arg-type]


def test_only_wholly_frozen_plain_layers_change() -> None:
    model = tiny_model("llama").requires_grad_(False)
    names = [name for name, _ in model.named_parameters()]
    model.lm_head.weight.requires_grad_(True)  # type: ignore[union-attr]
    assert freeze_linears(model) == 2 * 7  # q, k, v, o, gate, up, down of two layers; not the head
    assert type(model.lm_head) is nn.Linear
    assert [name for name, _ in model.named_parameters()] == names
