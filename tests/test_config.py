"""Configs as people write them: what is read, what is refused, and in which words."""

import json
from pathlib import Path

import coming_from
import pytest
from ruamel.yaml import YAML

from lora_scale.cli import main
from lora_scale.parallel import deepspeed_config
from lora_scale.spec import configdoc
from lora_scale.spec.configfile import config_sha256, differences, load, resolved_json, schema
from lora_scale.spec.elsewhere import TABLE
from lora_scale.spec.errors import ConfigError
from lora_scale.spec.keys import keys

SMALL = """\
model:
  path: base
data:
  train: rows.jsonl
run_dir: runs/a
train:
  epochs: 1
"""
CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
LORA_KEYS = (
    "r, lora_alpha, dropout, target_modules, rank_pattern, alpha_pattern, use_rslora, init_A, use_dora, bias, "
    "modules_to_save, trainable_token_indices, pissa"
)
TOP = (
    "keys at the top: run_dir, method, precision, recompute, activation_offloading, kernels, resume, init_adapter, "
    "allow_other_base, seed, max_hours"
)
ALL = f"{TOP}; sections: model, data, lora, baseline, train, eval, early_stop, save, parallel, memory, engine, track"
SOURCES = "a path or a list of mappings of path, weight, max_rows, split, subset, fields"
PATTERNS = "lora.rank_pattern must be a mapping from patterns to whole numbers of at least 1"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(SMALL)
    return path


