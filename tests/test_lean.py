"""Lean layers give what transformers' own give, and the same gradients; on a GPU by Liger's kernels."""

from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn

from lora_scale.adapters import lean, marks
from lora_scale.adapters.dropout import DropoutContext
from lora_scale.adapters.frozen import freeze_linears
from lora_scale.adapters.lora import LoRALinear, adapt
from lora_scale.spec.config import LoraConfig

IDS = torch.arange(2 * 16).view(2, 16) * 7 % 61
CASES = [("all-linear", 0.0), ("all-linear", 0.2), ("q v", 0.0)]


def built(model_type: str, targets: str, dropout: float, *, is_lean: bool) -> tuple[nn.Module, dict[str, LoRALinear]]:
    model = tiny_model(model_type)
    if is_lean:
        assert lean.make_lean(model)
    context = DropoutContext(1)
    positions = torch.arange(16).repeat(2, 1)
    context.set(0, torch.zeros_like(positions), positions)
    values = {"r": 4, "lora_alpha": 6.0, "target_modules": tuple(targets.split()), "dropout": dropout}
    layers = adapt(model, LoraConfig.model_validate(values), 0, context)
    freeze_linears(model)
    model.enable_input_require_grads()
    if is_lean:
        marks.share_inputs(model)
    with torch.no_grad():
        for number, layer in enumerate(layers.values()):
            generator = torch.Generator().manual_seed(number)
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator) * 0.2)
    return model.train(), layers


def loss_of(model: nn.Module, device: str = "cpu") -> Tensor:
    ids = IDS.to(device)
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize(("targets", "dropout"), CASES)
@pytest.mark.parametrize("model_type", lean.OFFSETS)
def test_loss_and_gradients_are_those_of_transformers_modules(
    model_type: str, targets: str, dropout: float, recomputes: bool
) -> None:
    found = []
    for is_lean in (False, True):
        model, layers = built(model_type, targets, dropout, is_lean=is_lean)
        if recomputes and is_lean:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = loss_of(model)
        loss.backward()
        found.append((loss, {f"{n}.{k}": getattr(m, k).grad for n, m in layers.items() for k in ("lora_A", "lora_B")}))
    (plain, theirs), (mine, ours) = found
    assert mine == plain, "the same arithmetic forward"
    for name, reference in theirs.items():
        assert reference.norm() > 0
        assert (ours[name] - reference).norm() <= 1e-5 * reference.norm(), name


def test_a_norm_and_a_product_train_too() -> None:
    """Full fine-tuning: the weights of norms want gradients, and linear layers are torch's own."""
    grads = []
    for is_lean in (False, True):
        model = tiny_model("llama").train()
        if is_lean:
            lean.make_lean(model)
            marks.share_inputs(model)
        loss_of(model).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, reference in grads[0].items():
        assert (grads[1][name] - reference).norm() <= 1e-5 * reference.norm(), name


def test_readers_add_up_one_gradient() -> None:
    """Also where one of them is not ours, and where one is not used."""
    torch.manual_seed(0)
    block = nn.Module()
    block.gate_proj, block.up_proj = nn.Linear(4, 6).requires_grad_(False), nn.Linear(4, 6).requires_grad_(False)
    block.other, unused = nn.Linear(4, 6), torch.zeros(())
    block.forward = lambda x: (block.gate_proj(x) * 2 + block.other(x), block.up_proj(x))
    x = torch.randn(3, 4, requires_grad=True)

    def gradient(readers: int) -> Tensor:
        first, second = block(x)
        (first.sum() + (second.sum() if readers == 3 else unused)).backward()
        taken, x.grad = x.grad, None
        assert taken is not None
        return taken

    expected = [gradient(n) for n in (2, 3)]
    freeze_linears(block)
    marks.share_inputs(block)
    for n, reference in zip((2, 3), expected, strict=True):
        torch.testing.assert_close(gradient(n), reference, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("lies_in_one", "products"), [(True, 2), (False, 4)])
