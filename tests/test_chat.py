"""What is trained of a conversation, through the templates of published models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_forms import ANSWER, ASK, FORMS, GOLDEN, PAGE, ROWS, everything, make_tokenizer, table, trained

from lora_scale.spec.errors import ConfigError, DataError
from lora_scale.storage.dataset import encode
from lora_scale.storage.encoder import tokenizer
from lora_scale.storage.packing import pack
from lora_scale.storage.rows import read_rows


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return everything()


def test_trained_texts_are_the_golden_ones(found: dict[str, Any]) -> None:
    golden = json.loads(GOLDEN.read_text())
    for form, rows in golden.items():
        for title, outcome in rows.items():
            assert found[form][title] == outcome, f"{form}, {title}; if right: python tests/chat_forms.py --write"
    assert found.keys() == golden.keys() and len(ROWS) >= 20
    assert table(found) in PAGE.read_text(), "run: python tests/chat_forms.py --write"


def test_each_answer_is_trained_once_to_its_end_and_nothing_else(found: dict[str, Any]) -> None:
    """A second look at the golden texts, from the rows: no answer is missing, none ends without its token."""
    for form, rows in found.items():
        ends = "<end_of_turn>" if form == "Gemma" else FORMS[form].eos
        for title in ("one exchange", "two exchanges", "system first", "ends with the user"):
            runs = rows[title]["assistant"]
            if isinstance(runs, str):
                continue
            said = [message["content"] for message in ROWS[title]["messages"] if message["role"] == "assistant"]
            assert [run.removeprefix("<think>\n\n</think>\n\n") for run in runs] == [text + ends for text in said]
            assert rows[title]["last"] == runs[-1:]


@pytest.mark.parametrize("name", FORMS)
def test_training_sees_the_tokens_of_generation(name: str, tmp_path: Path) -> None:
    """One BOS where there is one; the answer follows exactly what generation starts from; padding is not the end."""
    form = FORMS[name]
    tok = make_tokenizer(form, tmp_path)
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [ASK, ANSWER]}))
    documents = encode(read_rows(path), tok, 200)
    ids = documents.ids.tolist()
    start = tok.apply_chat_template([ASK], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert ids[: len(start)] == start and documents.trained[len(start)] and not documents.trained[: len(start)].any()
    if form.bos:
        assert ids[0] == tok.bos_token_id and ids.count(tok.bos_token_id) == 1
    assert tok.pad_token_id == tok.eos_token_id, "padding with the end token must not hide it from the loss"
    batch = pack(documents).batch([0])
    end = tok.convert_tokens_to_ids("<end_of_turn>") if name == "Gemma" else tok.eos_token_id
    assert (batch.labels == end).sum() == 1
    assert (batch.labels[0, len(ids) - 1 :] == -100).all() and (
        batch.input_ids[0, len(ids) :] == tok.pad_token_id
    ).all()


def test_two_bos_become_one(tmp_path: Path) -> None:
    tok = make_tokenizer(FORMS["Llama 3"], tmp_path)
    tok.chat_template = "{{ bos_token }}" + tok.chat_template
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [ASK, ANSWER]}))
    documents = encode(read_rows(path), tok, 200)
    assert documents.ids.tolist().count(tok.bos_token_id) == 1
    assert tok.decode(documents.ids[documents.trained]) == "a small day<|eot_id|>"


def test_a_base_model_with_a_named_template(tmp_path: Path) -> None:
    """`alpaca` ends with the model's own end token and begins with its BOS; `chatml` needs the tokens of ChatML."""
    make_tokenizer(FORMS["Llama 3"], tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    bare = tokenizer(tmp_path)
    assert "has no chat template, as of a base model; set data.chat_template to chatml or alpaca" in trained(
        ROWS["Alpaca"], bare, "assistant", tmp_path
    )
    alpaca = tokenizer(tmp_path, chat_template="alpaca")
    assert trained(ROWS["Alpaca"], alpaca, "completion", tmp_path) == ["a small day<|eot_id|>"]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ROWS["Alpaca"]))
    text = alpaca.decode(encode(read_rows(path), alpaca, 200).ids)
    assert text == (
        "<|begin_of_text|>Below is an instruction that describes a task. Write a response that appropriately completes "
        "the request.\n\n### Instruction:\ntell the weather\n\nof today\n\n### Response:\na small day<|eot_id|>\n\n"
    )
    ends = trained(ROWS["one exchange"], make_tokenizer_with(tmp_path, "{{ messages }}"), "assistant", tmp_path)
    assert "which is no end-of-turn token of this tokenizer" in ends or "differently" in ends


