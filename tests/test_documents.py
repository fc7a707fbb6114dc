"""`model.attention: documents` against transformers' masks: the function, every family, generation, the plan."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_folder
from torch import Tensor
from transformers import AutoModelForCausalLM

from lora_scale.parallel import documents, flash3
from lora_scale.spec.config import RunConfig
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.families import WITHOUT_MASKS
from lora_scale.spec.planning import assumed_work, with_attention
from lora_scale.spec.shapes import architecture
from lora_scale.storage.folder import open_folder

LENGTHS = ((5, 9, 1, 17), (32,), (31, 1))  # of the documents in each row
CPU = torch.device("cpu")


def positions(lengths: tuple[tuple[int, ...], ...] = LENGTHS) -> np.ndarray:
    return np.stack([np.concatenate([np.arange(n) for n in row]) for row in lengths])


def heads(device: torch.device = CPU, dtype: torch.dtype = torch.float32, features: int = 8) -> tuple[Tensor, ...]:
    """Queries, keys and values; fewer heads of keys."""
    draw = torch.Generator().manual_seed(0)
    sizes = (4, 2, 2)
    made = (torch.randn(len(LENGTHS), n, 32, features, generator=draw) for n in sizes)
    return tuple(t.to(device, dtype).requires_grad_() for t in made)


def masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: int | None,
    scaling: float | None,
    lengths: tuple[tuple[int, ...], ...] = LENGTHS,
) -> Tensor:
    """The same with a mask, all heads of keys written out."""
    place = torch.as_tensor(positions(lengths))
    number = (place == 0).cumsum(1)
    age = torch.arange(32)[:, None] - torch.arange(32)
    seen = (number[:, :, None] == number[:, None]) & (age >= 0) & (age < (window or 99))
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    mask = seen[:, None].to(query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling).transpose(1, 2)


def results(function: Any, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Output and gradients."""
    out = function(*inputs)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


@pytest.mark.parametrize("window", [None, 6, 40])
@pytest.mark.parametrize("scaling", [None, 0.3])
def test_equal_to_a_mask(window: int | None, scaling: float | None) -> None:
    documents.tell(positions(), CPU)
    found = results(
        lambda *t: documents.attention(torch.nn.Module(), *t, None, scaling=scaling, sliding_window=window)[0], heads()
    )
    wanted = results(lambda *t: masked(*t, window, scaling), heads())
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_another_batch_than_was_told_is_an_error() -> None:
    documents.tell(positions(((32,),)), CPU)
    with pytest.raises(AssertionError, match="told of another batch"):
        documents.attention(torch.nn.Module(), *heads(), None)


@pytest.mark.parametrize("kind", WITHOUT_MASKS)
def test_every_family_gives_the_logits_it_gives_with_masks(kind: str, tmp_path: Path) -> None:
    """Mistral's and Phi-3's window is narrower than the longest document."""
    changes = {"sliding_window": 6} if kind in ("mistral", "phi3") else {}
    folder = tiny_folder(tmp_path / "model", kind, **changes)
    place = torch.as_tensor(positions())
    ids = torch.randint(3, 90, place.shape, generator=torch.Generator().manual_seed(0))
    logits = {}
    for name in ("sdpa", documents.prepare()):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=name)
        documents.tell(place.numpy(), CPU)
        with torch.no_grad():
            logits[name] = model(input_ids=ids, position_ids=place, use_cache=False).logits
    torch.testing.assert_close(logits["sdpa"], logits[documents.NAME], rtol=1e-5, atol=1e-5)


