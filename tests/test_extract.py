"""`lora-scale extract`: the update is the nearest there is, PEFT computes with it, and nothing is left unsaid."""

import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import allocations
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_merge import digests, logits, plain, write_adapter
from tiny import tiny_folder
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lora_scale import cli
from lora_scale.adapters import analysis, extraction, pairing, peft
from lora_scale.adapters.targets import is_linear
from lora_scale.parallel import load, verify
from lora_scale.spec.config import LoraConfig, ModelConfig
from lora_scale.storage.folder import fingerprint, open_folder

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning"),  # transformers
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),  # PEFT, where Conv1D and Linear mix
]
FP32 = 1e-5  # relative: fp32 sums in another order, and the rounding of base + update
Change = Callable[[str, Tensor, torch.Generator], Tensor | None]  # (parameter, value, draw) -> what is added


def call(capfd: pytest.CaptureFixture[str], *arguments: object, verb: str = "extract") -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `lora-scale extract ...`."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main([verb, *map(str, arguments)])
    captured = capfd.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def tune(base: Path, folder: Path, change: Change, dtype: torch.dtype = torch.float32) -> Path:
    """Full fine-tuning, in short."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if (added := change(name, parameter.data, draw)) is not None:
            parameter.data += added.to(dtype)
    model.save_pretrained(folder)
    return folder


def low_rank(name: str, value: Tensor, draw: torch.Generator) -> Tensor | None:
    """Rank 3 in each linear layer but the output's, and nothing elsewhere."""
    if value.ndim != 2 or re.search(r"embed|lm_head|wte|wpe|gate\.weight", name):
        return None
    rows, columns = value.shape
    return 0.1 * torch.randn(rows, 3, generator=draw) @ torch.randn(3, columns, generator=draw)


def everywhere(name: str, value: Tensor, draw: torch.Generator) -> Tensor:
    """Full rank, in every tensor."""
    return 0.02 * torch.randn(value.shape, generator=draw)


def updates(folder: Path) -> dict[str, Tensor]:
    """B A by module, (out, in), fp32."""
    adapter = peft.read_adapter(folder)
    return {
        m: adapter.scaling(m) * adapter.factors[f"{m}.lora_B"].float() @ adapter.factors[f"{m}.lora_A"].float()
        for m in adapter.modules
    }


def differences(base: Path, tuned: Path) -> dict[str, Tensor]:
    """tuned - base of every linear layer, (out, in), fp64."""
    ours, theirs = (dict(plain(folder).named_modules()) for folder in (base, tuned))
    found = {}
    for name, module in ours.items():
        if is_linear(module):
            change = theirs[name].weight.detach().double() - module.weight.detach().double()
            found[name] = change if isinstance(module, nn.Linear) else change.T
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny-llama", dtype=torch.float32)


@pytest.fixture(scope="module")
def tuned(base: Path) -> Path:
    return tune(base, base.parent / "tuned", everywhere)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3", "gpt_neox", "mixtral"])
