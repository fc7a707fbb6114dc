"""`lora-scale analyze`: what it takes, what it writes, and what it refuses. Arithmetic is `test_analysis.py`'s."""

import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from tiny import tiny_folder
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
import subspaces

from lora_scale import cli
from lora_scale.adapters import peft, survey
from lora_scale.adapters.lora import adapt, draw_a
from lora_scale.parallel.checkpoint import State
from lora_scale.spec.config import RunConfig
from lora_scale.storage.folder import fingerprint, open_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny-llama")


def make_run(
    run: Path,
    base: Path,
    seed: int = 0,
    draw: int = 1,
    steps: tuple[int, ...] = (10,),
    val_loss: float = 1.5,
    zero: bool = False,
    **lora: Any,
) -> Path:
    """A run directory as `train` leaves it: A as the seed draws it, B random and growing with the step."""
    tree = {
        "model": {"path": str(base)},
        "data": {"train": "rows.jsonl"},
        "run_dir": str(run),
        "seed": seed,
        "train": {"epochs": 1},
        "lora": {"r": 4, "lora_alpha": 8.0, **lora},
    }
    cfg = RunConfig.model_validate(tree)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    layers = adapt(model, cfg.lora, cfg.seed)
    generator = torch.Generator().manual_seed(draw)
    for step in steps:
        folder = run / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        factors = {}
        for name, layer in layers.items():
            factors[f"{name}.lora_A"] = layer.lora_A.data
            b = torch.randn(layer.lora_B.shape, generator=generator) * step / 100
            factors[f"{name}.lora_B"] = torch.zeros_like(b) if zero else b
        config = peft.adapter_config(model, layers, cfg.lora, base.name)
        peft.write_adapter(folder, factors, config)
        state = State(
            step=step,
            method="lora",
            seed=seed,
            global_batch_size=8,
            tokens_seen=9,
            base_fingerprint=fingerprint(open_folder(base)),
            config_sha256="",
            data={},
            lora=cfg.lora.model_dump(mode="json"),
            versions={},
        )
        (folder / "state.json").write_text(json.dumps(asdict(state)))
    (run / "config.resolved.json").write_text(json.dumps(cfg.model_dump(mode="json")))
    rows = [{"step": 0, "val_loss": 3.0}, {"step": steps[-1], "val_loss": val_loss}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def run_cli(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(["analyze", *map(str, arguments)])
    return int(stop.value.code or 0)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a refusal."""
    capsys.readouterr()
    assert run_cli(*arguments) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


class Page(HTMLParser):
    """What the page asks a browser to fetch, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data") and value and not value.startswith(("#", "data:")):
                self.fetched.append(f"{tag} {name}={value}")


def test_the_papers_record_is_the_pages(base: Path, tmp_path: Path) -> None:
    """experiments/subspaces.py: its medians are those of the page's own JSON."""
    runs = [make_run(tmp_path / name, base, draw=draw) for name, draw in (("one", 1), ("other", 2))]
    for run in runs:
        (run / "manifest.json").write_text(json.dumps({"commit": "c"}))
    _, record = subspaces.look(runs)
    assert run_cli(*runs) == 0
    page = json.loads((runs[0] / "analysis.json").read_text())
    for row in record["updates"]:
        modules = [m for m in page["modules"] if m["group"] == row["group"]]
        assert row["effective_rank"] == median(m["spectra"][row["run"]]["effective_rank"] for m in modules)
        assert row["amplification"] == pytest.approx(median(m["amplification"][row["run"]] for m in modules))
    for row, pair in zip(record["pairs"], page["pairs"], strict=True):
        assert row["phi"]["dW, output side"] == pytest.approx(
            [pair["phi"]["dW, output side"][at][at] for at in (0, -1)]
        )
    assert [run["val_loss"] for run in record["runs"]] == [[3.0, 1.5]] * 2 and record["runs"][0]["trained_by"] == "c"


def test_three_runs_side_by_side(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page opens offline, is small, and says what its numbers say."""
    first = make_run(tmp_path / "first", base, seed=0, draw=1, steps=(5, 10), val_loss=1.50)
    again = make_run(tmp_path / "again", base, seed=1, draw=2, val_loss=1.52)
    wide = make_run(tmp_path / "wide", base, seed=0, draw=1, val_loss=1.51, r=8)
    assert run_cli(first, again, wide) == 0
    text = (first / "analysis.html").read_text()
    page = Page(text)
    assert not page.fetched and "@import" not in text and not re.search(r"url\((?!#)", text)
    assert len(text) < 2_000_000
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ElementTree.fromstring(svg)
    assert text.count("<svg") == 5
    found = json.loads((first / "analysis.json").read_text())
    assert [row["module"] for row in found["modules"]] == [
        f"model.layers.{layer}.self_attn.{name}_proj" for layer in (0, 1) for name in "qv"
    ]
    pairs = {(tuple(p["runs"]), p["group"]): p["phi"] for p in found["pairs"]}
    assert len(pairs) == 6
    same_seed = pairs[("first", "wide"), "self_attn.q_proj"]
    assert same_seed[survey.START][3][7] == pytest.approx(1.0)  # r = 8 draws r = 4's rows first
    other_seed = pairs[("first", "again"), "self_attn.q_proj"]
    assert other_seed[survey.START][3][3] < 0.9
    assert found["norms_over_steps"]["first"]["self_attn.q_proj"][0][0] == 5 and "wide" not in found["norms_over_steps"]
    words = (first / "analysis.md").read_text()
    assert "first 1.5000, again 1.5200, wide 1.5100" in words
    assert "Runs that differ in the seed alone lie 0.0200 apart, as much as any two" in words
    assert "Both have seed 0, so their A began alike (phi 1.00 before training)" in words
    for said in found["conclusions"]:
        assert said in capsys.readouterr().out or said in words


def test_one_peft_folder_and_its_base(base: Path, tmp_path: Path) -> None:
    """A folder that says nothing of a run; the base is given, and its weight's own figures are torch's."""
    folder = make_run(tmp_path / "run", base) / "checkpoints" / "step-000010"
    (folder / "state.json").unlink()
    assert run_cli(folder, "--base", base, "--out", tmp_path / "one.html") == 0
    assert not (folder / "analysis.html").exists()
    found = json.loads((tmp_path / "one.json").read_text())
    row = found["modules"][1]
    weight = (
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).get_submodule(row["module"]).weight.detach()
    )
    correlation = row["correlations"]["step-000010"]
    assert correlation["weight_norm"] == pytest.approx(weight.norm().item(), rel=1e-6)
    values = torch.linalg.svdvals(weight.double())[:4]
    assert correlation["from_weight"] == pytest.approx(values.norm().item(), rel=1e-6)
    factors = peft.read_adapter(folder).factors
    delta = 2.0 * factors[row["module"] + ".lora_B"] @ factors[row["module"] + ".lora_A"]
    u, values, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    spectrum = row["spectra"]["step-000010"]
    assert spectrum["values"] == pytest.approx(values[:4].tolist(), rel=1e-5)
    own = (u[:, :4].T @ weight.double() @ vh[:4].T).norm().item()
    assert correlation["from_update"] == pytest.approx(own, rel=1e-4)
    assert row["amplification"]["step-000010"] == pytest.approx(delta.norm().item() / own, rel=1e-4)
    assert "val_loss" not in "".join(found["conclusions"])


def test_a_conv1d_is_read_the_right_way_round(tmp_path: Path) -> None:
    """GPT-2 keeps (in, out); attn.c_proj is square, so only the adapter's own word tells."""
    base = tiny_folder(tmp_path / "gpt2", "gpt2")
    run = make_run(tmp_path / "run", base, target_modules=["o"])
    assert run_cli(run) == 0
    row = json.loads((run / "analysis.json").read_text())["modules"][0]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weight = model.get_submodule(row["module"]).weight.detach().T.double()
    factors = peft.read_adapter(run / "checkpoints" / "step-000010").factors
    u, _, vh = torch.linalg.svd((factors[row["module"] + ".lora_B"] @ factors[row["module"] + ".lora_A"]).double())
    own = (u[:, :4].T @ weight @ vh[:4].T).norm().item()
    assert row["correlations"]["run"]["from_update"] == pytest.approx(own, rel=1e-4)


def test_scaling_is_that_of_training() -> None:
    """alpha / r, alpha / sqrt(r), and a pattern's alpha."""
    a, b = draw_a(0, "x", 4, 8, "kaiming"), torch.ones(8, 4)
    factors = {f"{module}.lora_{f}": t for module in ("m.x", "m.y") for f, t in (("A", a), ("B", b))}
    for config, wanted in (
        ({"r": 4, "lora_alpha": 8}, (2.0, 2.0)),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, (4.0, 4.0)),
        ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"y": 12}}, (2.0, 3.0)),
    ):
        subject = survey.Subject("s", peft.Adapter(config, factors))
        assert (subject.factors("m.x")[2], subject.factors("m.y")[2]) == wanted


