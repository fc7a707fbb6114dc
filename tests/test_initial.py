"""`init_adapter`: what a run may start from, and what it refuses. Training on from there: test_equality, interop."""

from pathlib import Path

import pytest
import torch
from test_merge import write_adapter
from tiny import tiny_folder
from training import config, write_rows
from transformers import AutoModelForCausalLM

from lora_scale.adapters import initial, peft
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
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == factors.keys()
    assert all(torch.equal(trained[name], factors[name]) for name in factors)
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
    layers = adapt(AutoModelForCausalLM.from_pretrained(base), cfg, seed=0)
    with pytest.raises(CheckpointError) as caught:
        initial.start_from(adapter, layers)
    assert message in str(caught.value) and str(caught.value).endswith(
        "it was made with lora.r=4 lora.lora_alpha=6 lora.target_modules=[q_proj,k_proj,v_proj,o_proj]"
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