def test_a_low_rank_change_comes_back(model_type: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Conv1D, fused projections, renamed tensors, fused experts; with it PEFT has the tuned model."""
    base = tiny_folder(tmp_path / "base", model_type, dtype=torch.float32)
    tuned = tune(base, tmp_path / "tuned", low_rank)
    code, said, err = call(capfd, tuned, "--base", base, "--out", tmp_path / "out", "--r", 3)
    assert (code, err) == (0, "") and "100% in all" in said and "left out" not in said
    wanted, found = differences(base, tuned), updates(tmp_path / "out")
    assert {name for name, change in wanted.items() if change.norm()} == set(found)
    for name, update in found.items():
        assert (update.double() - wanted[name]).norm() <= FP32 * wanted[name].norm()
    adapter = peft.read_adapter(tmp_path / "out")
    for name in found:
        a, b = adapter.factors[f"{name}.lora_A"], adapter.factors[f"{name}.lora_B"]
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))  # each has the root of the singular value
    theirs, before = logits(plain(tuned)), logits(plain(base))
    ours = logits(PeftModel.from_pretrained(plain(base), tmp_path / "out"))
    assert (theirs - before).abs().max() > 1e-2 * before.abs().max()
    assert (ours - theirs).abs().max() <= FP32 * theirs.abs().max()


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50)])
@pytest.mark.parametrize("exact", [True, False])
def test_no_other_of_that_rank_is_nearer(shape: tuple[int, int], exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eckart and Young, against torch's SVD; also the way of large matrices, on a flat spectrum, the worst there is."""
    if not exact:
        monkeypatch.setattr(analysis, "EXACT_DIM", 10)
    difference = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    values = torch.linalg.svdvals(difference.double())
    layer = extraction.nearest(difference, "layer", 5, None)
    lost = (difference.double() - layer.b.double() @ layer.a.double()).norm() ** 2
    best = values[5:].square().sum()
    assert best * (1 - FP32) <= lost <= best * (1 + (FP32 if exact else 2e-3))
    assert layer.squared == pytest.approx(values.square().sum().item(), rel=FP32)
    assert layer.kept == pytest.approx(layer.squared - lost.item(), rel=FP32)
    assert (layer.error == 0) == exact
    again = extraction.nearest(difference, "layer", 5, None)
    assert torch.equal(layer.a, again.a) and torch.equal(layer.b, again.b)
    largest = layer.a.gather(1, layer.a.abs().argmax(1, keepdim=True))
    assert (largest > 0).all(), "the signs are not left to chance"


def test_a_rank_that_is_more_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact and by iteration: the rest of the factors is noise or zero, and finite."""
    draw = torch.Generator().manual_seed(0)
    difference = torch.randn(40, 2, generator=draw) @ torch.randn(2, 30, generator=draw)
    for limit in (2048, 10):
        monkeypatch.setattr(analysis, "EXACT_DIM", limit)
        layer = extraction.nearest(difference, "layer", 6, None)
        assert layer.rank == 6 and (layer.b @ layer.a - difference).norm() <= FP32 * difference.norm()
        assert extraction.nearest(difference, "layer", 6, 0.999999).rank == 2
    zero = extraction.nearest(torch.zeros(40, 30), "layer", 6, None)
    assert zero.rank == 0 and zero.squared == 0
    one = torch.zeros(40, 30)
    one[3, 4] = -2.0
    layer = extraction.nearest(one, "layer", 6, None)
    torch.testing.assert_close(layer.b @ layer.a, one)
    assert layer.a.isfinite().all() and layer.b.isfinite().all()


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_base_in_bf16(dtypes: tuple[torch.dtype, ...], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The difference is that of the stored values, whatever the tuned model is stored in."""
    base = tiny_folder(tmp_path / "base", dtype=dtypes[0])
    tuned = tune(base, tmp_path / "tuned", low_rank, dtypes[1])
    arguments = (tuned, "--base", base, "--out", tmp_path / "out", "--r", 3, "--dtype", "fp32")
    assert call(capfd, *arguments)[0] == 0
    wanted = differences(base, tuned)
    for name, update in updates(tmp_path / "out").items():
        u, s, vh = torch.linalg.svd(wanted[name], full_matrices=False)
        best = u[:, :3] * s[:3] @ vh[:3]
        assert (update.double() - best).norm() <= FP32 * best.norm()
    assert peft.base_fingerprint(tmp_path / "out") == fingerprint(open_folder(base))


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_merged_and_extracted_again(model_type: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """There and back: the adapter's own targets are found, and PEFT computes what the merged model does."""
    base = tiny_folder(tmp_path / "base", model_type, dtype=torch.float32)
    mine = write_adapter(tmp_path / "mine", base, r=4, target_modules=["q", "mlp"])
    assert not call(capfd, mine, "--base", base, "--out", tmp_path / "merged", verb="merge")[0]
    code, said, _ = call(capfd, tmp_path / "merged", "--base", base, "--out", tmp_path / "out", "--r", 4)
    assert not code and "are equal in both, and not adapted" in said
    before, after = updates(mine), updates(tmp_path / "out")
    assert before.keys() == after.keys()
    for name in before:
        assert (before[name] - after[name]).norm() <= FP32 * before[name].norm()
    theirs = logits(plain(tmp_path / "merged"))
    ours = logits(PeftModel.from_pretrained(plain(base), tmp_path / "out"))
    assert (ours - theirs).abs().max() <= FP32 * theirs.abs().max()
    assert not call(capfd, tmp_path / "out", "--base", base, "--out", tmp_path / "again", "--check", verb="merge")[0]
    assert (logits(plain(tmp_path / "again")) - theirs).abs().max() <= FP32 * theirs.abs().max()


def test_what_is_left_out_is_named(base: Path, tuned: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every tensor is in one line of the report, and the shares add up."""
    code, said, err = call(capfd, tuned, "--base", base, "--out", tmp_path / "out", "--r", 8, "--targets", "q,v,mlp")
    assert (code, err) == (0, "")
    before, after = (dict(plain(folder).named_parameters()) for folder in (base, tuned))
    squares = {name: (after[name] - before[name]).double().square().sum().item() for name in before}
    total = sum(squares.values())
    lines = dict(re.findall(r"^ {9}(\S+)(?: x\d+)? +([\d.]+)%", said, re.MULTILINE))
    adapted = set(updates(tmp_path / "out"))
    kinds = {
        re.sub(r"^model\.layers\.\d+\.", "", name) for name in squares if name.removesuffix(".weight") not in adapted
    }
    assert kinds == {name for name in lines if name.endswith((".weight", ".bias"))}
    for kind in kinds:
        share = sum(square for name, square in squares.items() if name.endswith(kind) or name == kind) / total
        assert float(lines[kind]) == pytest.approx(100 * share, abs=0.01)
    kept = sum(update.double().square().sum().item() for update in updates(tmp_path / "out").values())
    assert f"{100 * kept / total:.2f}% in all" in said
    card = (tmp_path / "out/README.md").read_text()
    assert "input_layernorm.weight x2" in card and "from | tuned" in card
    written = "".join(file.read_text() for file in (tmp_path / "out").glob("*.[jm]*"))
    assert str(tmp_path) not in written and str(base.parent) not in written


def test_whole_modules_and_full_rank_are_the_tuned_model(
    base: Path, tuned: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    saved = "embed_tokens,lm_head,norm,input_layernorm,post_attention_layernorm"
    arguments = (tuned, "--base", base, "--out", tmp_path / "out", "--targets", "q,o,mlp")
    code, said, err = call(capfd, *arguments, "--r", 32, "--modules-to-save", saved + ",k_proj,v_proj")
    assert (code, err) == (0, "") and "left out" not in said and "100% in all" in said
    theirs = logits(plain(tuned))
    assert (
        logits(PeftModel.from_pretrained(plain(base), tmp_path / "out")) - theirs
    ).abs().max() <= 1e-4 * theirs.abs().max()
    assert not call(capfd, tmp_path / "out", "--base", base, "--out", tmp_path / "merged", "--check", verb="merge")[0]
    assert (logits(plain(tmp_path / "merged")) - theirs).abs().max() <= FP32 * theirs.abs().max()


def test_energy_gives_each_layer_the_rank_it_needs(
    base: Path, tuned: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, said, _ = call(capfd, tuned, "--base", base, "--out", tmp_path / "out", "--r", 14, "--energy", 0.8)
    assert code == 0 and "not for vLLM: it scales all layers by one lora_alpha / r" in said
    adapter, wanted = peft.read_adapter(tmp_path / "out"), differences(base, tuned)
    ranks = set()
    for name, update in updates(tmp_path / "out").items():
        share = torch.linalg.svdvals(wanted[name]).square().cumsum(0) / wanted[name].square().sum()
        rank = len(adapter.factors[f"{name}.lora_A"])
        assert rank == min(14, int((share < 0.8).sum()) + 1) and adapter.scaling(name) == 1
        assert update.double().square().sum() == pytest.approx((share[rank - 1] * wanted[name].square().sum()).item())
        ranks.add(rank)
    assert len(ranks) > 2 and adapter.config["r"] == max(ranks)
    theirs = PeftModel.from_pretrained(plain(base), tmp_path / "out")
    assert not call(capfd, tmp_path / "out", "--base", base, "--out", tmp_path / "merged", verb="merge")[0]
    wanted_logits = logits(theirs)
    assert (logits(plain(tmp_path / "merged")) - wanted_logits).abs().max() <= FP32 * wanted_logits.abs().max()


def test_threads_and_pieces_do_not_change_a_byte(
    base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, threads, piece in (("a", 1, 1 << 22), ("b", 4, 150)):
        monkeypatch.setattr(extraction, "PIECE", piece)
        arguments = (tuned, "--base", base, "--out", tmp_path / name, "--r", 4, "--targets", "all-linear,lm_head")
        assert call(capfd, *arguments, "--threads", threads)[0] == 0
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_a_tokenizer_of_its_own_goes_along(
    base: Path, tuned: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    shutil.copytree(tuned, own)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, own / name)
    assert call(capfd, own, "--base", base, "--out", tmp_path / "same", "--r", 2)[0] == 0
    assert not (tmp_path / "same/tokenizer.json").exists()
    (own / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert call(capfd, own, "--base", base, "--out", tmp_path / "other", "--r", 2)[0] == 0
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} < {
        f.name for f in (tmp_path / "other").iterdir()
    }


def test_other_settings_of_the_model_are_named(
    base: Path, tuned: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = with_config(tuned, tmp_path / "tuned", rms_norm_eps=0.5)
    code, said, _ = call(capfd, other, "--base", base, "--out", tmp_path / "out", "--r", 2)
    assert (
        code == 0 and "note     config.json has rms_norm_eps: 1e-06 in the base, 0.5 tuned: no adapter carries" in said
    )


class OneThread(ThreadPoolExecutor):
    """Works where it is called: the profiler sees only that thread."""

    def submit(self, work: Callable[..., Any], *arguments: Any, **options: Any) -> Future[Any]:  # type: ignore[override]
        future: Future[Any] = Future()
        future.set_result(work(*arguments, **options))
        return future


@pytest.mark.parametrize("exact_dim", [2048, 64])
def test_memory_is_that_of_a_layer(exact_dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the models: four times as many layers take the same, beside the adapter."""
    monkeypatch.setattr(extraction, "ThreadPoolExecutor", OneThread)
    monkeypatch.setattr(analysis, "EXACT_DIM", exact_dim)
    monkeypatch.setattr(analysis, "BLOCK", 1 << 12)
    peaks = []
    for layers in (2, 8):
        base = tiny_folder(tmp_path / f"base-{layers}", dtype=torch.bfloat16, num_hidden_layers=layers, hidden_size=256)
        tuned = tune(base, tmp_path / f"tuned-{layers}", everywhere, torch.bfloat16)
        folders = open_folder(base), open_folder(tuned)
        cfg = LoraConfig(r=2, lora_alpha=2.0, target_modules=("all-linear",))
        plan = pairing.plan(folders, load.skeleton(folders[0], ModelConfig(path=str(base))), cfg)
        found, kept, peak = allocations(lambda plan=plan: extraction.extract(plan, 2, None, threads=1), tmp_path)
        assert len(found.layers) == 7 * layers
        peaks.append(peak - kept)
        assert peaks[-1] <= extraction.bytes_needed(plan, 2)
    assert peaks[1] <= 1.01 * peaks[0], peaks


# What is refused, each in one line and with nothing left behind.


def with_config(folder: Path, copy: Path, **changes: Any) -> Path:
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return copy


def with_value(folder: Path, copy: Path, value: float) -> Path:
    shutil.copytree(folder, copy)
    (file,) = copy.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, file, {"format": "pt"})
    return copy


def _fp8(folder: Path, copy: Path) -> Path:
    from tiny_fp8 import fp8_folder

    return fp8_folder(copy)


WRONG: dict[str, tuple[Callable[[Path, Path], Path], tuple[object, ...]]] = {
    "are other architectures: model_type is 'gpt2' and 'llama'": (lambda _, copy: tiny_folder(copy, "gpt2"), ()),
    "are other architectures: num_attention_heads is 2 and 4": (
        lambda tuned, copy: with_config(tuned, copy, num_attention_heads=2, head_dim=8), (),
    ),
    "has model.layers.2.self_attn.q_proj.weight; give the base that was tuned": (
        lambda _, copy: tiny_folder(copy, num_hidden_layers=3), (),
    ),
    "mlp.gate_proj.weight has shape (40, 32) and (48, 32); give the base": (
        lambda _, copy: tiny_folder(copy, intermediate_size=40), (),
    ),
    "model.embed_tokens.weight has shape (101, 32) and (96, 32); a vocabulary that grew is no update of low rank: call "
    "resize_token_embeddings(96)": (lambda _, copy: tiny_folder(copy, vocab_size=101), ()),
    "model.layers.1.mlp.up_proj.weight holds a value that is not finite": (
        lambda tuned, copy: with_value(tuned, copy, float("nan")), (),
    ),
    "is stored in fp8 blocks": (_fp8, ()),
    "--r is 17, but model.layers.0.self_attn.k_proj is 32 -> 16, of rank 16 at most": (None, ("--r", 17)),
    "--targets has 'q_prj', which matches no module (did you mean 'q_proj'?)": (None, ("--targets", "q_prj")),
    "--modules-to-save has 'nrm', which names no module": (None, ("--modules-to-save", "nrm")),
    "--modules-to-save has 'q_proj', but model.layers.0.self_attn.q_proj.weight is adapted": (
        None, ("--modules-to-save", "q_proj"),
    ),
    "--base-name is /somewhere, a place on this machine": (None, ("--base-name", "/somewhere")),
}  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_is_refused(
    message: str, base: Path, tuned: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    change, options = WRONG[message]
    folder = change(tuned, tmp_path / "wrong") if change else tuned
    options = options if "--r" in options else ("--r", 2, *options)
    code, said, complaint = call(capfd, folder, "--base", base, "--out", tmp_path / "out", *options)
    assert code == 2 and message in complaint and complaint.count("\n") == 1, complaint
    assert said == "" and not list(tmp_path.glob("*out*"))


def test_equal_models_are_refused(base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, complaint = call(capfd, base, "--base", base, "--out", tmp_path / "out")
    assert code == 2 and "TUNED and --base are the same folder" in complaint
    shutil.copytree(base, tmp_path / "copy")
    code, _, complaint = call(capfd, tmp_path / "copy", "--base", base, "--out", tmp_path / "out")
    assert code == 2 and "are equal in all 14 layers of --targets all-linear; nothing differs" in complaint
    norms = tune(base, tmp_path / "norms", lambda name, value, draw: 0.1 * value if "norm" in name else None)
    code, _, complaint = call(capfd, norms, "--base", base, "--out", tmp_path / "out")
    assert code == 2 and "they differ in model.layers.0.input_layernorm.weight, " in complaint
    assert not list(tmp_path.glob("*out*"))


def test_a_weight_of_two_layers_is_not_saved(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base = tiny_folder(tmp_path / "base", tie_word_embeddings=True, dtype=torch.float32)
    tuned = tune(base, tmp_path / "tuned", everywhere)
    arguments = (tuned, "--base", base, "--out", tmp_path / "out", "--r", 2)
    code, _, complaint = call(capfd, *arguments, "--modules-to-save", "embed_tokens")
    assert code == 2 and "model.embed_tokens.weight is another layer's weight too" in complaint
    code, _, complaint = call(capfd, *arguments, "--targets", "lm_head")
    assert code == 2 and "whose weight is the input embedding's too" in complaint
    code, said, _ = call(capfd, *arguments)
    assert code == 0 and said.count("embed_tokens.weight") == 1 and "lm_head" not in said


def test_a_used_folder_and_a_small_machine_are_refused(
    base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("keep")
    arguments = (tuned, "--base", base, "--r", 2, "--out")
    code, _, complaint = call(capfd, *arguments, tmp_path / "out")
    assert code == 2 and "which is not empty; name a new folder" in complaint
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 10))
        code, _, complaint = call(capfd, *arguments, tmp_path / "new")
        assert code == 3 and "10 bytes are free" in complaint and complaint.count("\n") == 1
    with monkeypatch.context() as small:
        small.setattr(verify, "bytes_free", lambda: 10)
        code, _, complaint = call(capfd, *arguments, tmp_path / "new")
        assert code == 3 and "the largest layer takes up to" in complaint and complaint.count("\n") == 1
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        code, _, complaint = call(capfd, *arguments, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 3 and "was not written: File too large" in complaint and complaint.count("\n") == 1
    assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == ["mine.txt"]