WRONG_VALUES = [
    ("lora.r=0", "lora.r is 0; it must be a whole number of at least 1"),
    ("lora.r=8.0", "lora.r is 8.0; it must be a whole number of at least 1"),
    ("lora.r='8'", "lora.r is '8'; it must be a whole number of at least 1, without quotes"),
    ("lora.r=true", "lora.r is true; it must be a whole number of at least 1"),
    ("lora.r=null", "lora.r is null; it must be a whole number of at least 1"),
    ("lora.dropout=1", "lora.dropout is 1; it must be a number of at least 0 and below 1"),
    ("lora.target_modules=q", "lora.target_modules is 'q'; it must be a list of strings; for one write [q]"),
    ("lora.target_modules=[q, 3]", "lora.target_modules[1] is 3; lora.target_modules must be a list of strings"),
    ("lora.rank_pattern={q: 0, k: true}", f"lora.rank_pattern.q is 0; {PATTERNS}"),
    ("lora.rank_pattern.layers.0.q_proj=x", f"lora.rank_pattern.layers.0.q_proj is 'x'; {PATTERNS}"),
    ("lora=[1]", f"lora is [1]; it must be a mapping of the keys {LORA_KEYS}"),
    (
        "lora.rank_pattern=[q]",
        'lora.rank_pattern is ["q"]; it must be a mapping from patterns to whole numbers of at least 1',
    ),
    ("train.lr='2e-4'", "train.lr is '2e-4'; it must be a number above 0, without quotes"),
    ("train.lr=.nan", "train.lr is nan; it must be a number above 0"),
    ("train.lr=1e999", "train.lr is inf; it must be a number above 0"),
    ("train.betas=[0.9]", "train.betas is [0.9]; it must be a list of 2 numbers of at least 0 and below 1"),
    ("train.betas=[0.9, 1]", "train.betas[1] is 1; train.betas must be a list of 2 numbers of at least 0 and below 1"),
    ("train.schedule=no", "train.schedule is 'no'; choose 'cosine', 'linear' or 'constant'"),
    ("train.epochs=null", "train.epochs or train.max_steps must be given; for example train.epochs=1"),
    (
        "train.micro_batch_size=3",
        "train.global_batch_size is 8; it must be a multiple of train.micro_batch_size = 3",
    ),
    ("data.packing=off", "data.packing is 'off'; write true or false"),
    ("data.packing='true'", "data.packing is 'true'; write true or false, without quotes"),
    ("data.validation=1.5", "data.validation is 1.5; a fraction lies between 0 and 1"),
    (
        "data.validation='0.02'",
        "data.validation is '0.02'; it must be a path, a number or null, without quotes",
    ),
    ("data.validation=off", "data.validation is 'off'; it must be a path, a number or null; for nothing write null"),
    ("data.train=''", f"data.train is ''; it must be {SOURCES}"),
    ("data.train=[]", f"data.train is []; it must be {SOURCES}"),
    ("data.train=[{path: a, weight: 0}]", "data.train[0].weight is 0; it must be a number above 0"),
    (
        "data.train=[{path: a, wait: 1}]",
        f"unknown key data.train[0].wait; keys there: {SOURCES.partition('of ')[2].partition('of ')[2]}",
    ),
    (
        "data.train=[{weight: 1}]",
        "missing key data.train[0].path; it must be a string: As `data.train`: a file, a folder of the datasets "
        "library, or a name on the hub",
    ),
    ("data.fields=[question]", 'data.fields is ["question"]; it must be a mapping'),
    ("save.best=val_loss", "save.best needs a validation loss; set data.validation, for example to 0.02"),
    ("early_stop.patience=3", "early_stop.patience needs a validation loss; set data.validation, for example to 0.02"),
    ("model.path=3", "model.path is 3; it must be a string, in quotes"),
    ("model.path=/a: b", 'model.path is {"/a": "b"}; it must be a string'),
    ("model.revision=1e5", "model.revision is 100000.0; it must be a string or null, in quotes"),
    ("run_dir=2026-11-21", "run_dir is 2026-11-21 (a date); it must be a path, in quotes"),
    (
        "method=LoRA",
        "method is 'LoRA'; choose 'lora', 'full', 'bitfit', 'preembed', 'prelayer', 'adapter-h', 'adapter-l', "
        "'lora+preembed' or 'lora+prelayer'",
    ),
    ("recompute=off", "recompute is 'off'; it must be 'all', 'none', 'auto' or a whole number of at least 0"),
    ("recompute=true", "recompute is true; it must be 'all', 'none', 'auto' or a whole number of at least 0"),
    ("resume=no", "resume is 'no'; it must be 'auto', 'never' or a path; a file of that name is ./no"),
    ("resume=false", "resume is false; it must be 'auto', 'never' or a path"),
    ("seed=-1", "seed is -1; it must be a whole number of at least 0"),
    ("parallel.zero_stage=4", "parallel.zero_stage is 4; choose 0, 1, 2 or 3"),
    ("parallel.zero_stage=true", "parallel.zero_stage is true; choose 0, 1, 2 or 3"),
    ("lr=1e-4", "unknown key lr; did you mean train.lr?"),
    ("parallel.lr=1e-4", "unknown key parallel.lr; did you mean train.lr?"),
    ("train.learning_rate=1e-4", "unknown key train.learning_rate; did you mean train.lr?"),
    ("dropout=0.1", "unknown key dropout; did you mean model.dropout or lora.dropout?"),
    ("lora.target_module=[q]", "unknown key lora.target_module; did you mean lora.target_modules?"),
    ("model_path=base", "unknown key model_path; did you mean model.path?"),
    ("lora.r.x=3", "unknown key lora.r.x; did you mean lora.r?"),
    ("lora={r: 4, rr: 8}", "unknown key lora.rr; did you mean lora.r?"),
    (
        "parallel.tensor_parallel=2",
        "unknown key parallel.tensor_parallel; did you mean parallel.tensor_parallel_size?",
    ),
    ("banana=1", f"unknown key banana; {ALL}"),
    ("=3", "override '=3' is not of the form key=value"),
    ("data.validation=", "override 'data.validation=' has no value; for nothing write data.validation=null"),
    ("run_dir=@x", "override 'run_dir=@x': a text that begins with @ needs quotes"),
    (
        "lora.target_modules=[re:.*[0-3]]",
        "override 'lora.target_modules=[re:.*[0-3]]': brackets that do not match, or a text with brackets or commas in "
        "it that needs quotes",
    ),
    ("run_dir=2026-13-45", "override 'run_dir=2026-13-45': a text that looks like a date needs quotes"),
]

