"""`lora-scale merge`: the result is base + adapter, its files are whole or not there, and wrong input is refused."""

import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_export import make_run
from tiny import tiny_folder
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_scale import cli
from lora_scale.adapters import merging, peft, rewriting
from lora_scale.adapters.lora import adapt
from lora_scale.spec.config import LoraConfig
from lora_scale.spec.errors import CheckpointError
from lora_scale.storage.folder import fingerprint, open_folder
from lora_scale.storage.staging import unfinished

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),  # transformers
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),  # PEFT, where Conv1D and Linear mix
]
IDS = torch.arange(2 * 9).view(2, 9) * 7 % 61
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "falcon", "gpt_neox", "mixtral")
TOLERANCE = 1e-5  # of the largest logit: fp32 sums in another order


def write_adapter(folder: Path, base: Path, seed: int = 1, scale: float = 0.2, **lora: Any) -> Path:
    """An adapter with both factors random, as `export` writes it."""
    cfg = LoraConfig.model_validate({"r": 4, "lora_alpha": 6.0, "target_modules": ["all-linear"], **lora})
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    layers = adapt(model, cfg, seed=0)
    draw = torch.Generator().manual_seed(seed)
    factors = {
        f"{name}.{p}": torch.randn(getattr(layer, p).shape, generator=draw) * scale
        for name, layer in layers.items()
        for p in ("lora_A", "lora_B")
    }
    folder.mkdir(parents=True)
    identity = fingerprint(open_folder(base))
    peft.write_adapter(folder, factors, peft.adapter_config(model, layers, cfg, "base"), "fp32", identity)
    return folder


def call(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `lora-scale merge ...`."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main(["merge", *map(str, arguments)])
    captured = capfd.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=IDS).logits


def plain(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces a tensor, the last one short."""
    monkeypatch.setattr(merging, "PIECE", 150)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny-llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapters") / "mine", base)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_plain_transformers_computes_base_plus_adapter(
    model_type: str, small_pieces: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Conv1D, fused projections, renamed tensors, packed experts and tied tables too; patterns and rsLoRA."""
    base = tiny_folder(tmp_path / "base", model_type, dtype=torch.float32)
    mine = write_adapter(
        tmp_path / "mine", base, use_rslora=True, rank_pattern={r".*\.1\..*": 2}, alpha_pattern={r".*\.0\..*": 3.0}
    )
    out = tmp_path / "out"
    code, said, complaints = call(capfd, mine, "--base", base, "--out", out, "--check", "--threads", 3)
    assert (code, complaints) == (0, "")
    assert "checked  the adapter taken off again gives the base" in said
    ours, before = logits(plain(out)), logits(plain(base))
    theirs = logits(PeftModel.from_pretrained(plain(base), mine))
    assert (theirs - before).abs().max() > 1e-2 * before.abs().max(), "the adapter does nothing: an empty comparison"
    assert (ours - theirs).abs().max() <= TOLERANCE * max(1.0, theirs.abs().max().item())
    assert len(AutoTokenizer.from_pretrained(out)) == len(AutoTokenizer.from_pretrained(base))
    assert {file.name for file in out.iterdir()} == {file.name for file in base.iterdir()} | {"merge.json", "README.md"}
    for file in base.glob("*.json"):
        assert (out / file.name).read_bytes() == file.read_bytes()


VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "DoRA": ("llama", {}, {"use_dora": True, "target_modules": "all-linear"}),
    "DoRA, biases and a head": (
        "gpt2",
        {"tie_word_embeddings": False},
        {"use_dora": True, "bias": "all", "modules_to_save": ["lm_head"], "target_modules": ["c_attn", "mlp.c_proj"]},
    ),
    "head and embeddings": ("llama", {}, {"modules_to_save": ["lm_head", "embed_tokens"]}),
    "new tokens": ("llama", {}, {"trainable_token_indices": [9, 40, 3]}),
    "new tokens at both ends": ("gemma3_text", {}, {"trainable_token_indices": [9, 40, 3], "use_dora": True}),
}


