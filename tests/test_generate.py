"""`lora-scale generate`: greedy tokens are those of transformers + PEFT on any layout, and wrong input is refused."""

import itertools
import json
import math
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from generating import GENERATED, reference
from outside import Command
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_merge import peft_model, write_adapter
from tiny import tiny_folder
from training import config, write_rows

from lora_scale import cli
from lora_scale.storage import encoder, prompts, scores
from lora_scale.storage.rows import read_rows

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is deprecated and will be removed in v6:FutureWarning"
)  # transformers
NEW_TOKENS = 12
SMOLLM2 = Path(__file__).parent.parent / "models" / "smollm2-135m-instruct"
GREEDY = {"max_new_tokens": NEW_TOKENS, "batch_size": 3}
SAMPLED = {"max_new_tokens": NEW_TOKENS, "temperature": 0.8, "top_p": 0.95, "top_k": 50, "seed": 5}


def write_prompts(path: Path, count: int = 11) -> Path:
    """Lower-case nonsense of different lengths; every third row has no answer."""
    draw = random.Random(1)
    with path.open("w") as file:
        for number in range(count):
            row = {"prompt": "".join(draw.choices("abcdefgh ", k=draw.randint(2, 20)))}
            file.write(json.dumps(row if number % 3 == 2 else row | {"completion": " the game"}) + "\n")
    return path


