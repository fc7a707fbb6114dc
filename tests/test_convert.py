"""`lora-scale convert`: PEFT computes what loralib's own layers do, and what does not fit is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import loralib_layers as record
import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from test_encoders import folder_of
from test_extract import FP32, call
from test_merge import logits, plain
from tiny import tiny_folder
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lora_scale.adapters import peft
from lora_scale.storage.folder import fingerprint, open_folder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),  # transformers
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),  # PEFT, where Conv1D and Linear mix
]
QV = [True, False, True]


def merged(r: int = 4, alpha: int = 32, enable: list[bool] = QV) -> Callable[[int, int, bool], nn.Module]:
    return lambda n_in, n_out, conv: record.MergedLinear(n_in, n_out, r, alpha, enable, fan_in_fan_out=conv)


def linear(r: int = 4, alpha: int = 32) -> Callable[[int, int, bool], nn.Module]:
    return lambda n_in, n_out, conv: record.Linear(n_in, n_out, r, alpha, fan_in_fan_out=conv)


def with_loralib(model: nn.Module, kinds: dict[str, Callable[[int, int, bool], nn.Module]]) -> nn.Module:
    """Layers that end so are loralib's, with the base's weights in the base's layout, and random factors."""
    draw = torch.Generator().manual_seed(1)
    for name, old in list(model.named_modules()):
        if make := next((make for end, make in kinds.items() if name.endswith(end)), None):
            is_conv = type(old).__name__ == "Conv1D"
            rows, columns = old.weight.shape
            new = make(*((rows, columns) if is_conv else (columns, rows)), is_conv)
            assert new.weight.shape == old.weight.shape
            new.weight.data, new.bias = old.weight.data, old.bias
            for factor in (new.lora_A, new.lora_B):
                factor.data = torch.randn(factor.shape, generator=draw) * 0.2
            model.set_submodule(name, new)
    return model.eval()