def make_tokenizer_with(folder: Path, template: str) -> Any:
    (folder / "my.jinja").write_text(template)
    return tokenizer(folder, chat_template=str(folder / "my.jinja"))


def test_a_template_without_an_end_is_refused(tmp_path: Path) -> None:
    make_tokenizer(FORMS["SmolLM2"], tmp_path)
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant: {% endif %}"
    told = trained(ROWS["one exchange"], make_tokenizer_with(tmp_path, plain), "assistant", tmp_path)
    assert told == (
        "refused: message 2: the chat template ends it with 'a small day\\n', which is no end-of-turn token of this "
        "tokenizer, so the model would not learn to stop; name another data.chat_template"
    )


def test_marks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    make_tokenizer(FORMS["SmolLM2"], tmp_path)
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
        "{% generation %}{{ m['content'] }}{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}<|im_end|>"
        "{% endfor %}"
    )
    tok = make_tokenizer_with(tmp_path, marked)
    assert trained(ROWS["one exchange"], tok, "assistant", tmp_path) == ["a small day<|im_end|>"], "the end is inside"
    assert "marks 1 parts as generated and the assistant has 2 messages" in trained(
        ROWS["two exchanges"], tok, "assistant", tmp_path
    )


def test_templates_that_are_none(tmp_path: Path) -> None:
    make_tokenizer(FORMS["SmolLM2"], tmp_path)
    with pytest.raises(ConfigError, match=r"data.chat_template is vicuna; it must be chatml, alpaca or a Jinja file"):
        tokenizer(tmp_path, chat_template="vicuna")
    with pytest.raises(ConfigError, match=r"the chat template \(.*my.jinja\), line 1: .*; see data.chat_template"):
        make_tokenizer_with(tmp_path, "{% for m in messages %}")


WRONG = {
    "from": ({"conversations": [{"from": "bot", "value": "a"}]}, '"from" of turn 1 is "bot"; it must be human, user,'),
    "turn": ({"conversations": [3]}, 'turn 1 is no object with "from" and "value"'),
    "arguments": (
        {"messages": [ASK, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
        "(arguments of a tool call of message 2) is not JSON: '{'",
    ),
    "tools": ({"messages": [ASK], "tools": [1]}, '"tools" is a list; it must be a list of objects (JSON Schema)'),
    "history": (
        {"instruction": "a", "output": "b", "history": ["x"]},
        '"history"[0] is no pair of question and answer',
    ),
    "input": ({"instruction": "a", "output": "b", "input": 3}, '"input" is a number; it must be a string'),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_conversations(case: str, tmp_path: Path) -> None:
    row, message = WRONG[case]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert message in str(error.value) and str(error.value).startswith(f"{path}, line 1: ")


def test_alpaca_and_sharegpt_become_messages(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"instruction": "a", "output": "b", "system": "s", "history": [["q", "r"]]}))
    (value,) = read_rows(path).values
    assert [(m["role"], m["content"]) for m in value.messages] == [
        ("system", "s"), ("user", "q"), ("assistant", "r"), ("user", "a"), ("assistant", "b")
    ]  # fmt: skip
    turns = [
        {"from": "human", "value": "q"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
    ]
    path.write_text(json.dumps({"conversations": [*turns, {"from": "observation", "value": "42"}], "tools": "[]"}))
    (value,) = read_rows(path).values
    assert [m["role"] for m in value.messages] == ["user", "assistant", "tool"] and value.tools is None
    assert value.messages[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert np.array_equal(read_rows(path).lines, [1])