def test_k_and_v_wait_for_q_where_their_matrices_lie_end_to_end(lies_in_one: bool, products: int) -> None:
    """q, an adapter, k, v: backward asks in the other order. Two products are the adapter's and that of all three."""
    torch.manual_seed(0)
    sizes, features = (96, 80, 80), 400
    buffer = torch.randn(sum(sizes), features)
    weights = list(buffer.split(sizes)) if lies_in_one else [part.clone() for part in buffer.split(sizes)]
    weights.insert(1, torch.randn(4, features))
    gradients = [torch.randn(5, len(weight)) for weight in weights]
    made: list[bool] = []

    class Counted(marks.Sum):
        def add_product(self, dy: Tensor, weight: Tensor, is_last: bool) -> None:
            made.append(is_last)
            super().add_product(dy, weight, is_last)

    total = Counted()
    for _ in weights:
        total.expect()
    for dy, weight in reversed(list(zip(gradients, weights, strict=True))):
        total.add(dy, weight)
    assert made == [False] * (products - 1) + [True]
    expected = sum(dy @ weight for dy, weight in zip(gradients, weights, strict=True))
    torch.testing.assert_close(total.take(), expected, rtol=1e-5, atol=1e-4)
    total.expect()
    total.expect()
    total.add(gradients[3], weights[3])  # the other reader has no gradient
    torch.testing.assert_close(total.take(), gradients[3] @ weights[3])


def test_a_norm_writes_into_a_gradient_only_where_that_is_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = nn.Module()
    norm.__class__, norm.offset, norm.eps, norm.weight = lean.LeanRMSNorm, 0.0, 1e-6, nn.Parameter(torch.ones(4))
    told: list[bool] = []

    class Kernels:
        def rms_norm_backward(self, dy: Any, x: Any, *more: Any) -> tuple[Tensor, None]:
            told.append(more[6])
            return torch.zeros_like(x), None

    x = torch.ones(3, 4, requires_grad=True)
    given, kept = norm(x), norm(x)
    marks.let_overwrite_gradient(given)
    marks.let_overwrite_gradient(x * 2)  # a node of torch's own takes no notice
    monkeypatch.setattr(lean, "_kernels", lambda _: Kernels())
    monkeypatch.setattr(lean, "_settings", lambda _: (4, 4))
    given.sum().backward()
    kept.sum().backward()
    assert told == [True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", lean.OFFSETS)
def test_kernels_are_as_near_to_fp32_as_plain_bf16(model_type: str) -> None:
    """Every gradient's error against fp32 is at most twice that of transformers' own modules in bf16."""
    runs: dict[str, dict[str, Any]] = {}
    for name, is_lean, dtype in (
        ("exact", False, torch.float32),
        ("plain", False, torch.bfloat16),
        ("ours", True, torch.bfloat16),
    ):
        model, layers = built(model_type, "all-linear", 0.0, is_lean=is_lean)
        model.to("cuda")
        for key, p in model.named_parameters():
            if "lora_" not in key:
                p.data = p.data.bfloat16().to(dtype)
        loss_of(model, "cuda").backward()
        runs[name] = {f"{n}.{k}": getattr(m, k).grad.float() for n, m in layers.items() for k in ("lora_A", "lora_B")}
    error = {key: [] for key in ("plain", "ours")}
    for name, exact in runs["exact"].items():
        for key, errors in error.items():
            errors.append(((runs[key][name] - exact).norm() / exact.norm()).item())
        assert error["ours"][-1] <= 3 * max(error["plain"][-1], 0.004), name  # one tensor is a small sample
    assert 0 < sum(error["ours"]) <= 2 * sum(error["plain"])


def test_what_has_arrived_is_remembered_by_nobody() -> None:
    """A collective's handle keeps its output alive; 180 gathered inputs would be kept until backward."""
    x = torch.zeros(2)
    waits = [(0, 2, lambda: None)]
    marks.let_arrive(x, waits)
    assert len(marks.arriving(x)) == 1 and waits == [] and marks.arriving(x) == []