WRONG_FILES = {
    "empty": ("", "{0} is empty; a config has at least model.path, data.train, run_dir and train.epochs"),
    "only comments": (
        "# later\n",
        "{0} is empty; a config has at least model.path, data.train, run_dir and train.epochs",
    ),
    "a list": ("- 1\n", "{0} holds [1]; a config is a mapping, `key: value` with a space after the colon"),
    "no space": ("lr:1\n", "{0} holds 'lr:1'; a config is a mapping, `key: value` with a space after the colon"),
    "a tab": (SMALL + "lora:\n\tr: 8\n", "{0}, line 9: a tab; YAML is indented with spaces"),
    "twice": (SMALL + "run_dir: b\n", "{0}, line 8: the key run_dir stands twice; keep one"),
    "twice inside": (SMALL + "  epochs: 2\n", "{0}, line 8: the key epochs stands twice; keep one"),
    "indentation": (
        SMALL + "    lr: 3\n",
        "{0}, line 8: a ': ' too many, or wrong indentation; a text with ': ' in it needs quotes",
    ),
    "escape": (
        SMALL + 'lora: {target_modules: ["re:.*\\.q"]}\n',
        "{0}, line 8: an unknown \\ escape; patterns stand in single quotes, where \\ is an ordinary character",
    ),
    "a tag": (
        "model: !!python/object:os.system x\n",
        "{0}: the tag tag:yaml.org,2002:python/object:os.system is not read",
    ),
    "documents": (SMALL + "---\nseed: 1\n", "{0}, line 8: a second document ('---'); one config a file"),
    "no alias": (SMALL + "lora: *x\n", "{0}, line 8: found undefined alias 'x'"),
    "deep": ("[" * 600, "{0}: nested too deeply"),
    "digits": (f"seed: {'9' * 5000}\n", "{0}: a number with thousands of digits"),
    "a zero byte": ("seed: \0\n", "{0}: unacceptable character #x0000: special characters are not allowed"),
    "large": ("#" * (1 << 20) + "\n", "{0} has 1,048,577 bytes; a config is a small YAML file"),
    "section": (SMALL + "lora: 8\n", f"lora is 8; it must be a mapping of the keys {LORA_KEYS}"),
    "foreign section": (SMALL + "optimizer:\n  lr: 1\n", "unknown key optimizer.lr; did you mean train.lr?"),
    "dotted": (
        SMALL + "train.lr: 2e-4\n",
        "train.lr in one piece is for the command line; in a file lr stands below train:",
    ),
    "line break": (SMALL + '"a\\nb": 1\n', f"unknown key 'a\\nb'; {ALL}"),
    "number as key": (SMALL + "7: 8\n", f"unknown key 7; {ALL}"),
    "itself": (
        SMALL + "lora:\n  target_modules: &a [*a]\n",
        "lora.target_modules[0] is a list; lora.target_modules must be a list of strings",
    ),
}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a verb that takes a config says to a wrong one: a line on stderr, nothing on stdout, exit code 2."""
    with pytest.raises(SystemExit) as exit:
        main(["plan", *arguments])
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (2, "")
    assert err.startswith("lora-scale: error: ") and err.count("\n") == 1, err
    assert "pydantic" not in err and "Input should" not in err and "Traceback" not in err
    return err.removeprefix("lora-scale: error: ").rstrip("\n")


@pytest.mark.parametrize(("override", "message"), WRONG_VALUES)
def test_wrong_values_are_named(config: Path, capsys: pytest.CaptureFixture[str], override: str, message: str) -> None:
    assert refused(capsys, str(config), override) == message


@pytest.mark.parametrize("case", WRONG_FILES)
def test_wrong_files_are_named(config: Path, capsys: pytest.CaptureFixture[str], case: str) -> None:
    text, message = WRONG_FILES[case]
    config.write_text(text)
    assert refused(capsys, str(config)) == message.format(config)


def test_files_that_are_no_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"seed: 1 # caf\xe9\n")
    absent, inside = tmp_path / "absent.yaml", latin / "run.yaml"
    for path, message in {
        absent: f"{absent}: no such file; it must be a config, a YAML file",
        tmp_path: f"{tmp_path} is a folder; it must be a config, a YAML file",
        inside: f"{inside} cannot be read: Not a directory",
        latin: f"{latin} is not UTF-8 from byte 13 on; a config is a YAML file in UTF-8",
    }.items():
        assert refused(capsys, str(path)) == message


def test_all_mistakes_are_told_at_once(config: Path) -> None:
    config.write_text("model: {trust_remote_code: yes, x: 1}\ntrain: {lr: 0}\nlr: 2\nlora: 5\nresume: off\n")
    with pytest.raises(ConfigError) as error:
        load(config, ["seed", "train.lr=-1"])
    assert [line.split(" ", 3)[:3] for line in str(error.value).splitlines()] == [
        ["override", "'seed'", "is"],
        ["unknown", "key", "model.x;"],
        ["unknown", "key", "lr;"],
        ["lora", "is", "5;"],
        ["missing", "key", "model.path;"],
        ["model.trust_remote_code", "is", "'yes';"],
        ["missing", "key", "data.train;"],
        ["missing", "key", "run_dir;"],
        ["resume", "is", "'off';"],
        ["train.lr", "is", "-1;"],
    ]


def test_numbers_and_words_are_yaml_1_2(config: Path) -> None:
    text = "train:\n  lr: 2e-4\n  eps: 1e-3\n  max_steps: 1_000\n  warmup_steps: 010\nmodel: no-name\nseed: 0x10\n"
    config.write_text(text + "run_dir: on/12:30\ndata: {train: rows.jsonl, packing: False, validation: ~}\nlora:\n")
    read = load(config)
    assert (read.train.lr, read.train.eps, read.train.max_steps, read.train.warmup_steps) == (2e-4, 1e-3, 1000, 10)
    assert (read.model.path, read.run_dir, read.seed) == ("no-name", Path("on/12:30"), 16)
    assert read.data.packing is False and read.data.validation is None and read.lora.r == 8


def test_overrides_into_what_is_no_mapping(config: Path) -> None:
    config.write_text(SMALL + "lora: x\n")
    with pytest.raises(ConfigError, match=r"^lora is 'x'; it must be a mapping of the keys r, .*pissa$"):
        load(config, ["lora.r=4", "lora.rank_pattern.q=4"])
    config.write_text(SMALL + "lora: {rank_pattern: x}\n")
    assert load(config, ["lora.rank_pattern.q=4"]).lora.rank_pattern == {"q": 4}


def test_json_with_tabs_and_a_byte_order_mark(config: Path) -> None:
    tree = {"model": "base", "data": {"train": "t"}, "run_dir": "r", "train": {"max_steps": 3, "lr": 1e-4}}
    config.write_text("\ufeff" + json.dumps(tree, indent="\t"))
    assert load(config).train.lr == 1e-4


def test_anchors_and_merge_keys(config: Path) -> None:
    config.write_text(SMALL + "eval: &often {every: 10}\nsave:\n  <<: *often\n  keep: 5\n")
    assert (load(config).save.every, load(config).save.keep) == (10, 5)
    config.write_text(SMALL + "eval: &often {every: 10}\nsave: *often\n")
    read = load(config, ["save.every=7"])
    assert (read.eval.every, read.save.every) == (10, 7), "an override of one use of an anchor must not reach the other"


def test_overrides(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    config.write_text(SMALL + "lora:\n  dropout: 0.1\n  rank_pattern: {k: 2}\n")
    read = load(
        config,
        [
            "model=~/models/b=c",
            "lora.r=16",
            "lora.r=32",
            "lora={lora_alpha: 64}",
            "lora.target_modules=['re:.*layers\\.[0-3]\\..*q_proj', k]",
            "lora.rank_pattern.layers.0.q_proj=4",
            "data.validation=0.02",
            "recompute=4",
            "run_dir= runs/b ",
        ],
    )
    assert read.model.path == "/home/me/models/b=c"
    assert (read.lora.r, read.lora.lora_alpha, read.lora.dropout) == (32, 64.0, 0.1)
    assert read.lora.target_modules == ("re:.*layers\\.[0-3]\\..*q_proj", "k")
    assert read.lora.rank_pattern == {"k": 2, "layers.0.q_proj": 4}
    assert (read.data.validation, read.recompute, read.run_dir) == (0.02, 4, Path("runs/b"))


def test_resolved_json_is_a_config_and_says_everything(config: Path) -> None:
    read = load(config, ["data.validation=0.1", "resume=runs/a/checkpoints/step-000001", "lora.rank_pattern.q=4"])
    text = resolved_json(read)
    config.write_text(text)
    assert load(config) == read
    assert {f"{name}.{leaf}" for name, part in json.loads(text).items() if isinstance(part, dict) for leaf in part} | {
        name for name, part in json.loads(text).items() if not isinstance(part, dict)
    } == set(keys())


def test_hash_is_of_what_decides_the_results(config: Path) -> None:
    plain = config_sha256(load(config))
    assert config_sha256(load(config, ["run_dir=elsewhere", "resume=never", "lora.lora_alpha=16"])) == plain
    changes = ["seed=1", "lora.r=9", "train.lr=1e-3", "data.train=other.jsonl", "model=other", "parallel.zero_stage=2"]
    assert len({plain, *(config_sha256(load(config, [change])) for change in changes)}) == 1 + len(changes)


def test_differences_name_the_key_and_both_values(config: Path) -> None:
    old = json.loads(resolved_json(load(config, ["lora.rank_pattern.q=4"])))
    new = json.loads(resolved_json(load(config, ["lora.r=16", "lora.target_modules=[q]", "data.validation=rows"])))
    assert differences(old, old) == []
    assert differences(old, new) == [
        "data.validation: null -> 'rows'",
        "lora.r: 8 -> 16",
        'lora.target_modules: ["q", "v"] -> ["q"]',
        "lora.rank_pattern.q: 4 -> absent",
    ]


def test_every_key_is_described() -> None:
    """The wording is read off annotations; a field of a new kind would be shown as Python's name for it."""
    for key in keys().values():
        assert key.meaning.endswith((".", ")")) and "typing" not in key.takes and "<" not in key.takes, key.name
    assert keys()["data.validation"].takes == "a path, a number or null"
    assert {row.ours for row in TABLE} <= {*keys(), ""} and all(row.ours or row.how for row in TABLE)


