"""`lora-scale bench`: the whole command at tiny shapes, rows that failed, going on, and tables of a known record."""

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lora_scale.cli import main
from lora_scale.commands.benching import cases, materials, processes, running, tables
from lora_scale.commands.benching.cases import CASES, GATES, MODELS, TINY, WATERFALLS, Case
from lora_scale.storage.runlog import read_metrics

RECORD = Path(__file__).parent / "data" / "bench.json"


def bench(*arguments: str) -> int:
    with pytest.raises(SystemExit) as exit:
        main(["bench", *arguments])
    return int(exit.value.code or 0)


def losses(record: dict[str, Any], name: str) -> list[float]:
    return next(row for row in record["rows"] if row["name"] == name)["losses"]


# --- the whole command ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.mark.ranks
def test_ours_a_peer_and_a_failing_case_end_to_end(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    broken = Case(model="tiny", gpus=1, blocks=2, seq_len=64, settings=("lora.r=0",))
    chosen = {name: TINY[name] for name in ("tiny-zero3", "tiny-peft")} | {"broken": broken}
    monkeypatch.setattr(cases, "TINY", chosen)
    out = place / "record.json"
    assert bench("--tiny", "--work", str(place / "work"), "--out", str(out), "--steps", "2") == 0
    record = json.loads(out.read_text())
    ours, peer, failed = (next(row for row in record["rows"] if row["name"] == name) for name in chosen)
    assert ours["who"] == "lora_scale" and ours["ranks"] == 2 and peer["peer"] == "peft"
    for row in (ours, peer):
        assert row["tokens_a_step"] == 128 and len(row["losses"]) == 5 and row["steps"] == {"measured": 2, "skipped": 3}
        rate = row["tokens_a_step"] / row["step_seconds"]["median"]
        assert row["tokens_per_second"] == pytest.approx(rate, rel=1e-3)
        assert row["tflops_4n"] == pytest.approx(4 * row["parameters"] * rate / row["ranks"] / 1e12, rel=1e-3, abs=1e-4)
        assert row["commit"] and row["load_seconds"] >= 0 and row["peak_gib"] is None
    # the same weights and tokens: bf16 has 8 bits, and 128 losses are averaged; other rows differ in the second digit
    assert losses(record, "tiny-zero3") == pytest.approx(losses(record, "tiny-peft"), abs=2e-3)
    assert max(losses(record, "tiny-peft")) - min(losses(record, "tiny-peft")) > 0.02
    assert failed["failed"] == "exit code 2" and "lora.r is 0" in failed["said"][-1]
    steps = read_metrics(place / "work/runs/tiny-zero3")
    for step in steps:
        phases = step["phase_seconds"]
        assert (
            list(phases) == ["data", "forward", "backward", "step", "collectives", "between"]
            and min(phases.values()) > 0
        )
        inside = sum(phases.values()) - phases["between"]  # which begins a moment before the step's seconds do
        assert 0.5 < inside / step["seconds"] <= 1.001, "phases are disjoint"
    inside, seconds = sum(sum(x["phase_seconds"].values()) for x in steps[1:]), sum(x["seconds"] for x in steps[1:])
    assert 0.8 < inside / seconds < 1.2, "and all there is"
    assert ours["phase_seconds"]["collectives"] > 0
    shown = capsys.readouterr()
    assert "| broken | lora_scale | tiny | 1 | exit code 2 |" in shown.out and "3/3 broken: exit code 2" in shown.err
    work = place / "work"
    assert not list((work / "models").iterdir()), "the checkpoint is needed no more"
    assert not list((work / "runs/tiny-zero3/checkpoints").iterdir()), "save.last is false"

    monkeypatch.setattr(running, "measure", lambda name, *_: {**failed, "name": name, "failed": "again"})
    assert bench("--tiny", "--work", str(place / "work"), "--out", str(out), "--steps", "2", "--resume") == 0
    resumed = json.loads(out.read_text())["rows"]
    assert [row.get("failed") for row in resumed] == [None, None, "again"], "only what failed is run again"


@pytest.mark.long
@pytest.mark.ranks
def test_every_tiny_case_computes_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "record.json"
    assert bench("--tiny", "--work", str(tmp_path / "work"), "--out", str(out), "--steps", "2") == 0
    record = json.loads(out.read_text())
    assert [row.get("failed") for row in record["rows"]] == [None] * len(TINY)
    for name in set(TINY) - {"tiny-full"}:
        assert losses(record, name) == pytest.approx(losses(record, "tiny-peft"), abs=2e-3), name
    assert losses(record, "tiny-full")[0] == pytest.approx(losses(record, "tiny-peft")[0], abs=2e-3)


def test_time_is_up_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that hangs, with a child in a session of its own, as launchers make them."""
    log = tmp_path / "log.txt"
    monkeypatch.setenv("NAME_OF_TEST", str(log))
    began = time.monotonic()
    command = ["sh", "-c", "setsid sleep 600 & echo here; sleep 600"]  # a shell, which starts at once
    assert processes.run(command, 2, log, 3.0, tmp_path) is None
    assert time.monotonic() - began < 120 and log.read_text() == "here\nhere\n"
    assert not [word for word in marks() if word.endswith(str(log))]


def marks() -> list[str]:
    """What the running processes of this user have as NAME_OF_TEST in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            found += [word for word in path.read_text(errors="replace").split("\0") if word.startswith("NAME_OF_TEST=")]
    return found


def test_a_rank_that_fails_ends_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.2)
    code = "import os, sys, time; sys.exit(3) if os.environ['RANK'] == '1' else time.sleep(600)"
    began = time.monotonic()
    assert processes.run([sys.executable, "-c", code], 2, tmp_path / "log.txt", 600.0, tmp_path) == 3
    assert time.monotonic() - began < 120


