"""`lora-scale report` on run directories of every state: whole, unfinished, resumed, damaged, and none at all."""

import html
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from timing import children_seconds

from lora_scale.cli import main
from lora_scale.spec import named, planning
from lora_scale.spec.config import RunConfig
from lora_scale.spec.shapes import architecture
from lora_scale.spec.states import Grid
from lora_scale.storage import weights
from lora_scale.storage.runlog import RankMemory, RunLog

GIB = 1 << 30
ROOT = Path(__file__).parent.parent
MANIFEST: dict[str, Any] = {
    "command": ["lora-scale", "train", "run.yaml", "lora.r=4"],
    "commit": "0123456789abcdef",
    "versions": {"lora-scale": "0.1.0", "torch": "2.13.0"},
    "hardware": {"device": "NVIDIA H200", "memory_gib": 139.8},
    "ranks": 2,
    "started": "2026-11-22T00:00:00+00:00",
    "resumed_step": 0,
    "base_fingerprint": "sha256:feed",
    "config_sha256": "beef",
    "parameters": {"total": 1_000_000, "trainable": 1_000, "active": 900_000},
    "load": {"bytes": 14_000_000_000, "seconds": 2.0},
    "data": {"rows": 1200, "truncated_rows": 3},
}
CONFIG = {
    "model": {"path": "x"}, "data": {"train": "x"}, "run_dir": "x", "train": {"max_steps": 10},
}  # fmt: skip


def row(step: int, **more: Any) -> dict[str, Any]:
    memory = {"peak_gib": 50.0 + step, "allocated_gib": 20.0, "rss_anon_gib": 3.5}
    speed = {"tokens_per_second": 100.0 * step, "tokens_per_second_per_gpu": 50.0 * step, "seconds": 2.0 / step}
    phases = {"forward": 0.5, "backward": 1.0}
    base = {"step": step, "loss": 4.0 / step, "lr": 1e-4, "grad_norm": 0.5, "memory": memory, "phase_seconds": phases}
    return base | speed | more


def write_run(run: Path, rows: list[dict[str, Any]], **manifest: Any) -> Path:
    resolved = RunConfig.model_validate(CONFIG).model_dump(mode="json")
    with RunLog(run, config_text="", resolved=resolved) as log:
        for one in rows:
            log.write_row(one)
        log.write_manifest({key: value for key, value in (MANIFEST | manifest).items() if value is not None})
    return run


def test_rows_and_tokens_of_each_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def seen(chat: int, code: int) -> dict[str, Any]:
        return {"sources": {"chat": {"rows": 3, "tokens": chat}, "code": {"rows": 1, "tokens": code}}}

    sources = {"chat": {"weight": 1.0, "rows": 900}, "code": {"weight": 0.5, "rows": 300}}
    rows = [row(1, **seen(1000, 500)), row(2, **seen(1400, 100))]
    run = write_run(tmp_path / "mixed", rows, data=MANIFEST["data"] | {"sources": sources})
    _, out, _ = report(capsys, run)
    found = section(out, "Data and loading")
    assert "| chat | 1 | 900 | 6 | 2,400 | 80.0% |" in found and "| code | 0.5 | 300 | 2 | 600 | 20.0% |" in found
    assert "| rows | 1,200 |" in found and "{" not in found
    _, out, _ = report(capsys, write_run(tmp_path / "one", [row(1)]))
    assert "source" not in section(out, "Data and loading"), "one source is the whole data"


def write_checkpoint(run: Path, step: int) -> Path:
    folder = run / "checkpoints" / f"step-{step:06d}"
    folder.mkdir()
    weights.write_safetensors(folder / "adapter_model.safetensors", [("a", "F32", (256, 1024))], [bytes(1 << 20)])
    weights.write_safetensors(folder / "optimizer.safetensors", [("a", "F32", (512, 1024))], [bytes(2 << 20)])
    (folder / "state.json").write_text(json.dumps({"step": step}))
    return folder