def test_docs_are_not_stale() -> None:
    page = Path(__file__).parent.parent / "docs" / "config.md"
    assert page.read_text() == configdoc.text(), "run: python -m lora_scale.spec.configdoc > docs/config.md"


def test_the_schema_is_not_stale_and_every_config_names_it() -> None:
    root = Path(__file__).parent.parent
    page = root / "docs" / "config.schema.json"
    assert json.loads(page.read_text()) == schema(), "run: lora-scale config --schema > docs/config.schema.json"
    assert len(CONFIGS) >= 4
    for path in CONFIGS:
        first, _ = path.read_text().split("\n", 1)
        assert first == "# yaml-language-server: $schema=../docs/config.schema.json"


def test_the_schema_takes_what_the_reader_takes(config: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(schema())
    for path in CONFIGS:
        check.validate(json.loads(json.dumps(YAML(typ="safe", pure=True).load(path.read_text()))))
    read = load(config, ["data.train=[{path: a, weight: 2}]", "lora.rank_pattern.q=4"])
    check.validate(json.loads(resolved_json(read)))
    for wrong in ({"lora": {"r": 0}}, {"lora": {"rank": 8}}, {"data": {"train": []}}, {"recompute": "some"}):
        assert not check.is_valid(json.loads(resolved_json(read)) | wrong), wrong


def test_where_every_value_comes_from(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["config", "--show", str(config), "lora.r=16", "lora={dropout: 0.1}", "model=other"])
    assert exit.value.code == 0
    shown = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()}
    assert shown.keys() == keys().keys()
    assert shown["lora.r"] == ["16", "lora.r=16"] and shown["lora.dropout"] == ["0.1", "lora={dropout:", "0.1}"]
    assert shown["train.epochs"] == ["1.0", str(config)] and shown["train.lr"] == ["0.0002", "default"]
    assert shown["model.path"] == ["'other'", "model=other"]


