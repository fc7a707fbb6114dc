"""experiments/: converters on small samples of each format, the two packaged tasks, the declared grid, and scoring."""

import copy
import io
import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import convert_tasks
import get_tasks
import grid_worker
import latency
import paper_page
import pytest
import run_grid
import score_run
import torch
from ranks import run_script, run_verb
from ruamel.yaml import YAML
from test_baselines import run_config
from tiny import tiny_folder
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_scale.adapters import baselines
from lora_scale.parallel import recompute
from lora_scale.spec import configfile, cost, states
from lora_scale.spec.named import shape
from lora_scale.spec.shapes import architecture
from lora_scale.storage.runlog import read_metrics

REPOSITORY = Path(__file__).parent.parent

TRIPLE = {"subject": "Aarhus_Airport", "property": "cityServed", "object": '"Aarhus, Denmark"'}
LEX = [{"lex": "It serves Aarhus.", "comment": "good"}, {"lex": "A.", "comment": "bad"}]
ENTRY = {"modifiedtripleset": [TRIPLE], "lexicalisations": LEX}
SQL = {"table_id": "1-7", "question": "Who won?", "sql": {"sel": 0, "agg": 0, "conds": [[1, 0, "1990"], [2, 1, 5]]}}
SAMPLES: dict[str, tuple[dict[str, str], list[tuple[str, str]]]] = {  # format: files, and the rows they make
    "e2e": (
        {"a.csv": 'mr,ref\n"name[The Eagle], area[city centre]","The Eagle, ""near"" you."\n'},
        [("name : The Eagle | area : city centre\nText:", ' The Eagle, "near" you.')],
    ),
    "webnlg": (
        {"a.json": json.dumps({"entries": [{"1": ENTRY}]})},
        [('Aarhus Airport : cityServed : "Aarhus, Denmark"\nText:', " It serves Aarhus.")],
    ),
    "dart": (
        {"a.json": json.dumps([{"tripleset": [["A", "B_C", "D"], ["E", "F", "G"]], "annotations": [{"text": "x"}]}])},
        [("A : B C : D | E : F : G\nText:", " x")],
    ),
    "wikisql": (
        {
            "a.jsonl": json.dumps(SQL) + "\n" + json.dumps({**SQL, "sql": {"sel": 2, "agg": 3, "conds": []}}) + "\n",
            "b.jsonl": json.dumps({"id": "1-7", "header": ["Winner", "Year", "Goals"]}) + "\n",
        },
        [
            (
                "Columns: Winner, Year, Goals\nQuestion: Who won?\nSQL:",
                " SELECT Winner FROM table WHERE Year = 1990 AND Goals > 5",
            ),
            ("Columns: Winner, Year, Goals\nQuestion: Who won?\nSQL:", " SELECT COUNT(Goals) FROM table"),
        ],
    ),
    "mnli": (
        {"a.tsv": 'index\tsentence1\tsentence2\tgold_label\n0\tA "man\tB\tneutral\n1\tC\tD\t-\n'},
        [('Premise: A "man\nHypothesis: B\nEntailed:', " maybe")],
    ),
    "samsum": (
        {"a.json": json.dumps([{"id": "1", "dialogue": "A: hi\r\nB: hello", "summary": "They greet."}])},
        [("A: hi\nB: hello\nSummary:", " They greet.")],
    ),
    "sst2": ({"a.tsv": "sentence\tlabel\nit 's fun \t1\n"}, [("Sentence: it 's fun\nLabel:", " positive")]),
    "cola": ({"a.tsv": "gj04\t0\t*\tHe go.\n"}, [("Sentence: He go.\nLabel:", " unacceptable")]),
    "mrpc": (
        {"a.tsv": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tOne.\tTwo.\n"},
        [("First: One.\nSecond: Two.\nLabel:", " equivalent")],
    ),
    "qqp": (
        {"a.tsv": "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n0\t1\t2\tWhy?\tHow?\t0\n"},
        [("First: Why?\nSecond: How?\nLabel:", " different")],
    ),
    "qnli": (
        {"a.tsv": "index\tquestion\tsentence\tlabel\n0\tWhy?\tSo.\tnot_entailment\n"},
        [("First: Why?\nSecond: So.\nLabel:", " no")],
    ),
    "rte": (
        {"a.tsv": "index\tsentence1\tsentence2\tlabel\n0\tA.\tB.\tentailment\n"},
        [("First: A.\nSecond: B.\nLabel:", " yes")],
    ),
}


def converted(kind: str, folder: Path, files: dict[str, str], *options: str) -> list[dict[str, Any]]:
    paths = []
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
        paths.append(folder / name)
    out = folder / "out.jsonl"
    convert_tasks.convert(kind, paths, out, group="group" in options)
    return [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize("kind", convert_tasks.FORMATS)
def test_each_format_is_converted(kind: str, tmp_path: Path) -> None:
    files, expected = SAMPLES[kind]
    assert converted(kind, tmp_path, files) == [{"prompt": p, "completion": c} for p, c in expected]


def test_references_of_one_input_can_be_kept_together(tmp_path: Path) -> None:
    text = "mr,ref\nname[A],One.\nname[B],Two.\nname[A],Three.\n"
    first, second = converted("e2e", tmp_path, {"a.csv": text}, "group")
    assert first == {"prompt": "name : A\nText:", "completion": " One.", "references": ["One.", "Three."]}
    assert second["references"] == ["Two."]


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("e2e", "mr,text\n", "has no column ref; it has mr, text"),
        ("e2e", "mr,ref\nname,x\n", "row 1: mr is 'name', not `name[value], ...`"),
        ("e2e", "mr,ref\n", "holds no rows"),
        ("sst2", "sentence\tlabel\nfun\t2\n", "row 1: label is '2', none of 0, 1"),
        ("sst2", "sentence\tlabel\nfun\n", "row 1 ends before column label"),
        ("mnli", "sentence1\tsentence2\tgold_label\na\tb\tmaybe\n", "gold_label is 'maybe', none of"),
        ("dart", "{", "is not valid JSON"),
        ("dart", '[{"tripleset": [["a", "b"]], "annotations": [{"text": "x"}]}]', "a triple does not have three parts"),
        ("webnlg", "[]", "is not of the format webnlg"),
        ("samsum", '{"dialogue": "x"}', "is not of the format samsum"),
    ],
)
def test_a_wrong_file_is_named_and_nothing_written(
    kind: str, text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    (tmp_path / "in").write_text(text, encoding="utf-8")
    out = tmp_path / "folder" / "out.jsonl"
    monkeypatch.setattr("sys.argv", ["convert_tasks.py", kind, str(tmp_path / "in"), "--out", str(out)])
    assert convert_tasks.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and str(tmp_path / "in") in line
    assert not list((tmp_path / "folder").iterdir())


def test_sentiment_and_wiki_rows() -> None:
    """Out of archives that are packed as the packages' are."""
    ratings = "1\t2.5\tGreat fun.\n2\t-0.4\tSo so.\n3\t-1.5\tDull , dull .\n"
    archive = tar(get_tasks.RATINGS, tar(get_tasks.SENTENCES, ratings.encode()))
    rows = get_tasks.sentiment(get_tasks.sentiment_text(archive))
    assert [row for _, row in rows] == [
        {"prompt": "Review: Great fun.\nSentiment:", "completion": " positive"},
        {"prompt": "Review: Dull , dull .\nSentiment:", "completion": " negative"},
    ]
    articles = {
        "A": {"title": "Aarhus", "extract": "Aarhus \n is " + "x" * 100, "description": "city in Denmark"},
        "B": {"title": "B", "extract": "short", "description": "a letter of it"},
        "C": {"title": "C", "extract": "x" * 200, "description": None},
    }
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(get_tasks.SUMMARIES, json.dumps(articles))
    ((key, row),) = get_tasks.wiki(get_tasks.wiki_text(wheel.getvalue()))
    assert key == "A" and row["completion"] == " city in Denmark"
    assert row["prompt"] == f"Title: Aarhus\nText: Aarhus is {'x' * 100}\nShort description:"


def tar(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        file.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def test_a_key_is_in_one_split_only() -> None:
    rows = [(f"key {i % 1500}", {"prompt": str(i), "completion": "x"}) for i in range(3000)]
    splits = get_tasks.split(rows)
    of = [{int(row["prompt"]) % 1500 for row in found} for found in splits.values()]
    assert sum(map(len, of)) == 1500
    sizes = [len(found) / 3000 for found in splits.values()]
    assert sizes == pytest.approx([0.85, 0.05, 0.10], abs=0.03)


GRID = run_grid.read_grid()
EXPERIMENTS = GRID["experiments"]


def test_every_cell_is_a_run_that_can_be_loaded(tmp_path: Path) -> None:
    found = list(run_grid.cells(GRID))
    assert len({cell.name for cell in found}) == len(found)
    for number, cell in enumerate(cell for cell in found if cell.method and cell.name.endswith(("seed0", "lr0.001"))):
        path = tmp_path / f"{number}.yaml"
        with path.open("w") as file:
            YAML().dump(run_grid.config_of(GRID, cell, tmp_path / "run", None if cell.tunes else 1e-3), file)
        cfg = configfile.load(path)
        assert cfg.train.lr == 1e-3 and cfg.data.max_rows is not None and cfg.data.max_rows <= 6000


def test_every_method_gets_as_much() -> None:
    """As many learning rates, and as many seeds: within an experiment none is searched harder than another."""
    counts = {name: [len(run_grid.rates_of(GRID, method)) for method in row["of"]] for name, row in EXPERIMENTS.items()}
    assert all(len(set(each)) == 1 for each in counts.values())
    assert counts["methods"][0] == 3 and counts["wider"][0] == 5 and len(counts["wider"]) == len(counts["methods"])
    seeds: dict[str, set[int]] = {}
    for cell in run_grid.cells(GRID):
        if cell.method and not cell.tunes:
            name, _, number = cell.name.rpartition("/seed")
            seeds.setdefault(name, set()).add(int(number))
    of = {experiment: [s for n, s in seeds.items() if n.startswith(f"{experiment}/")] for experiment in EXPERIMENTS}
    assert all(each == of[experiment][0] for experiment in of for each in of[experiment])
    assert of["methods"][0] == set(GRID["seeds"]) and len(GRID["seeds"]) == 5
    assert GRID["tuning_seed"] not in GRID["seeds"]
    lengths = {cell.overrides.get("data.max_rows") for cell in run_grid.cells(GRID) if cell.tunes}
    assert lengths == {task["tuning_rows"] for task in GRID["tasks"].values()}


def test_matrices_are_compared_at_one_budget(tmp_path: Path) -> None:
    model = architecture(shape("smollm2-135m"))
    counts = set()
    for cell in run_grid.cells(GRID):
        if cell.name.startswith("matrices/sentiment/") and cell.name.endswith("seed0"):
            (tmp_path / "c.yaml").write_text(json.dumps(run_grid.config_of(GRID, cell, tmp_path, 1e-3)))
            counts.add(cost.numel(states.trained_shapes(model, configfile.load(tmp_path / "c.yaml"))))
    assert counts == {345_600}


def test_an_interval_is_students() -> None:
    """Against R: t.test(c(1, 2, 3, 4, 6)) gives 3.2 and (0.8116, 5.5884)."""
    mean, low, high = run_grid.interval([1, 2, 3, 4, 6])
    assert (mean, low, high) == pytest.approx((3.2, 0.8116, 5.5884), abs=1e-3)


@pytest.mark.parametrize("method", ["preembed", "prelayer", "adapter-h"])
def test_generation_is_that_of_whole_passes(method: str, tmp_path: Path) -> None:
    """Greedy tokens by cache and left padding, the method's vectors in place, equal those of plain passes."""
    base = tiny_folder(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    baselines.insert(model, run_config(base, method), recompute.decoder_layers(model))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    tokenizer = AutoTokenizer.from_pretrained(base)
    prefix = 3 if method.startswith("pre") else 0
    scorer = score_run.Scorer(model, tokenizer, prefix, "cpu")
    prompts = ["a small program", "the weather of the day in the old format", "b"]
    found = scorer.completions(prompts, new_tokens=6)
    for prompt, text in zip(prompts, found, strict=True):
        ids = [scorer.pad] * prefix + scorer.ids(prompt)
        start = len(ids)
        for _ in range(6):
            logits = model(input_ids=torch.tensor([ids]), position_ids=torch.arange(len(ids))[None]).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert text == tokenizer.decode(ids[start:], skip_special_tokens=True).strip().split("\n")[0].strip()


TINY = {
    "seeds": [0, 1],
    "tuning_seed": 9,
    "common": {"train.max_steps": 2, "train.global_batch_size": 2, "parallel.zero_stage": 0, "precision": "fp32"},
    "methods": {"prelayer": {"keys": {"method": "prelayer", "baseline.prefix_tokens": 2}, "lr": [1e-3]}},
    "experiments": {"methods": {"tasks": ["toy"], "of": {"prelayer": {"prelayer": {}}}}},
    "prompting": {"shots": [1], "tasks": ["toy"]},
}


def toy(folder: Path) -> dict[str, Any]:
    """A grid of one method on a tiny model and twelve rows."""
    base, data = tiny_folder(folder / "base"), folder / "data"
    data.mkdir()
    for split in get_tasks.SPLITS:
        rows = [{"prompt": f"the weather {i}", "completion": " old" if i % 2 else " new"} for i in range(12)]
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "rows": 12,
        "tuning_rows": 12,
        "seq_len": 64,
        "metric": "accuracy",
        "test_rows": 6,
        "answers": ["old", "new"],
    }
    return {**copy.deepcopy(TINY), "model": str(base), "tasks": {"toy": {"data": str(data), **task}}}


def cell_of(grid: dict[str, Any], name: str) -> run_grid.Cell:
    (found,) = [cell for cell in run_grid.cells(grid) if cell.name == name]
    return found


def written(grid: dict[str, Any], folder: Path) -> Path:
    with (folder / "grid.yaml").open("w") as file:
        YAML().dump(grid, file)
    return folder / "grid.yaml"


def run_toy(grid: dict[str, Any], folder: Path, pattern: str, jobs: int = 1, minutes: float = 4) -> Path:
    run_grid.run_workers(written(grid, folder), [pattern], folder / "out", jobs, minutes)
    return folder / "out"


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What workers are told: this tree, whose commit is nobody's business here, on a CPU."""
    monkeypatch.setenv("PYTHONPATH", f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}")
    monkeypatch.setenv("LORA_SCALE_COMMIT", "test")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


@pytest.mark.ranks
def test_a_worker_gives_the_losses_of_a_process_of_their_own(tmp_path: Path, here: None) -> None:
    """Cells of two methods and a prompting, by one worker; then one of them by `lora-scale train` and score_run.py."""
    grid = toy(tmp_path)
    grid["methods"]["lora"] = {"keys": {"lora.r": 2}, "lr": [1e-2]}
    grid["experiments"]["methods"]["of"] |= {"lora": {"lora": {}}}
    grid["common"]["save.last"] = False
    out = run_toy(grid, tmp_path, "*")
    records = run_grid.read_records(grid, out)
    assert len(records) == 7 and not [one for one in records.values() if "failed" in one]
    assert "accuracy" not in records["tune/toy/lora/lr0.01"], "tuning must not look at the test rows"
    final = records["methods/toy/prelayer/seed0"]
    assert final["lr"] == 1e-3 and final["trainable"] == 2 * 2 * 32 and final["steps"] == 2
    page = run_grid.tables(grid, records)
    assert "| prelayer | 128 | 0.001 |" in page and "Not run" not in page
    assert "Not run: 1 cells of prompting." in run_grid.tables(grid, dict(list(records.items())[:-1]))
    for name in ("methods/toy/lora/seed1", "methods/toy/prelayer/seed0"):
        run = tmp_path / "alone" / run_grid.file_name(name)
        run.mkdir(parents=True)
        tree = run_grid.config_of(grid, cell_of(grid, name), run, records[name]["lr"])
        tree["save"]["last"] = True
        with (run / "alone.yaml").open("w") as file:
            YAML().dump(tree, file)
        assert run_verb("train", str(run / "alone.yaml"), "--ranks", "1", "-q", folder=run).returncode == 0
        (first,), (second,) = ([read_losses(r)] for r in (run, out / "runs" / run_grid.file_name(name)))
        assert first == second, "the same losses to the bit"
        task = ["--task", json.dumps(grid["tasks"]["toy"]), "--device", "cpu", "--out", str(run / "score.json")]
        assert run_script("score_run", "--run", str(run), *task, folder=run).returncode == 0
        alone = json.loads((run / "score.json").read_text())
        for key in ("val_loss", "trainable", "accuracy", "test_nll"):
            assert alone[key] == pytest.approx(records[name][key], rel=1e-6), key


def read_losses(run: Path) -> list[Any]:
    return [(row["step"], row.get("loss"), row.get("val_loss"), row.get("grad_norm")) for row in read_metrics(run)]


@pytest.mark.ranks
def test_the_queue_writes_a_cell_once_and_says_what_failed(tmp_path: Path, here: None) -> None:
    """The base prompted; the second cell's data are not there, which is tried again by another worker and kept."""
    grid = toy(tmp_path)
    grid["tasks"]["gone"] = {**grid["tasks"]["toy"], "data": str(tmp_path / "nowhere")}
    grid["prompting"] = {"shots": [1], "tasks": ["gone", "toy"]}
    out = run_toy(grid, tmp_path, "prompting/*", minutes=0)
    assert not (out / "records").exists(), "no time, no cell"
    run_toy(grid, tmp_path, "prompting/*", jobs=2)
    good, gone = (run_grid.read_record(out, f"prompting/{task}/k1/seed0") for task in ("toy", "gone"))
    assert good and good["trainable"] == 0 and 0 <= good["accuracy"] <= 1 and good["commit"] == "test"
    assert gone and gone["failed"].startswith("FileNotFoundError")
    before = {path: path.stat().st_mtime_ns for path in (out / "records").iterdir()}
    run_toy(grid, tmp_path, "prompting/*")
    assert {path: path.stat().st_mtime_ns for path in (out / "records").iterdir()} == before


def test_a_cell_waits_for_the_learning_rates_of_its_method(tmp_path: Path) -> None:
    grid = toy(tmp_path)
    grid["methods"]["prelayer"]["lr"] = [1e-3, 1e-2]
    cell = cell_of(grid, "methods/toy/prelayer/seed0")
    assert not run_grid.is_ready(grid, cell, tmp_path)
    for lr, loss in (("0.001", 2.0), ("0.01", 1.5)):
        assert not run_grid.is_ready(grid, cell, tmp_path)
        run_grid.write_record(tmp_path, f"tune/toy/prelayer/lr{lr}", {"val_loss": loss})
    assert run_grid.is_ready(grid, cell, tmp_path) and run_grid.chosen_lr(grid, cell, tmp_path) == 1e-2
    for lr in ("0.001", "0.01"):
        run_grid.write_record(tmp_path, f"tune/toy/prelayer/lr{lr}", {"failed": "x"})
    with pytest.raises(LookupError, match="every learning rate of prelayer failed on toy"):
        run_grid.chosen_lr(grid, cell, tmp_path)


def test_a_wider_search_takes_the_values_that_were_tried(tmp_path: Path) -> None:
    """And the run that was made, where none of the new values is better."""
    grid = toy(tmp_path)
    grid["methods"]["wide"] = {"like": "prelayer", "more": [1e-1]}
    row = {"tasks": ["toy"], "same": "methods/{task}/{variant}/seed{seed}", "of": {"wide": {"prelayer": {}}}}
    grid["experiments"]["wider"] = row
    names = [cell.name for cell in run_grid.cells(grid) if cell.method]
    assert names[:3] == ["tune/toy/prelayer/lr0.001", "tune/toy/prelayer/lr0.1", "methods/toy/prelayer/seed0"]
    cell = cell_of(grid, "wider/toy/prelayer/seed0")
    run_grid.write_record(tmp_path, names[0], {"val_loss": 1.0})
    assert not run_grid.is_ready(grid, cell, tmp_path)
    run_grid.write_record(tmp_path, names[1], {"val_loss": 2.0})
    assert run_grid.is_ready(grid, cell, tmp_path) and run_grid.chosen_lr(grid, cell, tmp_path) == 1e-3
    made = {"cell": cell.same, "lr": 1e-3, "accuracy": 0.5}
    run_grid.write_record(tmp_path, cell.same, made)
    nobody: Any = None  # neither a device nor a screen is asked for
    grid_worker.finish(grid, cell, tmp_path, nobody, nobody)
    assert run_grid.read_record(tmp_path, cell.name) == {**made, "cell": cell.name, "same_as": cell.same}


def test_patterns_are_an_order() -> None:
    found = [cell.name for cell in run_grid.select(GRID, ["kept/*", "tune/*", "*"])]
    assert found[0] == "kept/synopsis/r8/seed0" and found[4].startswith("tune/")
    assert sorted(found) == sorted(cell.name for cell in run_grid.cells(GRID))


def test_workers_take_turns_on_gpus() -> None:
    assert run_grid.visible_gpus(2, {}) == ["0", "1"] and run_grid.visible_gpus(1, {"CUDA_VISIBLE_DEVICES": "3,4"}) == [
        "3"
    ]
    taken: list[str] = []
    for _ in range(4):
        taken.append(run_grid.on_gpu(taken, ["0", "1"])["CUDA_VISIBLE_DEVICES"])
    assert taken == ["0", "1", "0", "1"]
    assert run_grid.on_gpu(["0", "1", "1"], ["0", "1"]) == {"CUDA_VISIBLE_DEVICES": "0"}, "where one has ended"
    assert run_grid.on_gpu([], ["0"]) == {}
    with pytest.raises(SystemExit, match="names 1"):
        run_grid.visible_gpus(2, {"CUDA_VISIBLE_DEVICES": "3"})


def test_a_merged_lora_is_the_base_with_other_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "shape", lambda name: {**shape(name), "n_embd": 32, "n_layer": 1, "n_head": 2})
    base, merged = (latency.build("gpt2-small", method, 8, "cpu", torch.float32) for method in (None, "lora"))
    assert [type(module) for module in base.modules()] == [type(module) for module in merged.modules()]
    found = latency.milliseconds(latency.forward(merged, 1, 4, "cpu", graph=False), "cpu", passes=3, warm_up=1)
    assert len(found) == 3 and min(found) > 0


def test_collected_records_give_the_same_tables(tmp_path: Path) -> None:
    """Also what an experiment takes from another, and how much slower adapters are."""
    grid = toy(tmp_path)
    grid["experiments"]["ranks"] = {
        "tasks": ["toy"],
        "seeds": [1],
        "also": {"r2": "methods/{task}/prelayer/seed{seed}"},
    }
    grid["experiments"]["ranks"]["of"] = {"prelayer": {"r1": {"baseline.prefix_tokens": 1}}}
    facts = {"commit": "c", "versions": {"torch": "2"}, "device": "cpu", "lr": 0.1, "trainable": 7}
    for number, cell in enumerate(run_grid.cells(grid)):
        scores = {"accuracy": number / 8, "test_nll": 1.0} if not cell.tunes else {}
        run_grid.write_record(tmp_path, cell.name, {"cell": cell.name, **facts, "val_loss": 1.0, **scores})
    row = {"method": "base or merged LoRA", "shape": "s", "batch": 1, "tokens": 8, "quartiles_ms": [1.0, 3.0]}
    rows = [{**row, "median_ms": 2.0}, {**row, "method": "adapter-h", "median_ms": 2.5}]
    (tmp_path / run_grid.LATENCY).write_text("".join(json.dumps(one) + "\n" for one in rows))
    run_grid.collect(grid, tmp_path, tmp_path / "record.json")
    record = json.loads((tmp_path / "record.json").read_text())
    assert "commit" not in record["cells"][0] and record["commit"] == "c"
    page = run_grid.tables_of(record)
    assert page.startswith(run_grid.tables(grid, run_grid.read_records(grid, tmp_path)))
    ranks = page[page.index("### ranks, toy") :]
    assert "| r2 | 7 | 0.1 | 1.0000 | 0.2500 | 1 | 0 |" in ranks
    assert "| adapter-h | 2.50 (1.00-3.00), +25.0% |" in page
    run_grid.spread(record, tmp_path / "copy")
    first, second = (run_grid.read_records(grid, folder) for folder in (tmp_path, tmp_path / "copy"))
    assert first == second, "a record gives back what it was made of"


def test_a_cell_is_not_rerun_without_its_learning_rates(tmp_path: Path) -> None:
    grid = toy(tmp_path)
    with pytest.raises(SystemExit, match="name one by --record"):
        run_grid.rerun(written(grid, tmp_path), cell_of(grid, "methods/toy/prelayer/seed0"), tmp_path, minutes=1)


PAPER = REPOSITORY / "docs" / "benchmarks" / "2026-11-23-paper.json"


def test_the_papers_page_has_the_records_tables(tmp_path: Path) -> None:
    """docs/paper.md is what `paper_page.py` makes of it, with every table; the picture is drawn."""
    record, page = json.loads(PAPER.read_text()), (REPOSITORY / "docs" / "paper.md").read_text(encoding="utf-8")
    tables = paper_page.made(record)
    assert all(f"<!-- made: {name} -->" in page for name in tables)
    assert paper_page.filled(page, tables) == page, "python experiments/paper_page.py RECORD docs/paper.md"
    assert paper_page.filled(page.replace("| `lora` | 460,800", "| `lora` | 1"), tables) == page
    paper_page.draw(record, tmp_path / "picture.svg")
    text = (tmp_path / "picture.svg").read_text()
    assert all(f">{name}<" in text for name in ("lora-all", "adapter-h", "LoRA on q, v, by r"))


@pytest.mark.parametrize(
    ("low", "high", "answer"),
    [
        (-0.4, 0.2, "yes, shown"),
        (-0.9, -0.1, "**not shown**; worse"),
        (-0.9, 0.1, "**not shown**; not told apart"),
        (-0.9, -0.6, "**no: worse by more than the margin**"),
    ],
)
def test_a_verdict_is_of_the_whole_interval(low: float, high: float, answer: str) -> None:
    assert paper_page.judged(((low + high) / 2, low, high), 0.5) == answer