def test_the_environment_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVLink multicast stays off by such a variable."""
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    names = "NCCL_NVLS_ENABLE", "RANK", "WORLD_SIZE"
    code = f"import os; os.write(1, (' '.join(os.environ[name] for name in {names}) + '\\n').encode())"  # in one piece
    assert processes.run([sys.executable, "-c", code], 2, tmp_path / "log.txt", 60.0, tmp_path) == 0
    assert sorted((tmp_path / "log.txt").read_text().splitlines()) == ["0 0 2", "0 1 2"]


# --- what is refused, or said of a case that cannot run ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tiny"], "--work and --out are needed"),
        (["--only", "100b"], "--only 100b: there is no such case; choose 7b-1gpu, "),
        (
            ["--tiny", "--work", "w", "--out", "there.json"],
            "--out is there.json, which is there; --resume goes on with it",
        ),
        (["--tiny", "--work", "w", "--out", "no/r.json"], "--out is no/r.json, but no is no folder"),
        (
            ["--tiny", "--work", "w", "--out", "r.json", "--steps", "99"],
            "--steps is 99; there are rows for 29 after the",
        ),
        (["table", "nowhere.json"], "nowhere.json cannot be read as a record"),
        (["table", "there.json"], "there.json is no record of `lora-scale bench`"),
        (["waterfall", str(RECORD), "--chart", "x", "--out", "w.svg"], "--chart is x; choose zero3, tp2"),
        (
            ["waterfall", str(RECORD), "--chart", "tiny", "--out", "w.svg"],
            "a waterfall needs figures of at least two of",
        ),
    ],
)
def test_wrong_usage(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.json").write_text('{"title": "x"}')
    assert bench(*arguments) == 2
    assert message in capsys.readouterr().err


def test_a_record_of_an_unknown_program_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORA_SCALE_COMMIT", "0123+changes")
    assert bench("--work", str(tmp_path), "--out", str(tmp_path / "r.json")) == 2
    assert "the commit of this program is 0123+changes" in capsys.readouterr().err


def test_a_case_for_more_gpus_says_so(tmp_path: Path) -> None:
    row = running.measure("x", CASES["100b-tp2"], running.Bench(tmp_path, 8, gpus=1))
    assert row["failed"] == "needs 2 GPUs; 1 here" and not list(tmp_path.iterdir())


def test_a_checkpoint_without_room_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file where the folder should be stands for a full disk: it cannot be written either."""
    (tmp_path / "models").write_text("")
    row = running.measure("x", TINY["tiny-zero3"], running.Bench(tmp_path, 8, gpus=0))
    assert row["failed"].startswith("the checkpoint tiny-all cannot be written to ")