def test_configs_of_other_programs_lead_to_ours() -> None:
    """Every key of theirs is answered by name; what is written for it has every key that the answers name."""
    for name in coming_from.TITLES:
        told = coming_from.answer(name)
        assert not [line for line in told if "keys at the top" in line or "keys of" in line]
        ours = YAML(typ="safe", pure=True).load((coming_from.SAMPLES / f"{name}.ours.yaml").read_text())
        given = {f"{k}.{leaf}" for k, v in ours.items() if isinstance(v, dict) for leaf in v} | set(ours)
        named = {found for line in told if "did you mean" in line for found in keys() if f" {found}?" in line}
        assert len(named) > 15 and named - given <= {"engine.deepspeed", "track.wandb"}, f"{name}: {named - given}"
        assert load(coming_from.SAMPLES / f"{name}.ours.yaml")
    page = Path(__file__).parent.parent / "docs" / "coming-from.md"
    assert page.read_text() == coming_from.page(), "run: python tests/coming_from.py > docs/coming-from.md"


DEEPSPEED = [
    ("zero_optimization.stage", {"zero_optimization": {"stage": 2}}, "is for parallel.zero_stage to say; set that"),
    ("gradient_clipping", {"gradient_clipping": 1.0}, "is for train.max_grad_norm to say; set that"),
    ("train_batch_size", {"train_batch_size": 8}, "is for train.global_batch_size to say; set that"),
    ("bf16", {"bf16": {"enabled": True}}, "is for precision to say; set that"),
    ("optimizer", {"optimizer": {"type": "Adam"}}, "cannot be set: AdamW is the optimizer"),
    (
        "zero_optimization.offload_param",
        {"zero_optimization": {"offload_param": {"device": "cpu"}}},
        "cannot be set: not built: the base stays on the GPUs",
    ),
]