def report(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exit:
        main(["report", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(exit.value.code or 0), out, err


def section(text: str, title: str) -> str:
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    rows = [
        {"step": 0, "val_loss": 4.5},
        *(row(step) for step in range(1, 10)),
        row(10, val_loss=2.5, save_seconds=0.25),
    ]
    rows[5]["save_seconds"] = 0.5
    return write_run(tmp_path / "first", rows)


@pytest.mark.parametrize(
    ("parallel", "said"),
    [
        ({"zero_stage": 3, "tensor_parallel_size": 1}, "ZeRO-3"),
        ({"zero_stage": 0, "tensor_parallel_size": 2}, "tensor parallel 2"),
        ({"zero_stage": 3, "tensor_parallel_size": 4}, "tensor parallel 4, ZeRO-3"),
    ],
)
def test_the_layout_is_said(capsys: pytest.CaptureFixture[str], run: Path, parallel: dict[str, int], said: str) -> None:
    config = json.loads((run / "config.resolved.json").read_text())
    (run / "config.resolved.json").write_text(json.dumps(config | {"parallel": parallel}))
    assert f"of x (lora, {said}, bf16); loss" in report(capsys, run)[1]


def test_a_finished_run(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    write_checkpoint(run, 10)
    code, out, err = report(capsys, run)
    assert code == 0 and err.startswith("written: ")
    assert (run / "report.md").read_text() == out
    assert out.startswith("# Run first\n\n10 optimizer steps of x (lora, ZeRO-3, bf16); loss 4.0000 -> 0.4000; ")
    assert "validation loss 4.5000 -> 2.5000; 700 tokens/s on 2 ranks; peak 60.0 GiB allocated on the first GPU." in out
    ran = section(out, "What ran")
    for text in (
        "`lora-scale train run.yaml lora.r=4`",
        "0123456789abcdef",
        "torch 2.13.0",
        "NVIDIA H200",
        "sha256:feed",
    ):
        assert text in ran
    assert "| trained | 1,000 (0.100%) |" in ran
    assert "| weights read, first rank | 14.0 GB in 2.0 s (7.00 GB/s) |" in section(out, "Data and loading")
    shown = "| 10 | 3.0 MiB | 0.25 s | adapter_model.safetensors 1.0 MiB, optimizer.safetensors 2.0 MiB |"
    assert shown in section(out, "Checkpoints")
    assert "Written too, and deleted since: step 5 in 0.50 s." in section(out, "Checkpoints")


def test_figures_are_those_of_the_rows(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    _, out, _ = report(capsys, run)
    losses = [4.0 / step for step in range(1, 11)]
    assert f"| loss | 4 | 0.4 | {median(losses):.5g} | 0.4 | 4 |" in section(out, "Loss")
    assert "| validation loss | 4.5 | 2.5 | 3.5 | 2.5 | 4.5 |" in section(out, "Loss")
    speed = section(out, "Speed")  # steps 4 to 10
    assert speed.startswith("\n7 steps, the first 3 left out.\n")
    assert "| tokens/s | 700 | 400 | 1,000 |" in speed
    assert "| seconds in backward | 1 | 1 | 1 |" in speed
    assert "| peak allocated | 60.00 GiB |" in section(out, "Where the memory went")
    assert "MFU" not in speed, "no record has it"


def planned() -> dict[str, Any]:
    """A plan as the manifest holds it, of llama-7.2b on two GPUs."""
    return planning.plan(
        planning.job_of(architecture(named.shape("llama-7.2b")), RunConfig.model_validate(CONFIG), Grid(2))
    )


def measured(plan: dict[str, Any]) -> dict[str, Any]:
    """A row's memory as a GPU would write it, 2% below what was planned."""
    run = plan["this_run"]
    held = {key: run["model_states"][key] for key in ("base", "trained", "master", "gradients", "adam", "bucket")}
    peak = run["allocated"] / 1.02
    phases = {"backward": {"peak": int(peak), "end": run["model_states"]["total"], "peak_reserved": int(peak * 1.1)}}
    figures = {"peak_gib": peak / GIB, "peak_reserved_gib": peak * 1.1 / GIB, "rss_peak_gib": 2.0, "rss_anon_gib": 1.0}
    return figures | {"categories": held, "tracked": sum(held.values()), "unexplained": 1 << 20, "phases": phases}


def test_the_plan_stands_beside_the_measurement(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan = planned()
    run = write_run(tmp_path / "run", [row(1, memory=measured(plan))], plan=plan | {"warnings": ["r is large"]})
    _, out, _ = report(capsys, run)
    memory = section(out, "Where the memory went")
    assert "planned were" in memory and "(+2.0%).**" in memory
    assert "| base weights, frozen | 6.7 GiB | 6.7 GiB | +0.0% |" in memory
    assert re.search(r"\| \*\*peak allocated\*\* \| .* \| .* \| \+2\.0% \|", memory)
    assert "Unexplained between steps: 1.0 MiB" in memory
    full = section(out, "LoRA beside full fine-tuning")
    assert "|  | this run | full fine-tuning |" in full and "| **model states, exact** | 6.8 GiB | 60.9 GiB |" in full
    assert "Full fine-tuning takes 9.0 times the model states" in full
    assert "- r is large" in section(out, "Warnings")
    picture = (run / "report-memory.svg").read_text()
    for text in ("predicted: at the loss", "measured: backward", "measured: between steps", "base weights, frozen"):
        assert text in picture


def test_ranks_and_their_spread(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [row(1)])
    for rank, peak in enumerate((10.0, 12.5)):
        with RankMemory(run, rank) as log:
            log.write({"step": 1, "peak_gib": peak, "tracked": 1 << 30})
    ranks = section(report(capsys, run)[1], "Memory, rank by rank")
    assert "Largest minus smallest over 2 ranks: peak allocated 2.50 GiB." in ranks
    assert "| 1 | 12.50 GiB | 1.0 GiB |" in ranks


def test_the_page_is_one_file_that_opens_offline(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    """Everything that the Markdown says, the pictures inside, nothing fetched, and what comes from outside escaped."""
    manifest = json.loads((run / "manifest.json").read_text())
    plan = planned()
    manifest |= {"command": ["<script>alert(1)</script>"], "plan": plan}
    (run / "manifest.json").write_text(json.dumps(manifest))
    _, out, _ = report(capsys, run)
    text = (run / "report.html").read_text()
    assert len(text) < 2_000_000 and text.count("<svg") == 3 and "<script>" not in text
    assert not re.search(r"(?:src|href)=[\"'](?!#)", text) and "@import" not in text
    seen = html.unescape(re.sub(r"<[^>]+>", " ", text))
    for line in out.splitlines():
        for cell in re.split(r"[|]", re.sub(r"[*`#]|^- |!\[.*", "", line)):
            if cell.strip(" -:") and "alert" not in cell:
                assert " ".join(cell.split()) in " ".join(seen.split()), cell


def test_what_is_missing_is_said_to_be_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [])
    (run / "manifest.json").write_text("{}")
    code, out, _ = report(capsys, run)
    assert code == 0
    assert "No step yet" in out and "- no step has been recorded" in section(out, "Warnings")
    for text in ("Loss: not recorded.", "Validation loss: not recorded.", "Speed: not recorded."):
        assert text in out
    assert "| commit | not recorded (an installed package has none) |" in out
    assert "| parameters | not recorded |" in out and "| weights read, first rank | not recorded |" in out
    assert "Computed before the run: not recorded." in out and "Measured: not recorded." in out
    assert "Memory by rank: not recorded." in out
    assert "None." in section(out, "Checkpoints")
    assert "svg" not in out and not list(run.glob("*.svg"))
    assert "not recorded" in (run / "report.html").read_text()


def test_a_cpu_run_has_no_gpu_memory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [row(1, memory={"rss_anon_gib": 1.5})]
    _, out, _ = report(capsys, write_run(tmp_path / "run", rows, hardware={"device": "cpu"}))
    assert "| host memory, anonymous | 1.50 GiB |" in out
    assert "GPU memory: not recorded (the run had no GPU)." in out
    assert "peak" not in out.split("## Warnings")[0]


@pytest.mark.parametrize(
    ("rows", "manifest", "warning"),
    [
        ([row(1), row(2)], {}, "the records end at step 2 of 10"),
        ([row(1), row(2, loss=float("nan"))], {}, "the loss was not finite, or not recorded, at 1 step, first 2"),
        ([row(1, val_loss=2.0), row(10, val_loss=2.1)], {}, "validation loss did not fall: 2.0000 before, 2.1000"),
        (
            [row(1, val_loss=3.0), row(2, val_loss=2.0), row(10, val_loss=2.5)],
            {},
            "the last validation loss, 2.5000, is above the least, 2.0000",
        ),
        ([row(10)], {}, "3 rows longer than data.seq_len were cut"),
        ([row(10)], {"commit": "abc+changes"}, "the program had changes that its commit does not hold"),
    ],
)
def test_warnings(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, rows: list[Any], manifest: dict[str, Any], warning: str
) -> None:
    _, out, _ = report(capsys, write_run(tmp_path / "run", rows, **manifest))
    assert f"- {warning}" in section(out, "Warnings")


def test_no_warning_without_a_reason(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [{"step": 0, "val_loss": 3.0}, row(10, val_loss=2.0)]
    _, out, _ = report(capsys, write_run(tmp_path / "run", rows, data={"rows": 5, "truncated_rows": 0}))
    assert section(out, "Warnings").strip() == "None."


def test_a_damaged_checkpoint_is_named(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    path = write_checkpoint(run, 10) / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    _, out, _ = report(capsys, run)
    assert "- checkpoint step-000010 is damaged: " in section(out, "Warnings")
    assert "None." in section(out, "Checkpoints")


def test_out_and_the_pictures_beside_it(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    _, out, _ = report(capsys, run, "--out", tmp_path / "page.html")
    assert (tmp_path / "page.md").read_text() == out and not (run / "report.md").exists()
    assert "![Loss by step](page-loss.svg)" in out and "![Tokens/s by step](page-speed.svg)" in out
    for name in ("loss", "speed"):
        assert ET.parse(tmp_path / f"page-{name}.svg").getroot().tag == "{http://www.w3.org/2000/svg}svg"
    before = {path.name: path.read_bytes() for path in tmp_path.glob("page*")}
    report(capsys, run, "--out", tmp_path / "page.html")
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob("page*")}, "the same records, another page"


def test_every_table_row_has_as_many_cells_as_its_head(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    write_checkpoint(run, 10)
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"command": ["a|b", "c\nd"]}))
    _, out, _ = report(capsys, run)
    for block in out.split("\n\n"):
        if block.startswith("|"):
            cells = {line.replace("\\|", "").count("|") for line in block.splitlines()}
            assert len(cells) == 1, block


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not a folder; give the run directory"),
        (["."], "has no metrics.jsonl; give the run directory"),
    ],
)
def test_mistakes(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = report(capsys, *arguments)
    assert (code, out) == (2, "") and message in err


def test_out_in_a_folder_that_is_not_there(capsys: pytest.CaptureFixture[str], run: Path) -> None:
    code, _, err = report(capsys, run, "--out", run / "pages" / "a.md")
    assert code == 2 and "is no folder; make it first" in err


def test_it_draws_within_four_seconds_without_torch(run: Path) -> None:
    """Processor seconds, the best of two; most of them are matplotlib's import and first picture."""
    code = (
        "import sys; from lora_scale.cli import main\n"
        f"try: main(['report', {str(run)!r}])\n"
        "except SystemExit as exit: assert not exit.code, exit.code\n"
        "heavy = {'torch', 'deepspeed', 'transformers', 'pandas', 'matplotlib.pyplot'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    seconds = []
    for _ in range(2):
        started = children_seconds()
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env)
        seconds.append(children_seconds() - started)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 4.0, seconds