def peft_model(base: Path, folder: Path, lora: dict[str, Any]) -> nn.Module:
    """PEFT's model with random values in all that trains, in eval mode; saved to `folder`."""
    theirs = get_peft_model(plain(base), PeftConfig(r=4, lora_alpha=6, **{"target_modules": ["q_proj"], **lora}))
    draw = torch.Generator().manual_seed(1)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data += torch.randn(p.shape, generator=draw) * 0.2
    theirs.save_pretrained(folder)
    return theirs.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_merge_as_peft_does(
    variant: str, small_pieces: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    kind, config, lora = VARIANTS[variant]
    base = tiny_folder(tmp_path / "base", kind, dtype=torch.float32, **config)
    theirs = peft_model(base, tmp_path / "mine", lora)
    out = tmp_path / "out"
    code, _, err = call(capfd, tmp_path / "mine", "--base", base, "--out", out, "--check", "--threads", 2)
    assert not code, err
    wanted = logits(theirs.merge_and_unload())
    assert (wanted - logits(plain(base))).abs().max() > 1e-2 * wanted.abs().max()
    assert (logits(plain(out)) - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
    code, _, err = call(capfd, tmp_path / "mine", tmp_path / "mine", "--base", base, "--out", tmp_path / "sum")
    assert code and "a weighted sum takes plain LoRA only: merge it alone" in err


def test_check_finds_one_wrong_bit_of_a_new_token(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, out = tiny_folder(tmp_path / "base", dtype=torch.float32), tmp_path / "out"
    peft_model(base, tmp_path / "mine", {"trainable_token_indices": [9, 40]})
    arguments = tmp_path / "mine", "--base", base, "--out", out
    assert not call(capfd, *arguments)[0]
    entry = open_folder(out).tensors["model.embed_tokens.weight"]
    with Path(entry.file).open("r+b") as file:
        file.seek(entry.offset + 40 * 32 * 4)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    code, _, err = call(capfd, *arguments, "--check")
    assert code and "model.embed_tokens.weight[40, 0] is" in err


@pytest.mark.parametrize(
    ("lora", "made_for", "merged_into", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, {"vocab_size": 99}, {}, "brings lm_head.weight (99, 32), which"),
        ({"trainable_token_indices": [98]}, {"vocab_size": 99}, {}, "has a row for token 98, and the embedding of"),
        ({"modules_to_save": ["lm_head"]}, {}, {"tie_word_embeddings": True}, "is another layer's weight too in"),
        ({"bias": "all"}, {"attention_bias": True}, {}, "_proj.bias ("),
    ],
)
def test_what_an_adapter_brings_must_fit(
    lora: dict, made_for: dict, merged_into: dict, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    peft_model(tiny_folder(tmp_path / "made-for", dtype=torch.float32, **made_for), tmp_path / "mine", lora)
    base, out = tiny_folder(tmp_path / "base", dtype=torch.float32, **merged_into), tmp_path / "out"
    code, _, err = call(capfd, tmp_path / "mine", "--base", base, "--out", out)
    assert code and message in err and not out.exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As PEFT's merge in fp32, rounded afterwards; where fp32 sums differ in their last bit, one step at most."""
    base = tiny_folder(tmp_path / "base", dtype=dtype)
    mine = write_adapter(tmp_path / "mine", base)
    assert call(capfd, mine, "--base", base, "--out", tmp_path / "out", "--check")[0] == 0
    theirs = PeftModel.from_pretrained(plain(base), mine).merge_and_unload().state_dict()
    merged = weights(tmp_path / "out")
    same = total = 0
    for name, tensor in merged.items():
        wanted = theirs[name].to(dtype)
        assert tensor.dtype == dtype
        torch.testing.assert_close(tensor.float(), wanted.float(), rtol=torch.finfo(dtype).eps, atol=1e-7)
        same, total = same + int((tensor == wanted).sum()), total + tensor.numel()
    assert same / total > 0.999


def test_threads_and_pieces_do_not_change_a_byte(
    base: Path, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for threads in (1, 4):
        assert call(capfd, adapter, "--base", base, "--out", tmp_path / str(threads), "--threads", threads)[0] == 0
    assert digests(tmp_path / "1") == digests(tmp_path / "4")


def test_a_run_knows_its_base(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", base)
    code, said, _ = call(capfd, run, "--out", tmp_path / "out")
    assert code == 0 and f"wrote    {tmp_path / 'out'}: " in said
    theirs = PeftModel.from_pretrained(plain(base), run / "checkpoints/step-000010")
    torch.testing.assert_close(logits(plain(tmp_path / "out")), logits(theirs), rtol=0, atol=1e-4)
    task = json.loads((tmp_path / "out/merge.json").read_text())
    assert task["base"] == fingerprint(open_folder(base)) and [a["weight"] for a in task["adapters"]] == [1.0]
    for name in ("merge.json", "README.md"):
        assert str(tmp_path) not in (tmp_path / "out" / name).read_text()


def test_what_peft_trained_is_merged_too(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its base is known by name only, its config names a path of another machine, its tokenizer goes along."""
    cfg = PeftConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    theirs = get_peft_model(plain(base), cfg)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs/chat_template.jinja").write_text("{{ messages[0].content }}")
    code, said, _ = call(capfd, tmp_path / "theirs", "--base", base, "--out", tmp_path / "out", "--check")
    assert code == 0 and "note     chat_template.jinja is the adapter's" in said
    assert (tmp_path / "out/chat_template.jinja").read_text() == "{{ messages[0].content }}"
    torch.testing.assert_close(logits(plain(tmp_path / "out")), logits(theirs), rtol=0, atol=1e-4)


def test_a_weighted_sum_is_pefts(base: Path, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """PEFT's own exact way to add adapters: combination_type="cat"."""
    other = write_adapter(tmp_path / "other", base, seed=2, r=3, target_modules=["q", "mlp"])
    code, said, _ = call(
        capfd, adapter, other, "--weights", "0.7,-0.3", "--base", base, "--out", tmp_path / "out", "--check"
    )
    assert code == 0 and "checked" in said
    model = PeftModel.from_pretrained(plain(base), adapter, adapter_name="a")
    model.load_adapter(other, "b")
    model.add_weighted_adapter(["a", "b"], [0.7, -0.3], "both", combination_type="cat")
    model.set_adapter("both")
    theirs = logits(model)
    assert (logits(plain(tmp_path / "out")) - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


def test_merging_the_negative_gives_the_base_back(
    base: Path, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(capfd, adapter, "--base", base, "--out", tmp_path / "there")[0] == 0
    back = ("--weights=-1", "--base", tmp_path / "there", "--allow-other-base", "--out", tmp_path / "back")
    assert call(capfd, adapter, *back)[0] == 0
    before, after = weights(base), weights(tmp_path / "back")
    assert all((before[name] - after[name]).abs().max() <= 1e-6 for name in before)


def test_check_finds_one_wrong_bit(
    base: Path, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert call(capfd, adapter, "--base", base, "--out", out)[0] == 0
    merged = open_folder(out)
    for name, message in (
        ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight[0, 0] is "),
        ("model.norm.weight", "are not the base's; merge again"),
    ):
        entry = merged.tensors[name]
        with open(entry.file, "r+b") as file:
            file.seek(entry.offset + 3)  # sign and exponent
            byte = file.read(1)[0]
            file.seek(entry.offset + 3)
            file.write(bytes([byte ^ 0x80]))
            file.flush()
            code, _, complaint = call(capfd, adapter, "--base", base, "--out", out, "--check")
            assert code == 2 and message in complaint and complaint.count("\n") == 1
            file.seek(entry.offset + 3)
            file.write(bytes([byte]))
    code, said, _ = call(capfd, adapter, "--base", base, "--out", out, "--check")
    assert code == 0 and "finished already" in said and "checked" in said


# What is refused, each in one line and with nothing left behind.


def _edit(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / peft.WEIGHTS_FILE)
    change(tensors)
    save_file(tensors, folder / peft.WEIGHTS_FILE)


def _key(module: str, factor: str) -> str:
    return f"base_model.model.model.layers.{module}.lora_{factor}.weight"


def _nan(folder: Path) -> None:
    _edit(folder, lambda t: t[_key("0.self_attn.q_proj", "A")].fill_(float("nan")))


def _cut(folder: Path) -> None:
    os.truncate(folder / peft.WEIGHTS_FILE, (folder / peft.WEIGHTS_FILE).stat().st_size - 5)


def _other_r(folder: Path) -> None:
    path = folder / peft.CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 5}))


def _rename(folder: Path) -> None:
    _edit(folder, lambda t: [t.update({_key(f"7.{m}", f): t.pop(_key(f"1.{m}", f))}) for m, f in _of_layer_1()])


def _of_layer_1() -> list[tuple[str, str]]:
    return [("self_attn.q_proj", factor) for factor in "AB"]


def _other_shape(folder: Path) -> None:
    _edit(folder, lambda t: t.update({_key("1.mlp.up_proj", "A"): torch.ones(4, 31)}))


def _a_norm(folder: Path) -> None:
    _edit(folder, lambda t: [t.update({_key("0.input_layernorm", f): t.pop(_key("0.mlp.up_proj", f))}) for f in "AB"])


def _half(folder: Path) -> None:
    _edit(folder, lambda t: t.pop(_key("0.mlp.up_proj", "B")))


def _huge(folder: Path) -> None:
    _edit(folder, lambda t: t[_key("0.mlp.up_proj", "A")].fill_(3e38))


WRONG: dict[str, Callable[[Path], Any]] = {
    "holds a value that is not finite": _nan,
    "is truncated": _cut,
    "but adapter_config.json gives model.layers.0.self_attn.q_proj r = 5": _other_r,
    "has factors for model.layers.7.self_attn.q_proj, which": _rename,
    "are for 31 -> 48 features": _other_shape,
    "adapts model.layers.0.input_layernorm, which is no linear layer": _a_norm,
    "is there but": _half,
    "model.layers.0.mlp.up_proj.weight with its update is not finite in F32": _huge,
    "is no adapter": lambda folder: (folder / peft.CONFIG_FILE).unlink(),
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_adapter_is_refused(
    message: str, base: Path, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(adapter, mine)
    WRONG[message](mine)
    code, _, complaint = call(capfd, mine, "--base", base, "--out", tmp_path / "out")
    assert code == 2 and complaint.count("\n") == 1
    assert message in complaint or "is neither a run directory nor a checkpoint nor an adapter" in complaint
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused_unless_allowed(
    adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tiny_folder(tmp_path / "other", dtype=torch.bfloat16)
    arguments = (adapter, "--base", other, "--out", tmp_path / "out")
    code, _, complaint = call(capfd, *arguments)
    assert code == 2 and "was trained on another base than" in complaint and "--allow-other-base" in complaint
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    assert call(capfd, *arguments, "--allow-other-base")[0] == 0


def test_a_tied_output_layer_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    untied = tiny_folder(tmp_path / "untied", tie_word_embeddings=False)
    mine = write_adapter(tmp_path / "mine", untied, target_modules=["lm_head"])
    tied = tiny_folder(tmp_path / "tied", tie_word_embeddings=True)
    code, _, complaint = call(capfd, mine, "--base", tied, "--out", tmp_path / "out", "--allow-other-base")
    assert code == 2 and "whose weight is the input embedding's too" in complaint and complaint.count("\n") == 1
    assert call(capfd, mine, "--base", untied, "--out", tmp_path / "out")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--weights", "1,2"), "--weights has 2 numbers for 1 adapters"),
        (("--weights", "one"), "--weights is 'one'; give numbers"),
        (("--weights", "nan"), "--weights is 'nan'; give numbers"),
        (("--base", "/nowhere/at-all"), "which does not exist"),
        ((), "is base, which is no folder here"),
    ],
)
def test_wrong_options_are_refused(
    arguments: tuple[str, ...],
    message: str,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, complaint = call(capfd, adapter, "--out", tmp_path / "out", *arguments)
    assert code == 2 and message in complaint and complaint.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_is_used_stays_as_it_is(
    base: Path, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    code, _, complaint = call(capfd, adapter, "--base", base, "--out", tmp_path / "out")
    assert code == 2 and "which is not empty; name a new folder" in complaint
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["mine.txt"] and len(list(tmp_path.iterdir())) == 1


def test_too_little_disk_is_said_before_anything_is_written(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
    code, _, complaint = call(capfd, adapter, "--base", base, "--out", tmp_path / "out")
    assert code == 3 and "10 bytes are free" in complaint and complaint.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_whole_files_to_go_on_with(
    base: Path, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands for the disk: the largest file cannot be written."""
    out, sizes = tmp_path / "out", sorted(file.stat().st_size for file in base.glob("*.safetensors"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (sizes[-1] - 1, before[1]))
    try:
        code, _, complaint = call(capfd, adapter, "--base", base, "--out", out, "--threads", 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 3 and f"{out} is not written: File too large" in complaint and complaint.count("\n") == 1
    assert not out.exists() and not list(unfinished(out).glob(".*partial*"))
    assert call(capfd, adapter, "--base", base, "--out", out, "--check")[0] == 0
    assert not unfinished(out).exists()


# Kills.


def _until(call_number: int, arguments: list[str]) -> int:
    """Run `lora-scale merge` in a fork that is killed before its n-th change to the disk; the signal that ended it."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    count = itertools.count(1)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(count) == call_number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapper

    for name in ("mkdir", "write", "pwrite", "fsync", "rename", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    try:
        cli.main(["merge", *arguments])
    except SystemExit as end:
        os._exit(int(end.code or 0))
    os._exit(99)


def test_killed_anywhere_it_goes_on_to_the_same_bytes(
    base: Path, adapter: Path, small_pieces: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(capfd, adapter, "--base", base, "--out", tmp_path / "whole")[0] == 0
    wanted, out = digests(tmp_path / "whole"), tmp_path / "out"
    arguments = [str(adapter), "--base", str(base), "--out", str(out), "--threads", "2"]
    kept = []  # whole files after each kill
    for number in (*range(5, 250, 20), 1 << 30):
        if not out.exists():
            _until(number, arguments)
            kept.append(len(list(unfinished(out).glob("*.safetensors"))))
    assert len(kept) > 5 and any(kept[:-1]), kept  # the kills did hit before, within and between files
    assert digests(out) == wanted and not unfinished(out).exists()


def test_unfinished_work_on_other_inputs_is_not_gone_on_with(
    base: Path, adapter: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = [str(adapter), "--base", str(base), "--out", str(out)]
    assert os.WIFSIGNALED(_until(30, arguments)) and unfinished(out).is_dir()
    code, _, complaint = call(capfd, *arguments, "--weights", "0.5")
    assert code == 2 and "is unfinished work on other inputs" in complaint and complaint.count("\n") == 1
    assert call(capfd, *arguments)[0] == 0


@pytest.fixture
def plan(base: Path, adapter: Path) -> Iterator[merging.Plan]:
    skeleton = AutoModelForCausalLM.from_pretrained(base)
    yield merging.plan(open_folder(base), skeleton, [(adapter, peft.read_adapter(adapter), 1.0)])


def test_pieces_are_the_file(plan: merging.Plan, small_pieces: None) -> None:
    """End to end, without a hole, and each within one row run of one tensor."""
    for file in plan.folder.files:
        end = 0
        for piece in plan.pieces(file):
            assert piece.range.offset == end and piece.range.length > 0
            end += piece.range.length
        assert end == file.stat().st_size


def test_the_first_error_ends_all_threads(plan: merging.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = next(iter(plan.updates))
    plan.updates[bad][0].right.fill_(float("inf"))
    with pytest.raises(CheckpointError, match="not finite"):
        rewriting.write(plan, tmp_path, threads=4)
    assert not list(tmp_path.glob(".*"))
