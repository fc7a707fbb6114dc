"""Each row of spec.families is held to transformers itself: names, fused experts, tensor-parallel plan, packing."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tiny_models import TINY, tiny_config, tiny_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_scale.spec import families
from lora_scale.spec.families import FAMILIES, has_suffix

EVERY_FAMILY = pytest.mark.parametrize("model_type", FAMILIES)
STYLES = {
    "colwise": "colwise",
    "packed_colwise": "colwise",
    "colwise_gather_output": "colwise",  # transformers cannot cut a fused matrix part by part; we do
    "rowwise": "rowwise",
    "rowwise_split_input": "rowwise",
    "replicated_with_grad_allreduce": "grad_summed",
}
NOT_A_LAYER = {"embedding_rowwise", "moe_tp_experts"}  # how an embedding and a block are wrapped
OURS_ALONE = {"gpt2", "falcon"}  # transformers has no plan for them


def test_every_family_has_a_tiny_model() -> None:
    assert set(TINY) == set(FAMILIES)


@EVERY_FAMILY
def test_every_role_names_linear_layers_and_together_they_are_all(model_type: str) -> None:
    model = tiny_model(model_type, device="meta")
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    named = set()
    for role, suffixes in families.roles(model_type).items():
        for suffix in suffixes:
            found = {name for name, _ in model.named_modules() if has_suffix(name, (suffix,))}
            assert found, f"{role} says {suffix}, which no module of {model_type} is called"
            assert found <= linears, f"{role} says {suffix}, but {found - linears} are no linear layers"
            named |= found
    assert linears - named == {"lm_head"}, "a linear layer without a role"


@EVERY_FAMILY
def test_mlp_and_attention_roles_are_disjoint(model_type: str) -> None:
    roles = dict(families.roles(model_type))
    mlp = roles.pop("mlp", ())
    for name, _ in tiny_model(model_type, device="meta").named_modules():
        attention = [role for role, suffixes in roles.items() if has_suffix(name, suffixes)]
        assert not (attention and has_suffix(name, mlp)), f"{name} is mlp and {attention}"
        assert attention in ([], ["q"], ["k"], ["v"], ["o"], ["q", "k", "v"]), f"{name} is {attention}"


@EVERY_FAMILY
def test_tensor_parallel_row_agrees_with_transformers(model_type: str) -> None:
    row = FAMILIES[model_type]
    plan = tiny_config(model_type).base_model_tp_plan or {}
    if model_type in OURS_ALONE:
        assert not plan, "transformers has a plan now: hold the row to it"
        return
    theirs: dict[str, set[str]] = {"colwise": set(), "rowwise": set(), "grad_summed": set()}
    for pattern, style in plan.items():
        if style not in NOT_A_LAYER and not pattern.endswith(tuple(row.packed)):
            theirs[STYLES[style]].add(pattern.rsplit(".")[-1])
    for style, names in theirs.items():
        assert {suffix.rsplit(".")[-1] for suffix in getattr(row, style)} == names, style


@EVERY_FAMILY
def test_files_hold_what_file_tensors_names(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    row, n_experts = (
        FAMILIES[model_type],
        TINY[model_type].get("num_experts", TINY[model_type].get("num_local_experts", 0)),
    )
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        unclaimed = set(file.keys())
        for name, parameter in model.named_parameters():
            sources = row.file_tensors(name, n_experts)
            assert len(sources) == 1 or "experts" in name
            unclaimed -= set(sources)
            end_to_end = torch.cat([file.get_tensor(source).flatten() for source in sources])
            assert torch.equal(end_to_end, parameter.detach().flatten()), f"{name} is not {sources} end to end"
    assert not unclaimed


def packed_difference(model_type: str, attention: str, **changes: object) -> float:
    """The largest difference of logits, documents in one block against each alone, as a share of the logits' size."""
    model = tiny_model(model_type, attention=attention, **changes)
    lengths = [[5, 7, 4], [1, 9, 6]]
    ids = torch.randint(3, 64, (2, 16), generator=torch.Generator().manual_seed(1))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    # No attention mask and no cache: with either, transformers does not look at position_ids for documents.
    with torch.no_grad():
        packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        apart = [
            model(input_ids=document[None], position_ids=torch.arange(len(document))[None], use_cache=False).logits[0]
            for row, sizes in zip(ids, lengths, strict=True)
            for document in row.split(sizes)
        ]
    reference = torch.cat(apart).view_as(packed)
    return ((packed - reference).abs().max() / reference.abs().max()).item()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@EVERY_FAMILY
def test_packs_says_whether_documents_stay_apart(model_type: str, attention: str) -> None:
    try:
        difference = packed_difference(model_type, attention)
    except ValueError as error:  # transformers has no such attention for this family
        assert "does not support an attention implementation" in str(error)
        assert attention == "sdpa"
        return
    if FAMILIES[model_type].packs:
        assert difference < 1e-5  # fp32 rounding; a token of another document moves logits by more than a hundredth
    else:
        assert difference > 1e-2, "documents stay apart after all: set packs=True"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text", "phi3"])
def test_packing_holds_with_a_sliding_window_shorter_than_the_documents(model_type: str, attention: str) -> None:
    assert packed_difference(model_type, attention, sliding_window=3) < 1e-5
    with_window = tiny_model(model_type, attention=attention, sliding_window=3)
    without = tiny_model(model_type, attention=attention, sliding_window=64)
    ids = torch.arange(3, 19)[None]
    assert not torch.allclose(with_window(ids).logits, without(ids).logits), "the window has no effect: proves nothing"


def test_unknown_family_has_no_row_and_no_roles() -> None:
    assert families.family("mamba") is None
    assert families.roles("mamba") == {}


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("transformer.h.0.attn.c_proj", True),
        ("attn.c_proj", True),
        ("transformer.h.0.mlp.c_proj", False),
        ("transformer.h.0.crossattn.c_proj", False),
    ],
)
def test_suffixes_begin_at_a_dot(module: str, expected: bool) -> None:
    assert has_suffix(module, ("attn.c_proj",)) is expected