@pytest.mark.parametrize(("key", "tree", "message"), DEEPSPEED)
def test_keys_of_deepspeed_that_are_ours_are_refused(config: Path, key: str, tree: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(config, [f"engine.deepspeed={json.dumps(tree)}"])
    assert str(error.value) == f"engine.deepspeed.{key} {message}"


def test_other_keys_of_deepspeed_pass_through(config: Path, tmp_path: Path) -> None:
    more = {"comms_logger": {"enabled": True}, "zero_optimization": {"reduce_bucket_size": 7}}
    file = tmp_path / "ds.json"
    file.write_text(json.dumps(more))
    for value in (json.dumps(more), str(file)):
        changes = [f"engine.deepspeed={value}", "parallel.base_engine=deepspeed"]
        made = deepspeed_config.ds_config(load(config, changes), 1, 10, 10, ["Layer"])
        assert made["comms_logger"] == {"enabled": True} and made["zero_optimization"]["reduce_bucket_size"] == 7
        assert made["zero_optimization"]["stage"] == 3 and made["communication_data_type"] == "fp32"
    beside = deepspeed_config.ds_config(load(config, []), 1, 10, 10, ["Layer"])  # a flat base, a small adapter
    assert beside["zero_optimization"]["stage"] == 0
    file.write_text('{"train_batch_size": 8}')
    with pytest.raises(ConfigError, match=r"ds.json: engine.deepspeed.train_batch_size is for train.global_batch_size"):
        deepspeed_config.passed_through(load(config, [f"engine.deepspeed={file}"]))
    file.write_text("{")
    with pytest.raises(ConfigError, match="which is not JSON"):
        deepspeed_config.passed_through(load(config, [f"engine.deepspeed={file}"]))


def test_the_example_in_the_docs_loads(config: Path) -> None:
    page = configdoc.text()
    config.write_text(page.split("```yaml\n")[1].split("```")[0])
    read = load(config)
    assert read.train.lr == 2e-4 and read.lora.rank_pattern == {"layers\\.0\\..*": 4}
    assert all(f"| `{name}` |" in page for name in keys())