# --- the lists --------------------------------------------------------------------------------------------------------


def test_cases_share_checkpoints_and_are_run_model_by_model() -> None:
    models = [case.model for case in cases.chosen(False, ()).values()]
    assert models == sorted(models, key=list(MODELS).index), "a model would be written twice"
    few = cases.chosen(False, ("100b-tp2", "7b-1gpu"))
    assert list(few) == ["7b-1gpu", "100b-tp2"]


def test_gates_and_waterfalls_name_cases_that_exist_and_compare_equal_work() -> None:
    for gate in GATES:
        for condition in (condition for way in gate.ways for condition in way):
            ours = CASES[condition.ours]
            for peer in (CASES[name] for name in condition.peers):
                assert peer.model == ours.model and peer.seq_len == ours.seq_len
                assert peer.blocks / peer.gpus == ours.blocks / ours.gpus
    for name, bars in WATERFALLS.items():
        known = TINY if name == "tiny" else CASES
        cases = [known[place.partition("@")[0]] for _, place in bars]
        assert len({(case.model, case.blocks, case.gpus) for case in cases}) == 1


@pytest.mark.parametrize("name", [name for name, case in {**CASES, **TINY}.items() if case.peer is None])
def test_our_settings_are_configs(name: str, tmp_path: Path) -> None:
    """Every case of ours is a config that loads, with batch sizes that its GPUs can share."""
    from lora_scale.spec import configfile, cost

    case = {**CASES, **TINY}[name]
    train = {"max_steps": 11, "global_batch_size": case.blocks, "micro_batch_size": case.micro}
    tree = materials.config(tmp_path, case.seq_len, tmp_path / "run", tmp_path, **train)
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    cfg = configfile.load(tmp_path / "run.yaml", case.settings)
    assert cost.accumulation_steps(cfg, case.gpus) >= 1


# --- tables of a record with round figures ----------------------------------------------------------------------------


def test_gates_say_goal_seen_and_met() -> None:
    lines = tables.gates(tables.merged([json.loads(RECORD.read_text())])).splitlines()
    said = {line.split(" | ")[1]: line.split(" | ")[2:] for line in lines[2:]}
    assert said["100b-tp2-documents over PEFT+ZeRO-3 as documented"] == [">= 1.80x", "2.00x", "yes |"]
    assert said["100b-tp2-documents over the best listed peer"] == [">= 1.40x", "1.25x (2 of 5 peers run)", "**no** |"]
    assert said["100b-tp2-documents: reserved over peak allocated"] == ["<= 1.05", "1.04", "yes |"]
    assert said["100b-zero3-documents over PEFT+ZeRO-3 as documented"] == [">= 1.80x", "-", "not measured |"]
    both = "the same over PEFT+Liger+torch.compile: speed at equal memory, or equal speed at less memory"
    goal = "speed >= 1.05x and peak memory <= 1.00x or speed >= 1.00x and peak memory <= 0.80x"
    assert said[both] == [goal, "speed 1.02x, peak memory 0.75x", "yes |"], "the second way is met"
    assert not [gate for gate in said if "full fine-tuning" in gate], "of these nothing was run"