BRINGS: dict[str, dict[str, Any]] = {
    "llama": {"use_dora": True, "modules_to_save": ["lm_head"], "trainable_token_indices": [40, 90, 3]},
    "gpt2": {"use_dora": True, "bias": "all", "target_modules": ["c_attn", "mlp.c_proj"], "fan_in_fan_out": True},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 8 heads whose vocabulary two ranks cannot halve, a GPT-2, three adapters of different kinds each."""
    place = tmp_path_factory.mktemp("generate")
    write_prompts(place / "rows.jsonl")
    sizes: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 97}
    tiny_folder(place / "llama", dtype=torch.float32, **sizes)
    tiny_folder(place / "gpt2", "gpt2", dtype=torch.float32)
    for model, few in (("llama", ["q", "v"]), ("gpt2", ["o"])):
        write_adapter(place / f"{model}-a", place / model, seed=1, target_modules=few)
        write_adapter(place / f"{model}-b", place / model, seed=2, r=2)
        peft_model(place / model, place / f"{model}-c", BRINGS[model])
    return place


def case(place: Path, model: str, sampling: dict[str, Any], ends: list[int], **overrides: Any) -> dict[str, Any]:
    words = ["precision=fp32", *(f"{key.replace('__', '.')}={value}" for key, value in overrides.items())]
    return {
        "model": str(place / model),
        "rows": str(place / "rows.jsonl"),
        "adapters": {name: str(place / f"{model}-{name}") for name in "abc"},
        "overrides": words,
        "sampling": sampling,
        "ends": ends,
        "on_host": sampling is not GREEDY,
    }


def until(ids: tuple[int, ...], ends: list[int]) -> tuple[int, ...]:
    return ids[: next((i for i, token in enumerate(ids) if token in ends), len(ids))]


def variety(rows: list[tuple[int, ...]], end: int) -> int:
    """How many different lengths there are if this token ends a row; 0 where no row is left whole."""
    lengths = {len(until(ids, [end])) for ids in rows}
    return len(lengths) if NEW_TOKENS in lengths else 0


LAYOUTS: dict[str, dict[str, Any]] = {"ZeRO-3": {}, "tp": {"parallel__tensor_parallel_size": 2}}


@pytest.mark.ranks
def test_tokens_are_those_of_one_process_on_any_layout(place: Path, tmp_path: Path) -> None:
    """Greedy: of transformers + PEFT, one prompt at a time. Sampled: of another layout, with other batches. While
    training: of PEFT with a checkpoint of that step, and training goes on to the same bits as without."""
    cases, wanted = {}, {}
    for model in ("llama", "gpt2"):
        one = case(place, model, GREEDY, [])
        endless = reference(one["model"], one["adapters"], one["rows"], NEW_TOKENS)
        distinct = [endless["base"], *(endless[name] for name in one["adapters"])]
        assert all(x != y for x, y in itertools.combinations(distinct, 2)), "adapters that change nothing"
        everything = [ids for rows in endless.values() for ids in rows]
        end = max({token for ids in everything for token in ids}, key=lambda t: variety(everything, t))
        assert variety(everything, end) > 1, "rows that end together do not show that ranks wait"
        wanted[model] = {name: [until(ids, [end]) for ids in rows] for name, rows in endless.items()}
        cases |= {(model, name): case(place, model, GREEDY, [end], **more) for name, more in LAYOUTS.items()}
    for name, batch_size in (("ZeRO-3", 4), ("tp", 11)):
        cases[name, "sampled"] = case(place, "llama", SAMPLED | {"batch_size": batch_size}, [], **LAYOUTS[name])
    trees = trainings(place, tmp_path)
    found = run_ranks(2, "generating:both", cases, trees, folder=tmp_path / "ranks")
    tokens, trained = found[0]
    assert tokens == found[1][0], "the ranks do not agree"
    for model, name in itertools.product(wanted, LAYOUTS):
        assert tokens[model, name] == wanted[model], f"{model}, {name}"
    assert tokens["ZeRO-3", "sampled"] == tokens["tp", "sampled"]
    assert tokens["tp", "sampled"]["a"] != tokens["llama", "tp"]["a"], "sampling took the likeliest tokens only"
    check_trainings(trained, place, tmp_path)


def trainings(place: Path, tmp_path: Path) -> dict[tuple[str, bool], dict[str, Any]]:
    """A run on each layout with and without rows that are continued."""
    rows = write_rows(tmp_path / "tokens.jsonl")
    more: dict[str, Any] = {
        "train__max_steps": 4,
        "data__packing": False,
        "data__validation": 0.2,
        "lora__dropout": 0.1,
        "lora__target_modules": ["q", "v"],
    }
    asked = {"eval__generate": str(place / "rows.jsonl"), "eval__generate_rows": 5, "eval__max_new_tokens": 6}
    return {
        (name, generates): config(
            place / "llama", rows, tmp_path / f"{name}-{generates}", **more, **layout, **(asked if generates else {})
        )
        for (name, layout), generates in itertools.product(LAYOUTS.items(), (True, False))
    }


def check_trainings(found: dict[tuple[str, bool], Any], place: Path, tmp_path: Path) -> None:
    tokenizer = encoder.tokenizer(place / "llama")
    ends = prompts.end_tokens(place / "llama", tokenizer)
    for name in LAYOUTS:
        losses, row, saved = found[name, True]
        assert losses == found[name, False][0], f"{name}: generating changes training"
        written = tmp_path / f"{name}-True" / "generated" / f"step-{GENERATED:06d}.jsonl"
        completions = [json.loads(line)["completion"] for line in written.read_text().splitlines()]
        theirs = reference(str(place / "llama"), {"a": saved}, str(place / "rows.jsonl"), 6)
        wanted = [tokenizer.decode(until(ids, ends), skip_special_tokens=True) for ids in theirs["a"][:5]]
        assert completions == wanted and theirs["a"] != theirs["base"], name
        assert row["val_loss"] > 0 and set(row["generated"]) == {"rouge1", "rouge2", "rougeL", "exact_match", "bleu"}


@pytest.mark.long
@pytest.mark.ranks
@pytest.mark.timeout(3000)
@pytest.mark.parametrize(("ranks", "overrides"), [(2, {}), (3, {"parallel__tensor_parallel_size": 3})])
def test_smollm2(ranks: int, overrides: dict[str, Any], tmp_path: Path) -> None:
    """9 heads, 3 key heads: ZeRO-3 on two ranks, tensor parallel on three."""
    if not (SMOLLM2 / "config.json").is_file():
        pytest.skip("needs the model: python scripts/get_model.py")
    rows = (Path(__file__).parent / "data" / "synopsis-test.jsonl").read_text().splitlines()[:5]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "smollm2").symlink_to(SMOLLM2)
    for name, seed, targets in (("a", 1, ["q", "v"]), ("b", 2, ["all-linear"])):
        write_adapter(tmp_path / f"smollm2-{name}", SMOLLM2, seed, 0.02, target_modules=targets)
    one = case(tmp_path, "smollm2", {"max_new_tokens": 16, "batch_size": 3}, [], **overrides)
    del one["adapters"]["c"]
    theirs = reference(one["model"], one["adapters"], one["rows"], 16)
    assert theirs["a"] != theirs["base"] != theirs["b"] != theirs["a"]
    found = run_ranks(ranks, "generating:on_ranks", {"it": one}, folder=tmp_path / "ranks", timeout=1500)
    assert all(each["it"] == theirs for each in found)


def call(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and stderr of `lora-scale generate ...`, in this process: it ends before there are ranks."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as end:
        cli.main(["generate", *map(str, arguments)])
    return int(end.value.code or 0), capfd.readouterr().err


def damaged(adapter: Path, folder: Path, how: str) -> Path:
    """A copy of an adapter with something wrong with it."""
    shutil.copytree(adapter, folder)
    file = folder / "adapter_model.safetensors"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
        return folder
    tensors, metadata = load_file(file), {"format": "pt"}
    if how == "nan":
        tensors[next(iter(tensors))][0, 0] = math.nan
    elif how == "nothing":
        tensors = {name.replace(".layers.", ".blocks."): tensor for name, tensor in tensors.items()}
    elif how == "half":
        tensors.pop(next(iter(tensors)))
    else:
        metadata["base_fingerprint"] = "sha256:" + "0" * 64
    save_file(tensors, file, metadata)
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "adapter_model.safetensors"),
        ("nan", "holds a value that is not finite"),
        ("nothing", "has factors for model.blocks.0.self_attn.q_proj, which"),
        ("half", "is there but"),
        ("other base", "was trained on another base than"),
    ],
)
def test_a_damaged_adapter_is_refused_at_once(
    how: str, message: str, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    bad = damaged(place / "llama-a", tmp_path / "bad", how)
    adapters = ("--adapter", f"good={place / 'llama-a'}", "--adapter", f"bad={bad}")
    code, said = call(capfd, place / "llama", "--data", place / "rows.jsonl", "--out", tmp_path / "out", *adapters)
    assert (code, message in said) == (2, True), said
    assert not [path for path in tmp_path.iterdir() if path.name != "bad"], "something was written"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--adapter", "x"], "--adapter is 'x'; write NAME=PATH"),
        (["--adapter", "../x=y"], "write NAME=PATH"),
        (["--adapter", "base={a}"], "the name 'base' is taken"),
        (["--adapter", "x={a}", "--adapter", "x={a}"], "the name 'x' is taken"),
        (["--adapter", "x=nowhere"], "nowhere does not exist"),
        (["--adapter", "x={gpt2}"], "was trained on another base"),
        (["--adapter", "x={gpt2}", "--allow-other-base"], "it belongs to another model"),
        (["--out", "{here}"], "--out is {here}, which is not empty"),
        (["--data", "nothing.jsonl"], "nothing.jsonl does not exist"),
        (["--max-new-tokens", "5000"], "--max-new-tokens is 5000; the model has 2048 positions"),
        (["--max-new-tokens", "2044"], "has a prompt of"),
        (["--ranks", "3", "parallel.tensor_parallel_size=2"], "does not divide this job's 3 ranks"),
        (["parallel.tensor_parallel_sise=2"], "did you mean parallel.tensor_parallel_size?"),
    ],
)
def test_wrong_usage(
    more: list[str], message: str, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    names = {"a": str(place / "llama-a"), "gpt2": str(place / "gpt2-a"), "here": str(tmp_path)}
    words = ["--data", place / "rows.jsonl", "--out", tmp_path / "out", *(word.format(**names) for word in more)]
    code, said = call(capfd, place / "llama", *words)
    assert (code, message.format(**names) in said) == (2, True), said
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "something was written"


@pytest.mark.long
@pytest.mark.ranks
def test_the_command_from_rows_to_rows(place: Path, tmp_path: Path) -> None:
    """Two ranks; a file that is there already, from a call that was killed, is kept."""
    adapters = ["--adapter", f"a={place / 'llama-a'}", "--adapter", f"b={place / 'llama-b'}", "--with-base"]
    layout = ["precision=fp32", "--ranks", "2", "--batch-size", "4", "--max-new-tokens", "5"]
    words = [str(place / "llama"), "--data", str(place / "rows.jsonl"), "--out", "out", *adapters, *layout]
    command = [sys.executable, "-m", "lora_scale", "generate", *words]
    assert Command(command, tmp_path, TMPDIR=str(tmp_path)).end().code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"], "logs of a success are not left"
    out = tmp_path / "out"
    names = ["a.jsonl", "b.jsonl", "base.jsonl", "generate.json", "metrics.json"]
    assert sorted(path.name for path in out.iterdir()) == names
    theirs = reference(str(place / "llama"), {n: str(place / f"llama-{n}") for n in "ab"}, str(place / "rows.jsonl"), 5)
    tokenizer = encoder.tokenizer(place / "llama")
    given = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    for name in ("base", "a", "b"):
        rows = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
        assert [row["prompt"] for row in rows] == [row["prompt"] for row in given]
        assert [row.get("reference") for row in rows] == [row.get("completion") for row in given]
        ends = prompts.end_tokens(place / "llama", tokenizer)
        wanted = [tokenizer.decode(until(ids, ends), skip_special_tokens=True) for ids in theirs[name]]
        assert [row["completion"] for row in rows] == wanted
    assert set(json.loads((out / "metrics.json").read_text())) == {"base", "a", "b"}
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    out.rename(tmp_path / ".out.unfinished")
    (tmp_path / ".out.unfinished" / "b.jsonl").unlink()
    again = Command(command, tmp_path, TMPDIR=str(tmp_path)).end()
    assert again.code == 0 and "a        was there" in again.screen and "base     was there" in again.screen
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_scores_are_the_libraries() -> None:
    scorer = scores.Scorer()
    same, other = scorer.row("a b c ", "a b c"), scorer.row("a x y", "a b c")
    assert same == {"rouge1": 1.0, "rouge2": 1.0, "rougeL": 1.0, "exact_match": 1.0}
    assert other == {"rouge1": pytest.approx(1 / 3), "rouge2": 0.0, "rougeL": pytest.approx(1 / 3), "exact_match": 0.0}
    found = scorer.corpus([same, other], [("a b c d e", "a b c d e"), ("v w x y z", "v w x y z")])
    assert found["rouge1"] == {"mean": pytest.approx(2 / 3), "standard_error": pytest.approx(1 / 3)}
    assert found["bleu"] == pytest.approx(100.0) and found["rows"] == 2


CHAT = [{"role": "user", "content": "the game"}, {"role": "assistant", "content": "reads files"}]


@pytest.mark.parametrize(
    ("row", "reference"),
    [
        ({"prompt": "the game", "completion": "reads files"}, "reads files"),
        ({"messages": CHAT}, "reads files"),
        ({"instruction": "the game", "output": "reads files"}, "reads files"),
        ({"prompt": "the game"}, None),
        ({"messages": CHAT[:1]}, None),
        ({"instruction": "the game"}, None),
        ({"text": "the game"}, None),
    ],
)
def test_a_prompt_is_the_start_of_what_training_sees(row: dict[str, Any], reference: str | None, place: Path) -> None:
    path = place / "one.jsonl"
    path.write_text(json.dumps(row) + "\n")
    tokenizer = encoder.tokenizer(place / "llama")
    (prompt,) = prompts.read(path, tokenizer, None)
    assert prompt.reference == reference
    if reference is not None:
        rows = read_rows(path)
        ((ids, trained),) = encoder.Encoder(tokenizer, rows, "completion").encode(rows.values, [1])
        first = trained.index(1)
        assert tuple(ids[:first]) == prompt.ids


def test_every_end_token_is_known(place: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"eos_token_id": 7}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 11]}')
    assert prompts.end_tokens(tmp_path, encoder.tokenizer(place / "llama")) == [2, 7, 9, 11]
