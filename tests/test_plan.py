"""`lora-scale plan` as a user meets it: the answer, its exit code, the figures, words for mistakes, and how quick."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from timing import children_seconds
from tiny import tiny_folder

from lora_scale.cli import main
from lora_scale.spec import named
from lora_scale.storage import weights

ROOT = Path(__file__).parent.parent


def answer(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `lora-scale plan`."""
    capsys.readouterr()  # what the libraries that made a model had to say
    with pytest.raises(SystemExit) as exit:
        main(["plan", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(exit.value.code or 0), out, err


def figures(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> dict[str, Any]:
    code, out, err = answer(capsys, *arguments, "--json")
    assert code in (0, 3), err
    return json.loads(out)


def config(folder: Path, path_of_model: str | Path, **changes: Any) -> Path:
    path = folder / "run.yaml"
    tree = {
        "model": {"path": str(path_of_model)},
        "data": {"train": "rows.jsonl"},
        "run_dir": "run",
        "train": {"max_steps": 3},
    }
    path.write_text(json.dumps(tree | changes))
    return path


def test_gpt3_as_the_paper_counts_it(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = answer(capsys, "--shape", "gpt3-175b", "lora.r=4")
    assert code == 0
    assert "trains  18,874,368 parameters" in out
    assert re.search(r"export, 16 bits +36\.0 MiB", out)
    assert re.search(r"training checkpoint +216\.0 MiB", out)  # 72 fp32 values + 144 moments
    assert re.search(r"weights that train +72\.0 MiB", out) and re.search(r"Adam's two moments +144\.0 MiB", out)
    assert re.search(r"mixed-precision Adam, 16 bytes a parameter, computed +2\.8 TB +349\.5 GB +8\.0x", out)
    assert re.search(r"quoted, not computed +1\.2 TB +350 GB +3\.4x", out)
    assert "Assumed, not measured: CUDA context" in out


def test_only_gpt3_has_the_papers_column(capsys: pytest.CaptureFixture[str]) -> None:
    assert "quoted" not in answer(capsys, "--shape", "opt-175b")[1]


@pytest.mark.parametrize(
    ("arguments", "code", "first"),
    [
        (["--shape", "llama-7.2b"], 0, r"needs 14\.\d GiB a GPU on 1 GPU; --gpu says whether that fits"),
        (["--shape", "llama-7.2b", "--gpu", "h200"], 0, r"fits: 14\.\d of 139 GiB a GPU on 1 GPU"),
        (["--shape", "llama-100.7b", "--gpu", "h200"], 3, r"does not fit: 5\d\.\d GiB short, 19\d\.\d of 139 GiB"),
        (["--shape", "llama-100.7b", "--gpu", "h200", "--gpus-per-node", "2"], 0, r"fits: 10\d\.\d of .* on 2 GPUs"),
        (["--shape", "llama-7.2b", "--gpu", "14"], 3, r"does not fit: 0\.\d GiB short, 14\.\d of 14 GiB"),
        (["--shape", "llama-7.2b", "--gpu", "15", "--nodes", "4"], 0, r"fits: \d\.\d of 15 GiB a GPU on 4 GPUs"),
    ],
)
def test_the_answer_is_the_first_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, first: str
) -> None:
    got, out, err = answer(capsys, *arguments)
    assert (got, err) == (code, "")
    assert re.match(first, out.splitlines()[0]), out.splitlines()[0]
    row = figures(capsys, *arguments)
    assert row["fits"] is (None if "--gpu" not in arguments else code == 0)
    assert bool(row["ways_out"]) is (code == 3) and ("would make it fit" in out) is (code == 3)


def test_states_shrink_with_ranks_and_full_fine_tuning_is_beside(capsys: pytest.CaptureFixture[str]) -> None:
    one = figures(capsys, "--shape", "llama-7.2b")
    eight = figures(capsys, "--shape", "llama-7.2b", "--nodes", "2", "--gpus-per-node", "4")
    assert eight["ranks"] == 8
    assert eight["this_run"]["model_states"]["base"] == pytest.approx(
        one["this_run"]["model_states"]["base"] / 8, rel=1e-5
    )  # the last norm is whole on each
    ratio = one["full_fine_tuning"]["model_states"]["total"] / one["this_run"]["model_states"]["total"]
    assert 8.5 < ratio < 9.1  # 18 bytes a parameter against 2
    assert "full_fine_tuning" not in figures(capsys, "--shape", "llama-7.2b", "method=full")


def test_every_named_shape_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    for name in named.SHAPES:
        row = figures(capsys, "--shape", name)
        assert row["this_run"]["trainable"] > 0 and row["parameters"]["total"] > 1e8, name


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3_moe", "mixtral", "gpt_neox"])
def test_a_folder_is_checked_against_its_headers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, model_type: str
) -> None:
    folder = tiny_folder(tmp_path / "model", model_type)
    row = figures(capsys, config(tmp_path, folder))
    assert row["parameters"]["total"] == sum(entry.numel for entry in in_files(folder).values())
    assert "agree" in row["model"]


def in_files(folder: Path) -> dict[str, Any]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in weights.read_safetensors(file)[0].items()}


def test_config_json_alone_is_enough_before_a_download(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    run = config(tmp_path, folder)
    whole = figures(capsys, run)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    alone = figures(capsys, run)
    assert "config.json alone" in alone["model"]
    assert {**alone, "model": ""} == {**whole, "model": ""}


def test_a_type_without_a_row_is_counted_from_headers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model", "llama")
    base = {"path": str(folder), "attention": "sdpa"}  # documents are for known types only
    run = config(tmp_path, folder, model=base, lora={"target_modules": ["q_proj"]}, kernels="none")
    whole = figures(capsys, run)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"model_type": "llama"', '"model_type": "llama9"'))
    code, out, _ = answer(capsys, run)
    assert code == 0 and "Model type llama9 has no row here" in out
    row = figures(capsys, run)
    assert row["parameters"] == whole["parameters"]
    assert row["this_run"] == whole["this_run"] | {"by_analogy": True} and "by analogy with Llama" in out


def test_batch_arithmetic(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    run = config(tmp_path, folder, train={"max_steps": 3, "global_batch_size": 24, "micro_batch_size": 2})
    _, out, _ = answer(capsys, run, "--gpus-per-node", "3", "data.seq_len=512")
    assert "step    24 x 512 tokens = 2 a pass x 3 GPUs x 4 accumulated" in out


def test_fused_projections_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = answer(capsys, "--shape", "gpt2-small")
    assert "gpt2 keeps q, k and v in one matrix: adapting q and v adapts attn.c_attn" in out
    assert "keeps" not in answer(capsys, "--shape", "llama-7.2b")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "plan needs a CONFIG, or --shape NAME"),
        (["a.yaml", "b.yaml"], "'b.yaml' is neither KEY=VALUE nor an option; plan takes one CONFIG"),
        (["a.yaml"], "a.yaml: no such file"),
        (["--shape", "gpt3"], "--shape is 'gpt3', which is not known; did you mean gpt3-175b?"),
        (["--shape", "gpt3-175b", "--gpu", "h300"], "--gpu is 'h300'; it must be one of h200, h100-80"),
        (["--shape", "gpt3-175b", "--gpu", "-1"], "--gpu is '-1'"),
        (["--shape", "gpt3-175b", "--gpu", "nan"], "--gpu is 'nan'"),
        (["--shape", "gpt3-175b", "--gpu", ""], "--gpu is ''"),
        (["--shape", "gpt3-175b", "--nodes", "0"], "Invalid value for '--nodes'"),
        (["--shape", "gpt3-175b", "lora.rank=4"], "unknown key lora.rank; did you mean lora.r?"),
        (["--shape", "gpt3-175b", "lora.target_modules=[w]"], "'w', which names no linear layer of this gpt3"),
        (["--shape", "gpt3-175b", "--gpus-per-node", "3", "train.global_batch_size=8"], "must be a multiple of 3"),
        (["--shape", "gpt3-175b", "train.micro_batch_size=x"], "train.micro_batch_size is 'x'"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, out, err = answer(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err and "Traceback" not in err


def test_models_that_are_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = answer(capsys, config(tmp_path, "meta-llama/Llama-3.1-70B"))
    assert code == 2 and "which is no folder here; plan downloads nothing" in err and "llama-3.1-70b" in err
    (tmp_path / "model").mkdir()
    code, _, err = answer(capsys, config(tmp_path, tmp_path / "model"))
    assert code == 2 and "config.json" in err
    (tmp_path / "model" / "config.json").write_text("{")
    code, _, err = answer(capsys, config(tmp_path, tmp_path / "model"))
    assert code == 2 and "is not valid JSON" in err
    (tmp_path / "model" / "config.json").write_text('{"model_type": "mamba"}')
    code, _, err = answer(capsys, config(tmp_path, tmp_path / "model"))
    assert code == 2 and "model_type 'mamba', whose parameters are not known here" in err


def test_headers_that_disagree_with_the_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | {"intermediate_size": 40}))
    code, _, err = answer(capsys, config(tmp_path, folder))
    assert code == 2 and "needs (40, 32)" in err


def test_it_answers_within_a_second_without_torch(tmp_path: Path) -> None:
    """Processor seconds, the best of three: other work on the machine must not decide."""
    code = (
        "import sys; from lora_scale.cli import main\n"
        f"try: main(['plan', {str(config(tmp_path, tiny_folder(tmp_path / 'model')))!r}])\n"
        "except SystemExit as exit: assert not exit.code, exit.code\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'numpy', 'datasets', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    seconds = []
    for _ in range(3):
        started = children_seconds()
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        seconds.append(children_seconds() - started)
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout, "no colours where there is no terminal"
    assert min(seconds) < 1.0, seconds
