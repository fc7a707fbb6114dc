"""Adapter folders: what we write, PEFT reads as the same model, and what PEFT writes, we do."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from tiny import FAMILIES
from tiny_models import tiny_model
from torch import Tensor, nn

from lora_scale.adapters import peft, targets
from lora_scale.adapters.initial import load_factors
from lora_scale.adapters.lora import LoRALinear, adapt
from lora_scale.adapters.trained import restore
from lora_scale.spec.config import LoraConfig
from lora_scale.spec.errors import CheckpointError

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),  # transformers
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),  # PEFT; tested on purpose
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),  # PEFT, where Conv1D and Linear mix
]
IDS = torch.arange(2 * 9).view(2, 9) * 7 % 61


def config(**values) -> LoraConfig:
    return LoraConfig.model_validate({"r": 4, "lora_alpha": 6.0, **values})


def adapted_model(model_type: str, cfg: LoraConfig) -> tuple[nn.Module, dict[str, LoRALinear]]:
    model = tiny_model(model_type).eval()
    layers = adapt(model, cfg, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in layers.values():
            for factor in (layer.lora_A, layer.lora_B):
                factor.copy_(torch.randn(factor.shape, generator=generator) * 0.2)
    return model, layers


def factors(layers: dict[str, LoRALinear]) -> dict[str, Tensor]:
    return {f"{name}.{p}": getattr(layer, p) for name, layer in layers.items() for p in ("lora_A", "lora_B")}


def write(folder: Path, model_type: str, cfg: LoraConfig, dtype: str = "fp32") -> nn.Module:
    model, layers = adapted_model(model_type, cfg)
    folder.mkdir()
    peft.write_adapter(folder, factors(layers), peft.adapter_config(model, layers, cfg, "tiny"), dtype)
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS).logits


CONFIGS = {
    "default": config(),
    "all-linear, rslora": config(target_modules=("all-linear",), use_rslora=True),
    "patterns": config(
        target_modules=("q", "o", "mlp"),
        rank_pattern={r".*\.0\..*": 2},
        alpha_pattern={r".*\.1\..*": 30.0},
        init_A="gaussian",
    ),
}


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_peft_loads_our_folder_and_gives_our_logits(model_type: str, cfg: LoraConfig, tmp_path: Path) -> None:
    ours = logits(write(tmp_path / "adapter", model_type, cfg))
    base = logits(tiny_model(model_type).eval())
    theirs = logits(PeftModel.from_pretrained(tiny_model(model_type), tmp_path / "adapter").eval())
    assert (ours - base).abs().max() > 1e-2, "the adapter does nothing: the comparison would be empty"
    assert (ours - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("model_type", "targets", "written"),
    [
        ("llama", ("q", "v"), ["q_proj", "v_proj"]),
        ("llama", (r"re:.*layers\.1\..*q_proj",), ["1.self_attn.q_proj"]),
        ("llama", ("all-linear",), [*(f"{x}_proj" for x in "qkvo"), "gate_proj", "up_proj", "down_proj"]),
        ("gpt2", ("mlp",), ["c_fc", "mlp.c_proj"]),
        ("gpt2", ("o", "mlp"), ["c_proj", "c_fc"]),
        ("falcon", ("o",), ["dense"]),
    ],
)
def test_target_modules_are_short_and_exact(model_type: str, targets: tuple[str, ...], written: list[str]) -> None:
    cfg = config(target_modules=targets)
    model, layers = adapted_model(model_type, cfg)
    config_json = peft.adapter_config(model, layers, cfg, "tiny")
    assert config_json["target_modules"] == written
    for name, _ in tiny_model(model_type).named_modules():
        assert bool(check_target_module_exists(PeftConfig(target_modules=written), name)) == (name in layers)


def test_a_name_that_ends_another_name_is_written_as_an_expression() -> None:
    modules = ["a.b", "x.a.b", "c.b"]
    expression = targets.exact_suffixes(modules, ["a.b"])
    assert isinstance(expression, str)
    assert [name for name in modules if check_target_module_exists(PeftConfig(target_modules=expression), name)] == [
        "a.b"
    ]
    assert targets.exact_suffixes(modules, ["x.a.b"]) == ["x.a.b"]


PEFT_CONFIGS = {
    "new tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [9, 3]},
    "new tokens by name": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [60]}},
    "suffixes": {"target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
    "expression": {"target_modules": r".*layers\.1\..*(q|up)_proj", "use_rslora": True},
    "some layers": {"target_modules": ["down_proj"], "layers_to_transform": [1], "init_lora_weights": "gaussian"},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, "unused": 3},
        "alpha_pattern": {"mlp.*": 9},
    },
}


@pytest.mark.parametrize("values", PEFT_CONFIGS.values(), ids=PEFT_CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_we_read_what_peft_saved(values: dict, dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = get_peft_model(tiny_model("llama"), PeftConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **values)).eval()
    for layer in theirs.modules():
        if isinstance(layer, LoraLayer):
            for factor in (layer.lora_A, layer.lora_B):
                nn.init.normal_(factor["default"].weight.data, std=0.2)
                factor["default"].to(dtype).to(torch.float32)  # values that dtype holds
    for name, parameter in theirs.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data.normal_().copy_(parameter.to(dtype))
    expected = logits(theirs)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    theirs.save_pretrained(tmp_path)
    adapter = peft.read_adapter(tmp_path)
    assert all(factor.dtype == dtype for factor in adapter.factors.values())
    model = tiny_model("llama").eval()
    layers = adapt(model, adapter.lora_config(), seed=5)
    load_factors(layers, adapter)
    restore(model, adapter.others)
    assert len(layers) == sum(isinstance(layer, LoraLayer) for layer in theirs.modules())
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-6)
    assert adapter.max_rank == 4


def test_reading_what_we_wrote_gives_the_same_factors_and_config(tmp_path: Path) -> None:
    cfg = CONFIGS["patterns"]
    model = write(tmp_path / "a", "llama", cfg)
    adapter = peft.read_adapter(tmp_path / "a")
    written = factors({n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)})
    assert list(adapter.factors) == list(written)
    assert all(torch.equal(adapter.factors[name], written[name]) for name in written)
    again = adapter.lora_config()
    assert again == cfg.model_copy(update={"target_modules": adapter.modules})


@pytest.mark.parametrize(("dtype", "ulp"), [("bf16", 2**-8), ("fp16", 2**-11)])
def test_half_precision_rounds_each_value_once(dtype: str, ulp: float, tmp_path: Path) -> None:
    model = write(tmp_path / "a", "llama", config(), dtype)
    adapter = peft.read_adapter(tmp_path / "a")
    size = (tmp_path / "a" / peft.WEIGHTS_FILE).stat().st_size
    assert size < 2 * sum(f.numel() for f in adapter.factors.values()) + 2000
    for name, factor in adapter.factors.items():
        exact = model.get_parameter(name)
        assert factor.dtype == peft.DTYPES[dtype][1]
        assert torch.equal(factor, exact.to(factor.dtype))
        assert ((factor.float() - exact).abs() <= ulp * exact.abs() + 2**-25).all()


def test_a_value_too_large_for_fp16_is_an_error(tmp_path: Path) -> None:
    values = {"m.lora_A": torch.full((1, 2), 7e4), "m.lora_B": torch.ones(2, 1)}
    with pytest.raises(CheckpointError, match=r"m\.lora_A holds a value that is too large for fp16"):
        peft.write_adapter(tmp_path, values, {"r": 1}, "fp16")
    (other := tmp_path / "b").mkdir()
    values["m.lora_A"][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"m\.lora_A holds a value that is not finite"):
        peft.write_adapter(other, values, {"r": 1}, "bf16")


def test_files_say_nothing_of_this_machine(tmp_path: Path) -> None:
    write(tmp_path / "a", "llama", config())
    for file in (tmp_path / "a").iterdir():
        content = file.read_bytes()
        for secret in (os.fsencode(tmp_path), os.uname().nodename.encode(), os.fsencode(Path.home())):
            assert secret not in content, (file, secret)
    assert "/" not in (tmp_path / "a" / peft.CONFIG_FILE).read_text()


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("org/model-7b", "org/model-7b"),
        ("/data/someone/models/llama-7b/", "llama-7b"),
        ("./models/llama", "llama"),
        ("~/llama", "llama"),
        ("/home/someone/.cache/huggingface/hub/models--org--model-7b/snapshots/0123abc", "org/model-7b"),
    ],
)
def test_the_public_name_of_a_base_has_no_path(path: str, name: str) -> None:
    assert peft.public_name(path) == name


def test_the_public_name_of_a_folder_that_exists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert peft.public_name("models/llama") == "llama"
    monkeypatch.chdir("models/llama")
    assert peft.public_name(".") == "llama"


KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def _edit_config(folder: Path, **values) -> None:
    path = folder / peft.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / peft.WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / peft.WEIGHTS_FILE)


def _poison(tensors: dict[str, Tensor]) -> None:
    tensors[KEY][1, 2] = float("nan")


def _cut(folder: Path) -> None:
    path = folder / peft.WEIGHTS_FILE
    os.truncate(path, path.stat().st_size - 10)


DAMAGES = {
    "is no adapter: it has no adapter_config.json": lambda f: (f / peft.CONFIG_FILE).unlink(),
    "has no adapter_model.safetensors": lambda f: (f / peft.WEIGHTS_FILE).unlink(),
    "adapter_model.bin is a pickle and is not read": lambda f: (f / peft.WEIGHTS_FILE).rename(f / "adapter_model.bin"),
    "adapter_config.json cannot be read": lambda f: (f / peft.CONFIG_FILE).write_text("{"),
    "does not hold a JSON object": lambda f: (f / peft.CONFIG_FILE).write_text("[]"),
    "peft_type is 'IA3'": lambda f: _edit_config(f, peft_type="IA3"),
    "lora_magnitude_vector, and adapter_config.json says use_dora": lambda f: _edit_config(f, use_dora=True),
    "init_lora_weights is 'pissa'": lambda f: _edit_config(f, init_lora_weights="pissa"),
    "lacks lm_head, which adapter_config.json has in modules_to_save": lambda f: _edit_config(
        f, modules_to_save=["lm_head"]
    ),
    "has the rows of 0 tokens, and adapter_config.json names 2 in trainable_token_indices": lambda f: _edit_config(
        f, trainable_token_indices=[3, 5]
    ),
    "trainable_token_indices is [3, 3]; only ids": lambda f: _edit_config(f, trainable_token_indices=[3, 3]),
    "only ids of the input embedding, each once, are read": lambda f: _edit_config(
        f, trainable_token_indices={"embed_tokens": [3], "lm_head": [4]}
    ),
    "a_variant_of_tomorrow is 3": lambda f: _edit_config(f, a_variant_of_tomorrow=3),
    "r is None; it must be a positive number": lambda f: _edit_config(f, r=None),
    "lora_alpha is 0": lambda f: _edit_config(f, lora_alpha=0),
    "rank_pattern has '('": lambda f: _edit_config(f, rank_pattern={"(": 3}),
    "rank_pattern is ['q']": lambda f: _edit_config(f, rank_pattern=["q"]),
    "is truncated": _cut,
    f"{KEY} holds a value that is not finite": lambda f: _edit_tensors(f, _poison),
    f"{KEY.replace('lora_A', 'lora_B')} is there but {KEY} is not": lambda f: _edit_tensors(f, lambda t: t.pop(KEY)),
    "has shape (3, 32), but adapter_config.json gives model.layers.0.self_attn.q_proj r = 4": lambda f: _edit_tensors(
        f, lambda t: t.update({KEY: torch.ones(3, 32)})
    ),
    "lora_magnitude_vector is no factor": lambda f: _edit_tensors(
        f, lambda t: t.update({KEY.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(3)})
    ),
    "is I64; only F32, BF16 and F16 are read": lambda f: _edit_tensors(
        f, lambda t: t.update({KEY: torch.ones(4, 32, dtype=torch.int64)})
    ),
    "holds no tensors": lambda f: _edit_tensors(f, dict.clear),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "whole"
    write(folder, "llama", config())
    return folder


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_or_foreign_adapter_is_refused_in_one_line(message: str, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "a")
    DAMAGES[message](tmp_path / "a")
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        peft.read_adapter(tmp_path / "a")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ("q",)}, "has factors for what is no adapted layer here: model.layers.0.self_attn.v_proj"),
        ({"target_modules": ("q", "k", "v")}, "the adapter lacks model.layers.0.self_attn.k_proj (2 missing, 0 unexp"),
        ({"r": 3}, "lora_A is (4, 32), this model's (3, 32)"),
    ],
)
def test_an_adapter_of_another_shape_does_not_load(changes: dict, message: str, whole: Path) -> None:
    _, layers = adapted_model("llama", config(**changes))
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_factors(layers, peft.read_adapter(whole))