def test_newest_figures_count_and_a_failure_hides_none() -> None:
    record = json.loads(RECORD.read_text())
    (row,) = [row for row in record["rows"] if row["name"] == "100b-tp2-documents"]
    later = {**row, "tokens_per_second": 1.0, "made": "2027-01-01T00:00:00+00:00"}
    failed = {"name": "100b-tp2-documents", "failed": "exit code 1", "made": "2028-01-01T00:00:00+00:00"}
    assert tables.merged([{"rows": [later]}, record, {"rows": [failed]}])["100b-tp2-documents"] == later


def test_the_table_names_what_failed(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("table", str(RECORD)) == 0
    shown = capsys.readouterr().out
    assert "| 100b-zero3-documents | lora_scale | llama-100.7b | 2 | not over after 480 s | | | | |" in shown
    assert (
        "| 100b-tp2-documents | lora_scale | llama-100.7b | 2 | 3,000 | 604 | 2.731 (2.700-2.800) "
        "| 125.0 / 130.0 | 6.0 |" in shown
    )
    assert "| 100b-tp2-documents | llama-100.7b | 8,192 | lora | 11.2000 11.1000 11.0000 10.9000 | 0.0100 |" in shown


def test_the_waterfall_has_a_bar_for_each_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "w.svg"
    assert bench("waterfall", str(RECORD), "--chart", "tp2", "--out", str(out)) == 0
    all_of_ours = "recompute: auto + kernels, and layers that keep less + tokens exchanged behind products"
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| PEFT + DeepSpeed ZeRO-3, as documented | 100b-peft-zero3 | 1,500 | 1.00x | 1.00x |",
        "| tensor parallelism, full recompute | 100b-tp2-all-plain | 2,500 | 1.67x | 1.67x |",
        f"| {all_of_ours} + FlashAttention-3 + {LAST} | 100b-tp2-documents | 3,000 | 1.20x | 2.00x |",
    ]
    picture = out.read_text()
    assert (
        picture.startswith("<svg") and "1,500" in picture and "2,500 (+1,000)" in picture and "3,000 (+500)" in picture
    )


LAST = "steps begun early, sums and gradients in fewer kernels"


def test_a_bar_may_be_of_code_that_is_gone() -> None:
    def row(name: str, commit: str, made: str, speed: float) -> dict[str, Any]:
        return {"name": name, "commit": commit, "made": made, "tokens_per_second": speed}

    rows = [row("100b-peft-zero3", "b", "1", 1.0), row("100b-tp2-documents", "adecfcf1", "1", 2.0)]
    rows += [row("100b-tp2-documents", "adecfcf1", "2", 2.5), row("100b-tp2-documents", "c", "3", 3.0)]
    bars = tables.waterfall([{"rows": rows[:2]}, {"rows": rows[2:]}], "tp2")
    assert [(label.split(" + ")[-1], name, speed) for label, name, speed in bars[1:]] == [
        ("FlashAttention-3", "100b-tp2-documents", 2.5),
        (LAST, "100b-tp2-documents", 3.0),
    ]


def test_tables_need_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; from lora_scale.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "bench", "table", str(RECORD)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=materials.ROOT, check=False)
    assert done.returncode == 0, done.stderr


def test_what_a_step_costs_that_is_told_of(tmp_path: Path) -> None:
    """The script runs; what it finds on a GPU is a record."""
    model = materials.checkpoint("tiny", None, tmp_path / "models")
    words = [str(model), "--work", str(tmp_path / "work"), "--seq-len", "64", "--rounds", "2", "--steps", "2"]
    command = [sys.executable, str(materials.ROOT / "scripts/bench_overhead.py"), *words, "recompute=none"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    found = json.loads(said.splitlines()[-1])
    assert found["overhead"] == found["medians"]["with"] / found["medians"]["without"] - 1
    rows = [row for row in read_metrics(tmp_path / "work/runs/overhead") if "loss" in row]
    assert len(rows) == 3 + 2 * 3, "steps with, and none without, are in the metrics"