def test_generation_has_its_masks(tmp_path: Path) -> None:
    """Rows padded on the left, and kept keys."""
    folder = tiny_folder(tmp_path / "model")
    ids = torch.tensor([[2, 2, 2, 5, 7], [3, 9, 4, 8, 6]])
    mask = torch.tensor([[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    found = {}
    for name in ("sdpa", documents.prepare()):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=name)
        with documents.with_masks(model):
            found[name] = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        assert model.config._attn_implementation == name, "as it was"
    assert torch.equal(found["sdpa"], found[documents.NAME])


def test_a_family_with_more_to_its_attention_is_refused() -> None:
    """By `plan` as by `train`."""
    tree = {"model": {"path": "-", "attention": "documents"}, "data": {"train": "-"}, "run_dir": "-"}
    cfg = RunConfig.model_validate(tree | {"train": {"max_steps": 1}})
    with pytest.raises(
        ConfigError, match=r"is documents, which is not known to be .* 'gemma2'.* Set model.attention=auto"
    ):
        with_attention(cfg, "gemma2", on_gpus=True)


def test_the_plan_has_no_mask(tmp_path: Path) -> None:
    model = architecture(open_folder(tiny_folder(tmp_path / "model")).config)
    tree = {"data": {"train": "-"}, "run_dir": "-", "train": {"max_steps": 1}}
    for attention, wanted in (("sdpa", True), ("documents", False), ("auto", False)):
        cfg = RunConfig.model_validate({"model": {"path": "-", "attention": attention}, **tree})
        assert assumed_work(model, cfg).masked is wanted


@pytest.mark.parametrize(
    ("asked", "model_type", "on_gpus", "settled"),
    [
        ("auto", "llama", True, "documents"),
        ("auto", "llama", False, "sdpa"),
        ("auto", "gemma2", True, "sdpa"),
        ("sdpa", "llama", True, "sdpa"),
    ],
)
def test_auto_is_documents_on_gpus(asked: str, model_type: str, on_gpus: bool, settled: str) -> None:
    tree = {"data": {"train": "-"}, "run_dir": "-", "train": {"max_steps": 1}}
    cfg = RunConfig.model_validate({"model": {"path": "-", "attention": asked}, **tree})
    assert with_attention(cfg, model_type, on_gpus).model.attention == settled


@pytest.fixture
def flash3_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Operators in the place of FlashAttention-3's, in fp32 without a kernel; the words of each call."""
    seen: list[dict[str, Any]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, how: dict[str, Any]) -> Tensor:
        seen.append(how)
        assert how["is_causal"] and how.get("max_seqlen_q") in (None, 32)
        cuts = how.get("cu_seqlens_q")
        rows = [(q, k, v)] if cuts is None else [[t[a:b][None] for t in (q, k, v)] for a, b in pairwise(cuts.tolist())]
        found = []
        for row in rows:
            one, two, three = (t.float().transpose(1, 2) for t in row)
            age = torch.arange(one.shape[2])[:, None] - torch.arange(one.shape[2])
            left = how["window_size_left"]
            mask = (age >= 0) & (age <= (left if left >= 0 else 99))
            out = F.scaled_dot_product_attention(
                one, two, three, attn_mask=mask, scale=how["softmax_scale"], enable_gqa=True
            )
            found.append(out.transpose(1, 2).to(q.dtype))
        return found[0] if cuts is None else torch.cat(found, 1)[0]

    def forward(q: Tensor, k: Tensor, v: Tensor, *, num_splits: int, **how: Any) -> tuple[Tensor, ...]:
        return attend(q, k, v, how), q.new_zeros(1), q.new_zeros(1), q.new_zeros(1)

    def backward(
        dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, **how: Any
    ) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        with torch.enable_grad():
            return torch.autograd.grad(attend(*leaves, how), leaves, dout)

    monkeypatch.setattr(torch.ops, "flash_attn_3", SimpleNamespace(fwd=forward, bwd=backward), raising=False)
    monkeypatch.setattr(flash3, "found", lambda _: "this test")
    return seen


@pytest.mark.parametrize("lengths", [LENGTHS, ((32,),) * 3])
@pytest.mark.parametrize("window", [None, 6])
def test_flash_attention_3_is_told_the_documents(
    lengths: tuple[tuple[int, ...], ...], window: int | None, flash3_on_cpu: list[dict[str, Any]]
) -> None:
    """What is given to it, and the gradient's way back; the kernel itself only on a GPU."""
    documents.tell(positions(lengths), CPU)
    if not documents._told[0].is_whole:
        ends = [0, 5, 14, 15, 32, 64, 95, 96]
        documents._told[0] = replace(documents._told[0], cuts=torch.tensor(ends, dtype=torch.int32))
    call: Any = lambda *t: documents.attention(torch.nn.Module(), *t, None, scaling=0.3, sliding_window=window)[0]  # noqa: E731
    rough = heads(dtype=torch.bfloat16)
    found = results(call, rough)
    assert len(flash3_on_cpu) == 2, "not another kernel"
    wanted = results(
        lambda *t: masked(*t, window, 0.3, lengths), tuple(t.detach().float().requires_grad_() for t in rough)
    )
    for ours, true in zip(found, wanted, strict=True):
        assert (ours.float() - true).norm() <= 2**-8 * true.norm(), "rounded to bf16"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "documents, by FlashAttention-3 of this test"),
        ({"precision": "fp32"}, "documents, by torch"),
        ({"model": {"path": "-", "attention": "documents", "dropout": 0.1}}, "documents, by torch"),
        ({"model": {"path": "-", "attention": "sdpa"}}, "sdpa"),
    ],
)
def test_the_manifest_says_what_computes(
    changes: dict[str, Any], said: str, flash3_on_cpu: list[dict[str, Any]]
) -> None:
    tree = {"model": {"path": "-", "attention": "documents"}, "data": {"train": "-"}, "run_dir": "-"}
    cfg = RunConfig.model_validate(tree | {"train": {"max_steps": 1}} | changes)
    assert documents.kernel(cfg, CPU) == said


@pytest.mark.parametrize(
    ("features", "dtype", "dropout"), [(4, torch.bfloat16, 0.0), (8, torch.float32, 0.0), (8, torch.bfloat16, 0.5)]
)
def test_what_flash_attention_3_does_not_take(
    features: int, dtype: torch.dtype, dropout: float, flash3_on_cpu: list[dict[str, Any]]
) -> None:
    documents.tell(positions(((32,),) * 3), CPU)
    documents.attention(torch.nn.Module(), *heads(CPU, dtype, features), None, dropout=dropout)
    assert not flash3_on_cpu


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["torch", "flash3"])
@pytest.mark.parametrize("window", [None, 6])
def test_kernels_are_as_near_to_fp32_as_a_mask(
    window: int | None, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bf16, by the ratio rule: errors against fp32 are at most twice those of masked attention."""
    device = torch.device("cuda", 0)
    if kernel == "torch":
        monkeypatch.setattr(flash3, "found", lambda _: None)
    elif not flash3.found(device):
        pytest.skip("no FlashAttention-3 here")
    documents.tell(positions(), device)
    ours = results(
        lambda *t: documents.attention(torch.nn.Module(), *t, None, sliding_window=window)[0],
        heads(device, torch.bfloat16, 64),
    )
    plain = results(lambda *t: masked(*t, window, None), heads(device, torch.bfloat16, 64))
    exact = results(
        lambda *t: masked(*t, window, None),
        tuple(t.detach().float().requires_grad_() for t in heads(device, torch.bfloat16, 64)),
    )
    for one, other, true in zip(ours, plain, exact, strict=True):
        assert (one.float() - true).norm() <= 2 * (other.float() - true).norm()
