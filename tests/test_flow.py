"""Sums in products and the end of gradients change no result, and do less."""

from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn

from lora_scale.adapters import frozen, lean, products
from lora_scale.adapters.frozen import FrozenLinear, freeze_linears
from lora_scale.adapters.lora import LoRALinear, adapt
from lora_scale.parallel import flow, recompute
from lora_scale.spec.config import RunConfig

IDS = torch.arange(2 * 16).view(2, 16) * 7 % 61


def config(**lora: Any) -> RunConfig:
    tree = {
        "model": {"path": "x"},
        "data": {"train": "x", "seq_len": 16},
        "run_dir": "x",
        "lora": {"r": 4, **lora},
        "train": {"max_steps": 1, "micro_batch_size": 1, "global_batch_size": 1},
    }
    return RunConfig.model_validate(tree)


def built(model_type: str, cfg: RunConfig, *, is_arranged: bool) -> tuple[nn.Module, dict[str, LoRALinear]]:
    model = tiny_model(model_type)
    if is_arranged:
        lean.make_lean(model)
    layers = adapt(model, cfg.lora, 0)
    freeze_linears(model)
    if is_arranged:
        flow.arrange(model, cfg, recompute.decoder_layers(model))
    with torch.no_grad():
        for number, layer in enumerate(layers.values()):
            layer.lora_B.normal_(std=0.2, generator=torch.Generator().manual_seed(number))
    return model.train(), layers


def learned(model: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def adders(model: nn.Module) -> list[Any]:
    return [getattr(layer, "adders", None) for layer in recompute.decoder_layers(model)]


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("targets", [["q", "v"], ["all-linear"], ["k", "o"]])
@pytest.mark.parametrize("model_type", lean.OFFSETS)
def test_losses_and_gradients_are_those_of_transformers_modules(
    model_type: str, targets: list[str], recomputes: bool
) -> None:
    cfg = config(target_modules=targets)
    plain, ours = (built(model_type, cfg, is_arranged=is_arranged)[0] for is_arranged in (False, True))
    if recomputes:
        recompute.apply(ours, "all")
    assert all(adders(ours)) is (model_type in lean.SUMMED) and not any(adders(plain))
    (loss, gradients), (our_loss, our_gradients) = learned(plain), learned(ours)
    torch.testing.assert_close(our_loss, loss, rtol=1e-6, atol=0)
    assert our_gradients.keys() == gradients.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            our_gradients[name], gradient, rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )
    with torch.no_grad():
        kept = {"use_cache": False}
        torch.testing.assert_close(ours(IDS, **kept).logits, plain(IDS, **kept).logits, rtol=1e-5, atol=1e-6)


def test_what_is_told_to_be_added_is_added_once() -> None:
    model, _ = built("llama", config(), is_arranged=True)
    learned(model)
    assert all(m.added is None for m in model.modules() if isinstance(m, FrozenLinear))


@pytest.mark.parametrize("lora", [{"use_dora": True, "target_modules": ["q", "o"]}, {"modules_to_save": ["down_proj"]}])
def test_a_layer_that_reads_its_own_product_adds_nothing(lora: dict[str, Any]) -> None:
    model, _ = built("llama", config(**lora), is_arranged=True)
    if "modules_to_save" in lora:
        for layer in recompute.decoder_layers(model):  # as `adapters.trained` leaves it
            assert type(layer.mlp.down_proj) is FrozenLinear
            layer.mlp.down_proj.__class__ = nn.Linear
            layer.adders = None
        flow._let_products_add(recompute.decoder_layers(model))
    assert not any(adders(model))


def test_the_first_layers_attention_has_no_gradient_for_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of all matrices of the backward pass, in how many products ever: without the first layer's q, k and v and
    what their adapters add. Not where something trains before it."""

    def rows(**lora: Any) -> int:
        seen: list[int] = []
        model, _ = built("llama", config(target_modules=["q", "v"], **lora), is_arranged=True)
        forward = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        original_mm, original_add = products.mm, products.add_mm
        with monkeypatch.context() as patched:
            patched.setattr(products, "mm", lambda *a: seen.append(len(a[1])) or original_mm(*a))
            patched.setattr(products, "add_mm", lambda *a: seen.append(len(a[2])) or original_add(*a))
            forward.backward()
        return sum(seen)

    assert frozen.products is products
    assert rows(trainable_token_indices=[3]) - rows() == 32 + 16 + 16 + 2 * 4