CASES: dict[str, tuple[str, dict[str, Any], tuple[object, ...]]] = {
    "GPT-2, q and v of c_attn": ("gpt2", {"attn.c_attn": merged()}, ("--enable", "q,v")),
    "GPT-2, by number, in another order": ("gpt2", {"attn.c_attn": merged()}, ("--enable", "2,0")),
    "GPT-2, k alone": ("gpt2", {"attn.c_attn": merged(enable=[False, True, False])}, ("--enable", "k")),
    "GPT-2, q, k and v, and plain layers beside": (
        "gpt2", {"attn.c_attn": merged(2, enable=[True] * 3), "mlp.c_fc": linear(), "attn.c_proj": linear(3)}, (),
    ),
    "Llama": ("llama", {"q_proj": linear(), "v_proj": linear(), "down_proj": linear(2)}, ()),
    "GPT-NeoX, whose parts are no q, k and v": ("gpt_neox", {"query_key_value": merged()}, ("--enable", "0,2")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_what_loralib_does(case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    kind, layers, options = CASES[case]
    base = tiny_folder(tmp_path / "base", kind, dtype=torch.float32)
    theirs = with_loralib(plain(base), layers)
    torch.save(record.lora_state_dict(theirs), tmp_path / "lora.pt")
    arguments = (tmp_path / "lora.pt", "--base", base, "--alpha", 32, *options, "--out", tmp_path / "out")
    code, said, err = call(capfd, *arguments, verb="convert")
    assert (code, err) == (0, "") and "use it" in said
    wanted, before = logits(theirs), logits(plain(base))
    assert (wanted - before).abs().max() > 1e-2 * before.abs().max()
    ours = logits(PeftModel.from_pretrained(plain(base), tmp_path / "out"))
    assert (ours - wanted).abs().max() <= FP32 * wanted.abs().max()
    adapter = peft.read_adapter(tmp_path / "out")
    for name in adapter.modules:
        layer = theirs.get_submodule(name)
        update = adapter.factors[f"{name}.lora_B"] @ adapter.factors[f"{name}.lora_A"]
        if isinstance(layer, record.MergedLinear):
            delta = layer.merge_AB()
            delta = delta.T if layer.fan_in_fan_out else delta
        else:
            delta = layer.lora_B @ layer.lora_A
        torch.testing.assert_close(update, delta, rtol=FP32, atol=1e-7)
        assert adapter.scaling(name) == layer.scaling
    assert peft.base_fingerprint(tmp_path / "out") == fingerprint(open_folder(base))
    assert str(tmp_path) not in "".join(file.read_text() for file in (tmp_path / "out").glob("*.[jm]*"))
    assert not call(capfd, tmp_path / "out", "--base", base, "--out", tmp_path / "merged", "--check", verb="merge")[0]
    assert (logits(plain(tmp_path / "merged")) - wanted).abs().max() <= FP32 * wanted.abs().max()


def test_the_record_is_loralib() -> None:
    """The layers of these tests against the package, in every layout."""
    lora = pytest.importorskip("loralib")
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(5, 12, generator=draw)
    for conv in (True, False):
        for name, more in (("Linear", {}), ("MergedLinear", {"enable_lora": QV})):
            ours = getattr(record, name)(12, 24, r=2, lora_alpha=6, fan_in_fan_out=conv, **more)
            theirs = getattr(lora, name)(12, 24, r=2, lora_alpha=6, fan_in_fan_out=conv, merge_weights=False, **more)
            with torch.no_grad():
                for parameter in theirs.parameters():
                    parameter.normal_(generator=draw)
            ours.load_state_dict(theirs.state_dict())
            assert torch.equal(ours(x), theirs(x))
            for bias in ("none", "all", "lora_only"):
                one, other = record.lora_state_dict(ours, bias), lora.lora_state_dict(theirs, bias)
                assert list(one) == list(other)


@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_biases_go_along(bias: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Also the masks that loralib takes for biases, which are passed over, and names as a wrapper has them."""
    base = tiny_folder(tmp_path / "base", "gpt2", dtype=torch.float32)
    theirs = with_loralib(plain(base), {"attn.c_attn": merged()})
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias") and (bias == "all" or "c_attn" in name):
                parameter += 0.1
    state = {f"module.{name}": value for name, value in record.lora_state_dict(theirs, bias).items()}
    state["module.transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    torch.save({"model_state_dict": state}, tmp_path / "lora.pt")
    arguments = (tmp_path / "lora.pt", "--base", base, "--alpha", 32, "--enable", "q,v", "--out", tmp_path / "out")
    code, said, err = call(capfd, *arguments, verb="convert")
    assert (code, err) == (0, "") and "skipped  1 masks" in said and "attn.c_attn.bias x2, whole" in said
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["bias"] == bias
    wanted = logits(theirs)
    ours = logits(PeftModel.from_pretrained(plain(base), tmp_path / "out"))
    assert (ours - wanted).abs().max() <= FP32 * wanted.abs().max()
    assert not call(capfd, tmp_path / "out", "--base", base, "--out", tmp_path / "merged", verb="merge")[0]
    assert (logits(plain(tmp_path / "merged")) - wanted).abs().max() <= FP32 * wanted.abs().max()


@torch.no_grad()
def test_a_classifier_goes_along(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As loralib's examples save RoBERTa: factors and the head."""
    base = folder_of(tmp_path / "base", "roberta")
    ids = torch.arange(12).view(2, 6) * 7 % 90 + 3
    theirs = with_loralib(
        AutoModelForSequenceClassification.from_pretrained(base), {"query": linear(), "self.value": linear()}
    )
    for name, parameter in theirs.named_parameters():
        if "classifier" in name:
            parameter += 0.1
    state = record.lora_state_dict(theirs) | {k: v for k, v in theirs.state_dict().items() if "classifier" in k}
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "lora.safetensors")
    arguments = (tmp_path / "lora.safetensors", "--base", base, "--alpha", 32, "--out", tmp_path / "out")
    code, said, err = call(capfd, *arguments, verb="convert")
    assert (code, err) == (0, "") and "classifier.dense.weight, whole" in said
    plain_base = AutoModelForSequenceClassification.from_pretrained(base)
    ours = PeftModel.from_pretrained(plain_base, tmp_path / "out").eval()
    wanted = theirs(input_ids=ids).logits
    assert (ours(input_ids=ids).logits - wanted).abs().max() <= FP32 * wanted.abs().max()


# What is refused, each in one line and with nothing left behind.

KEY = "transformer.h.0.attn.c_attn.lora_"
Change = Callable[[dict[str, Tensor]], Any]
WRONG: dict[str, tuple[Change, tuple[object, ...]]] = {
    "has LoRA in 2 of 3 parts (loralib's enable_lora), and which, the file does not say; name 2 of q, k, v, 0, 1, 2, "
    "as --enable q,v": (lambda state: None, ("--enable", "")),
    "and --enable is q,v,k; name 2 of": (lambda state: None, ("--enable", "q,v,k")),
    "and --enable is q,x; name 2 of": (lambda state: None, ("--enable", "q,x")),
    f"{KEY}A is there but {KEY}B is not": (lambda state: state.pop(f"{KEY}B"), ()),
    f"{KEY}B is there but {KEY}A is not": (lambda state: state.pop(f"{KEY}A"), ()),
    "has lora_A (8, 31) and lora_B (64, 4), and the base's layer is 32 -> 96": (
        lambda state: state.update({f"{KEY}A": torch.ones(8, 31)}), (),
    ),
    "has lora_A (8, 32) and lora_B (66, 4), and the base's layer is 32 -> 96": (
        lambda state: state.update({f"{KEY}B": torch.ones(66, 4)}), (),
    ),
    "has a tensor for transformer.h.7.attn.c_attn, which the base does not have": (
        lambda state: state.update({key.replace("h.1", "h.7"): state.pop(key) for key in list(state) if "h.1" in key}),
        (),
    ),
    "adapts transformer.wte, a Embedding; only linear layers are taken": (
        lambda state: state.update({f"transformer.wte.lora_{f}": torch.ones(4, 4) for f in "AB"}),
        (),
    ),
    "beside its factors: a whole model; save lora.lora_state_dict(model) alone": (
        lambda state: state.update({"transformer.h.0.attn.c_attn.weight": torch.ones(32, 96)}), (),
    ),
    "has transformer.score.weight": (lambda state: state.update({"transformer.score.weight": torch.ones(3)}), ()),
    "has transformer.ln_f.bias (3,), where the base has (32,)": (
        lambda state: state.update({"transformer.ln_f.bias": torch.ones(3)}), (),
    ),
    "holds a value that is not finite": (lambda state: state[f"{KEY}A"].fill_(float("nan")), ()),
    "is no tensor of numbers": (lambda state: state.update(step=3), ()),
    "has no lora_A": (lambda state: state.clear(), ()),
    "holds a value that is too large for fp16": (lambda state: state[f"{KEY}A"].fill_(1e6), ("--dtype", "fp16")),
}  # fmt: skip


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny-gpt2", "gpt2", dtype=torch.float32)


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_refused(
    message: str, gpt2: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change, options = WRONG[message]
    state = dict(record.lora_state_dict(with_loralib(plain(gpt2), {"attn.c_attn": merged()})))
    change(state)
    torch.save(state, tmp_path / "lora.pt")
    arguments = (tmp_path / "lora.pt", "--base", gpt2, "--alpha", 32, "--out", tmp_path / "out", "--enable", "q,v")
    code, said, complaint = call(capfd, *arguments, *options, verb="convert")
    if message == "has transformer.score.weight":
        message = "has a tensor for transformer.score, which the base does not have"
    assert code == 2 and message in complaint and complaint.count("\n") == 1, complaint
    assert said == "" and [file.name for file in tmp_path.iterdir()] == ["lora.pt"]


def test_no_pickle_is_opened(gpt2: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing in a file is run, whatever it is."""
    options = ("--base", gpt2, "--alpha", 1, "--out", tmp_path / "out")
    torch.save(SimpleNamespace(a=1), tmp_path / "object.pt")
    (tmp_path / "text.pt").write_text("no pickle at all")
    (tmp_path / "empty.pt").write_text("")
    for name in ("object.pt", "text.pt", "empty.pt"):
        code, _, complaint = call(capfd, tmp_path / name, *options, verb="convert")
        assert code == 2 and "is no file of torch.save with tensors alone" in complaint, complaint
        assert complaint.count("\n") == 1
    torch.save([torch.ones(3)], tmp_path / "list.pt")
    for name, message in (("list.pt", "holds no state dict"), ("none.pt", "does not exist")):
        code, _, complaint = call(capfd, tmp_path / name, *options, verb="convert")
        assert code == 2 and message in complaint and complaint.count("\n") == 1
    torch.save({f"model.layers.0.mlp.up_proj.lora_{f}": torch.ones(2, 2) for f in "AB"}, tmp_path / "llama.pt")
    code, _, complaint = call(capfd, tmp_path / "llama.pt", *options, verb="convert")
    assert code == 2 and "give the base it is for" in complaint and not (tmp_path / "out").exists()
