"""`init_adapter`: what a run may start from, and what it refuses. Training on from there: test_equality, interop."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_merge import logits, peft_model, write_adapter
from tiny import tiny_folder
from torch import nn
from training import config, write_rows
from transformers import AutoModelForCausalLM

from lora_scale.adapters import initial, peft, trained
from lora_scale.adapters.lora import adapt
from lora_scale.parallel import setup
from lora_scale.spec.config import LoraConfig, RunConfig
from lora_scale.spec.errors import CheckpointError
from lora_scale.storage.folder import fingerprint, open_folder

TARGETS = ["q", "k", "v", "o"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "mine", base, target_modules=TARGETS)


def run_config(base: Path, adapter: Path, folder: Path, **changes: object) -> RunConfig:
    rows = write_rows(folder / "rows.jsonl")
    return RunConfig.model_validate(
        config(base, rows, folder / "run", init_adapter=str(adapter), lora__lora_alpha=6.0, **changes)
    )


def test_the_model_has_the_adapters_factors(base: Path, adapter: Path, tmp_path: Path) -> None:
    cfg = run_config(base, adapter, tmp_path)
    folder = open_folder(base)
    start = setup.find_init_adapter(cfg, folder, fingerprint(folder))
    model, _, notes = setup.build_model(cfg, folder, start)
    factors = peft.read_adapter(adapter).factors
    values = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert values.keys() == factors.keys()
    assert all(torch.equal(values[name], factors[name]) for name in factors)
    assert notes[-1] == f"starts from the factors of {adapter}"


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 3}, "lora_A is (4, 32), this model's (3, 32)"),
        ({"lora_alpha": 8.0}, "the adapter scales model.layers.0.self_attn.q_proj by 1.5, this run by 2"),
        ({"use_rslora": True}, "by 1.5, this run by 3"),
        ({"target_modules": ["q", "v"]}, "has factors for what is no adapted layer here"),
        ({"target_modules": ["all-linear"]}, "the adapter lacks model.layers.0.mlp.down_proj"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_with_the_section_that_does(
    lora: dict, message: str, base: Path, adapter: Path
) -> None:
    cfg = LoraConfig.model_validate({"r": 4, "lora_alpha": 6.0, "target_modules": TARGETS} | lora)
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(CheckpointError) as caught:
        initial.start_from(adapter, model, adapt(model, cfg, seed=0))
    assert message in str(caught.value) and str(caught.value).endswith(
        "it was made with lora.r=4 lora.lora_alpha=6 lora.target_modules=[q_proj,k_proj,v_proj,o_proj]"
    )


BRINGS = {
    "use_dora": True,
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [9, 3],
    "target_modules": ["q_proj", "v_proj"],
}


@pytest.fixture(scope="module")
def richer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, nn.Module]:
    """A base with biases, and an adapter of all variants that PEFT has saved, with its model."""
    base = tiny_folder(tmp_path_factory.mktemp("models") / "qwen2", "qwen2", torch.float32, tie_word_embeddings=False)
    saved = tmp_path_factory.mktemp("adapters") / "theirs"
    return base, saved, peft_model(base, saved, BRINGS)


def start_from(base: Path, adapter: Path, lora: dict[str, Any]) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    cfg = LoraConfig.model_validate({"r": 4, "lora_alpha": 6.0} | lora)
    layers = adapt(model, cfg, seed=0)
    trained.mark(model, cfg, layers)
    initial.start_from(adapter, model, layers)
    return model


def test_what_peft_saved_beside_factors_is_all_there(richer: tuple[Path, Path, nn.Module]) -> None:
    """`brought` names and holds what waits for the base; with it the function is PEFT's."""
    base, saved, theirs = richer
    model = start_from(base, saved, BRINGS)
    trained.restore(model, initial.brought(saved))
    wanted = logits(theirs)
    assert (logits(model) - wanted).abs().max() <= 1e-5 * wanted.abs().max()  # fp32 sums in another order


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"use_dora": False}, "q_proj.lora_magnitude_vector, which does not train here"),
        ({"bias": "none"}, ".bias, which does not train here"),
        ({"modules_to_save": []}, "the adapter brings lm_head.weight, which does not train here"),
        (
            {"modules_to_save": ["lm_head", "down_proj"]},
            "down_proj.weight (32, 48) trains here, and the adapter lacks it",
        ),
        ({"trainable_token_indices": [9, 3, 4]}, "(3, 32) trains here, and the adapter has it as (2, 32)"),
        ({"trainable_token_indices": [3, 9]}, "the adapter has rows of the tokens [9, 3], this run of [3, 9]"),
    ],
)
def test_other_parts_are_refused_with_the_section_that_fits(
    lora: dict, message: str, richer: tuple[Path, Path, nn.Module]
) -> None:
    base, saved, _ = richer
    with pytest.raises(CheckpointError) as caught:
        start_from(base, saved, BRINGS | lora)
    assert message in str(caught.value) and str(caught.value).endswith(
        "lora.use_dora=true lora.bias=all lora.modules_to_save=[lm_head] lora.trainable_token_indices=[9,3]"
    )


def test_another_base_is_refused_unless_allowed(adapter: Path, tmp_path: Path) -> None:
    other = open_folder(tiny_folder(tmp_path / "other", dtype=torch.float32))
    cfg = run_config(other.path, adapter, tmp_path)
    with pytest.raises(CheckpointError, match=r"set model\.path to that base, or allow_other_base=true"):
        setup.find_init_adapter(cfg, other, fingerprint(other))
    allowed = run_config(other.path, adapter, tmp_path, allow_other_base=True)
    assert setup.find_init_adapter(allowed, other, fingerprint(other)) == adapter


def test_full_fine_tuning_has_no_init_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="but method is full; leave one out"):
        run_config(base, adapter, tmp_path, method="full")
