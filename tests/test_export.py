"""`lora-scale export`: which checkpoint, what is written, what is compared, and what is refused."""

import dataclasses
import json
import os
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny import tiny_folder
from transformers import AutoModelForCausalLM

from lora_scale import cli
from lora_scale.adapters import peft
from lora_scale.adapters.lora import adapt
from lora_scale.commands import export
from lora_scale.parallel import verify
from lora_scale.parallel.checkpoint import State
from lora_scale.spec.config import LoraConfig, RunConfig
from lora_scale.storage.card import adapter_card
from lora_scale.storage.folder import fingerprint, open_folder
from lora_scale.storage.weights import read_safetensors

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is deprecated and will be removed in v6:FutureWarning"
)  # transformers


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", base, steps=(5, 10))


def make_run(run: Path, base: Path, steps: tuple[int, ...] = (10,), **lora: Any) -> Path:
    """A run directory as `train` leaves it, with an adapter of its own in every checkpoint."""
    cfg = RunConfig.model_validate(
        {
            "model": {"path": str(base)},
            "data": {"train": "rows.jsonl"},
            "run_dir": str(run),
            "train": {"max_steps": 10},
            "lora": {"r": 4, "lora_alpha": 6.0, "target_modules": ["q", "v", "mlp"], **lora},
        }
    )
    for step in steps:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        layers = adapt(model, cfg.lora, seed=step)
        generator = torch.Generator().manual_seed(step)
        factors = {}
        for name, layer in layers.items():
            factors[f"{name}.lora_A"] = layer.lora_A
            factors[f"{name}.lora_B"] = torch.randn(layer.lora_B.shape, generator=generator) * 0.2
        folder = run / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        peft.write_adapter(folder, factors, peft.adapter_config(model, layers, cfg.lora, peft.public_name(str(base))))
        write_state(folder, step, base, cfg.lora)
    (run / "config.resolved.json").write_text(cfg.model_dump_json())
    return run