def test_what_cannot_be_looked_at_is_said_in_one_line(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", base)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty holds no adapter: neither adapter_config.json nor a whole checkpoint" in refused(capsys, empty)
    assert "nowhere does not exist" in refused(capsys, tmp_path / "nowhere")
    assert "is given twice" in refused(capsys, run, run)

    narrow = tiny_folder(tmp_path / "narrow", hidden_size=16)
    other = make_run(tmp_path / "other", narrow)
    assert "other was trained on another base than run" in refused(capsys, run, other)
    for path in other.glob("checkpoints/*/state.json"):
        path.unlink()
    (step,) = other.glob("checkpoints/*")
    line = refused(capsys, run, step)
    assert "are of different bases: model.layers.0.self_attn.q_proj has (16, 16) weights" in line
    assert "was trained on another base than" in refused(capsys, run, "--base", narrow)

    mlp = make_run(tmp_path / "mlp", base, target_modules=["mlp"])
    assert "mlp adapts other modules than run (model.layers.0.mlp.gate_proj and not" in refused(capsys, run, mlp)

    (weights,) = make_run(tmp_path / "sick", base).glob("checkpoints/*/adapter_model.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + torch.tensor([float("nan")]).numpy().tobytes())
    assert "holds a value that is not finite" in refused(capsys, tmp_path / "sick")

    zero = make_run(tmp_path / "zero", base, zero=True)
    assert "is zero in every module" in refused(capsys, zero)
    assert "name a file that ends in .html" in refused(capsys, run, "--out", tmp_path / "page.pdf")
    assert "nothing is written into it; name the page with --out" in refused(capsys, next(run.glob("checkpoints/*")))
    assert not list(tmp_path.glob("**/analysis.*"))


def test_losses_of_other_rows_are_not_compared(base: Path, tmp_path: Path) -> None:
    one, other = make_run(tmp_path / "one", base), make_run(tmp_path / "other", base, seed=1)
    resolved = other / "config.resolved.json"
    resolved.write_text(resolved.read_text().replace('"seq_len": 1024', '"seq_len": 512'))
    assert run_cli(one, other, "--out", tmp_path / "page.html") == 0
    assert "not comparable" in (tmp_path / "page.md").read_text()


def test_modules_that_only_some_adapt_are_left_out(base: Path, tmp_path: Path) -> None:
    run, more = make_run(tmp_path / "run", base), make_run(tmp_path / "more", base, target_modules=["q", "k", "v", "o"])
    assert run_cli(run, more) == 0
    found = json.loads((run / "analysis.json").read_text())
    assert len(found["modules"]) == 4
    assert (
        "Only the 4 modules that all of them adapt are compared (run 4, more 8)." in (run / "analysis.md").read_text()
    )


def test_a_base_that_is_gone_leaves_the_rest(base: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", base)
    resolved = run / "config.resolved.json"
    resolved.write_text(resolved.read_text().replace(str(base), str(tmp_path / "gone")))
    assert run_cli(run) == 0
    found = json.loads((run / "analysis.json").read_text())
    assert "gone is no folder here; give --base" in found["base"]
    assert all(row["spectra"] and not row["correlations"] for row in found["modules"])