def write_state(folder: Path, step: int, base: Path, lora: LoraConfig, method: str = "lora") -> None:
    state = State(
        step=step,
        method=method,
        seed=0,
        global_batch_size=8,
        tokens_seen=step * 100,
        base_fingerprint=fingerprint(open_folder(base)),
        config_sha256="0" * 64,
        data={},
        lora=lora.model_dump(mode="json"),
        versions={},
    )
    (folder / "state.json").write_text(json.dumps(dataclasses.asdict(state)))


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `lora-scale export ...`."""
    with pytest.raises(SystemExit) as end:
        cli.main(["export", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def factors_of(folder: Path) -> dict[str, torch.Tensor]:
    return peft.read_adapter(folder).factors


def test_the_newest_checkpoint_becomes_a_folder_that_peft_loads(
    run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapters" / "mine"
    code, said, complaints = call(capsys, run, "--out", out)
    assert (code, complaints) == (0, "")
    names = sorted(file.name for file in out.iterdir())
    assert names == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert [path.name for path in out.parent.iterdir()] == ["mine"]
    newest, exported = factors_of(run / "checkpoints/step-000010"), factors_of(out)
    assert all(torch.equal(newest[name], exported[name]) for name in newest) and newest.keys() == exported.keys()
    assert "(step 10, 1,000 tokens seen)" in said and "r = 4" in said
    assert "verified PEFT's logits equal ours in fp32: largest difference" in said
    assert f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained('{base}'), '{out}')" in said
    assert f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules mine={out}\n" in said
    assert f"python -m sglang.launch_server --model-path {base} --enable-lora --lora-paths mine={out}\n" in said
    assert said.endswith(f"to the hub:\n  hf upload ORG/mine {out}\n")
    assert peft.base_fingerprint(out) == fingerprint(open_folder(base))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), out)
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    assert torch.equal(layer.lora_B["default"].weight, exported["model.layers.1.mlp.down_proj.lora_B"])
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny-llama"
    assert os.fsencode(tmp_path) not in b"".join(file.read_bytes() for file in out.iterdir())


def test_a_named_checkpoint_is_taken_as_it_is(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = run / "checkpoints/step-000005"
    code, said, _ = call(capsys, checkpoint, "--out", tmp_path / "out", "--no-verify")
    assert code == 0 and "(step 5, " in said and "not verified: --no-verify" in said
    assert torch.equal(*(factors_of(f)["model.layers.0.mlp.up_proj.lora_B"] for f in (checkpoint, tmp_path / "out")))


@pytest.mark.parametrize("model_type", ["gpt2", "phi3", "falcon", "gemma3_text", "qwen3"])
def test_other_families_verify(model_type: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny_folder(tmp_path / "base", model_type)
    run = make_run(tmp_path / "run", base, target_modules=["all-linear"], rank_pattern={r".*\.1\..*": 2})
    code, said, complaints = call(capsys, run, "--out", tmp_path / "out", "--verify")
    assert (code, complaints) == (0, "")
    assert "verified PEFT's logits equal ours" in said
    assert said.count("  not this adapter: it scales all layers by one lora_alpha / r") == 2 and "serve " not in said
    assert ("it has no LoRA for models of type" in said) == (model_type in ("gpt2", "falcon"))


@pytest.mark.parametrize(("dtype", "stored"), [("bf16", "BF16"), ("fp16", "F16")])
def test_half_precision_says_what_rounding_costs(
    dtype: str, stored: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said, _ = call(capsys, run, "--out", tmp_path / "out", "--dtype", dtype, "--verify")
    entries, _ = read_safetensors(tmp_path / "out" / peft.WEIGHTS_FILE)
    assert code == 0 and {entry.dtype for entry in entries.values()} == {stored}
    assert f"{dtype} rounding moves them by" in said and "moves them by 0.0e+00" not in said


def test_a_base_that_moved_is_given_with_base_and_named_in_the_files(
    run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(base, tmp_path / "elsewhere")
    (run / "config.resolved.json").unlink()  # a checkpoint folder that was copied here alone
    code, said, _ = call(capsys, run, "--out", tmp_path / "a", "--base", tmp_path / "elsewhere", "--verify")
    assert code == 0 and "verified PEFT's" in said
    assert json.loads((tmp_path / "a/adapter_config.json").read_text())["base_model_name_or_path"] == "elsewhere"
    arguments = ("--base", tmp_path / "elsewhere", "--base-name", "org/model")
    assert call(capsys, run, "--out", tmp_path / "b", "--no-verify", *arguments)[0] == 0
    assert json.loads((tmp_path / "b/adapter_config.json").read_text())["base_model_name_or_path"] == "org/model"


def test_another_base_is_refused_whether_verified_or_not(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_folder(tmp_path / "other", dtype=torch.float32)
    for verified in ("--verify", "--no-verify"):
        code, _, complaint = call(capsys, run, "--out", tmp_path / "out", "--base", other, verified)
        assert code == 2 and "was trained on another base than" in complaint and complaint.count("\n") == 1
    assert not (tmp_path / "out").exists()


def _no_base(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((run / "config.resolved.json").read_text())
    config["model"]["path"] = "/nowhere/model"
    (run / "config.resolved.json").write_text(json.dumps(config))


def _alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "config.resolved.json").unlink()


def _no_peft(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)


def _no_memory(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "bytes_free", lambda: 1 << 29)


@pytest.mark.parametrize(
    ("hinder", "message", "code"),
    [
        (_no_base, "/nowhere/model", 2),
        (_alone, "give --base", 2),
        (_no_peft, "peft is not installed", 2),
        (_no_memory, "comparing takes 1.0 GiB of memory (the base in fp32), 0.5 GiB are free", 3),
    ],
)
def test_what_cannot_be_verified_is_written_and_said_unless_it_was_asked_for(
    hinder: Any, message: str, code: int, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    hinder(run, monkeypatch)
    found, said, _ = call(capsys, run, "--out", tmp_path / "a")
    assert found == 0 and "not verified: " in said and message in said
    assert (tmp_path / "a" / peft.WEIGHTS_FILE).is_file()
    found, _, complaint = call(capsys, run, "--out", tmp_path / "b", "--verify")
    assert found == code and message in complaint and complaint.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "run"]


def test_a_wrong_file_is_found_and_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One factor of ten is written 1 % too large."""
    right = peft.write_adapter

    def wrong(folder: Path, factors: dict[str, torch.Tensor], *rest: Any) -> None:
        right(folder, factors | {(last := list(factors)[-1]): factors[last] * 1.01}, *rest)

    monkeypatch.setattr(peft, "write_adapter", wrong)
    code, said, complaint = call(capsys, run, "--out", tmp_path / "out")
    assert code == 1 and said == "" and "nothing was written: PEFT's logits differ from ours by up to" in complaint
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_an_output_folder_must_be_new_or_empty(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert call(capsys, run, "--out", out, "--no-verify")[0] == 0
    before = {file: file.read_bytes() for file in out.iterdir()}
    code, _, complaint = call(capsys, run, "--out", out, "--no-verify")
    assert code == 2 and f"--out is {out}, which is not empty; name a new folder" in complaint
    assert {file: file.read_bytes() for file in out.iterdir()} == before
    code, _, complaint = call(capsys, run, "--out", out / peft.CONFIG_FILE, "--no-verify")
    assert code == 2 and "which is a file" in complaint


def test_full_fine_tuning_has_no_adapter(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run/checkpoints/step-000001"
    folder.mkdir(parents=True)
    write_state(folder, 1, base, LoraConfig(), method="full")
    shutil.copy(next(base.glob("*.safetensors")), folder / "weights.safetensors")
    code, _, complaint = call(capsys, tmp_path / "run", "--out", tmp_path / "out")
    assert code == 2 and "is of full fine-tuning (method: full) and holds no adapter" in complaint
    assert "put this file there as model.safetensors" in complaint


def test_a_damaged_newest_checkpoint_is_skipped_aloud(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = run / "checkpoints/step-000010" / peft.WEIGHTS_FILE
    os.truncate(file, file.stat().st_size - 1)
    code, said, complaint = call(capsys, run, "--out", tmp_path / "out", "--no-verify")
    assert code == 0 and "(step 5, " in said and complaint.startswith("skipped  ") and "step-000010" in complaint
    code, _, complaint = call(capsys, run / "checkpoints/step-000010", "--out", tmp_path / "b", "--no-verify")
    assert code == 2 and "is truncated" in complaint


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("gone", "does not exist; a run directory has checkpoints/ in it"),
        ("empty", "is neither a run directory nor a checkpoint"),
        ("young", "has no whole checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_said(
    path: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "young/checkpoints").mkdir(parents=True)
    code, _, complaint = call(capsys, tmp_path / path, "--out", tmp_path / "out")
    assert code == 2 and message in complaint and complaint.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_no_file_names_a_path_a_user_or_a_host(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run whose records are full of them; the card has what a reader needs instead."""
    home = tmp_path / "home" / "a-user-of-ours"
    run = make_run(home / "runs/x", base)
    config = json.loads((run / "config.resolved.json").read_text())
    config["data"] |= {"train": str(home / "rows/train.jsonl"), "validation": str(home / "rows/held-out.jsonl")}
    (run / "config.resolved.json").write_text(json.dumps(config))
    manifest = {"command": ["lora-scale", "train", str(home / "run.yaml")], "data": {"rows": 60, "path": str(home)}}
    (run / "manifest.json").write_text(json.dumps(manifest | {"versions": {"torch": "2.13.0"}}))
    rows = [{"step": 0, "val_loss": 3.5}, *({"step": n, "loss": 3.0, "tokens": 100} for n in range(1, 11))]
    rows[-1]["val_loss"] = 2.25
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "checkpoints/step-000010/chat_template.jinja").write_text("{{ messages }}")
    assert call(capsys, run, "--out", tmp_path / "out", "--verify", "--base", base)[0] == 0
    files = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert files["chat_template.jinja"] == b"{{ messages }}"
    for secret in (str(tmp_path), "a-user-of-ours", os.uname().nodename, str(Path.home()), str(base.parent)):
        assert not [name for name, content in files.items() if secret.encode() in content], secret
    card = files["README.md"].decode()
    for told in ("train.jsonl", "held-out.jsonl", "| 10 | 2.2500 |", "| tokens trained | 1,000 |", "rows | 60 |"):
        assert told in card, card
    assert fingerprint(open_folder(base)) in card and "base_model:" not in card  # tiny-llama is no name on the hub
    assert "base_model: org/tiny" in adapter_card("org/tiny", None, json.loads(files["adapter_config.json"]), 3, None)


@pytest.mark.parametrize("name", ["/data/models/llama", "./llama", "~/llama", "."])
def test_a_base_name_is_no_path(name: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, complaint = call(capsys, run, "--out", tmp_path / "out", "--base-name", name, "--no-verify")
    assert code == 2 and f"--base-name is {name}, a place on this machine" in complaint
    assert not (tmp_path / "out").exists()


def test_the_revision_of_a_base_from_the_hub_is_kept(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    cached = tmp_path / "hub/models--org--tiny/snapshots" / commit
    shutil.copytree(base, cached)
    run = make_run(tmp_path / "run", cached)
    assert call(capsys, run, "--out", tmp_path / "out", "--no-verify")[0] == 0
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/tiny", commit)


def test_an_export_can_be_exported_again(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(capsys, run, "--out", tmp_path / "a", "--no-verify")[0] == 0
    code, said, _ = call(capsys, tmp_path / "a", "--out", tmp_path / "b", "--dtype", "bf16", "--no-verify")
    assert code == 0 and f"from     {tmp_path / 'a'}\n" in said
    assert peft.base_fingerprint(tmp_path / "b") == peft.base_fingerprint(tmp_path / "a") is not None


def test_a_full_disk_is_one_line_and_leaves_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A limit on the size of files stands for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        code, _, complaint = call(capsys, run, "--out", tmp_path / "out", "--no-verify")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 3 and f"{tmp_path / 'out'} was not written: File too large" in complaint
    assert complaint.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["run"]


def test_help_opens_with_what_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    code, said, _ = call(capsys, "--help")
    assert code == 0 and "for full weights see `lora-scale merge`" in " ".join(said.split())
