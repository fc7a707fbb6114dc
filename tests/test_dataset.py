"""Rows and documents: what a wrong file is told, and that tokens and loss marks are those that generation needs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import CHAT_TEMPLATE, write_tokenizer

from lora_scale.spec.errors import ConfigError, DataError, ModelError
from lora_scale.storage.dataset import encode
from lora_scale.storage.encoder import tokenizer
from lora_scale.storage.rows import Rows, read_rows, split

REAL_MODEL = Path(__file__).parents[1] / "models" / "smollm2-135m-instruct"
SAMPLE = Path(__file__).parent / "data" / "synopsis-val.jsonl"
CHAT = [
    {"role": "user", "content": "what is the weather?"},
    {"role": "assistant", "content": "a small day"},
    {"role": "user", "content": "and the next"},
    {"role": "assistant", "content": "the old one\n"},
]


@pytest.fixture(scope="session")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return tokenizer(write_tokenizer(tmp_path_factory.mktemp("tok"), 400))


@pytest.fixture(scope="session")
def bos_tok(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Puts <|endoftext|> before every text, as Llama 3's tokenizer does with its own token."""
    return tokenizer(write_tokenizer(tmp_path_factory.mktemp("bos"), 400, bos=True))


@pytest.fixture(scope="session")
def spaced_tok() -> Any:
    """Puts a BOS and a space before every text, as Llama 2's tokenizer does."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = ["<s>", "</s>", "\u2581", "\n", *"abcdefghijklmnopqrstuvwxyz:"]
    words = {"\u2581a": ("\u2581", "a"), "\u2581b": ("\u2581", "b"), "ab": ("a", "b"), "\nc": ("\n", "c")}
    vocab = {token: number for number, token in enumerate([*letters, *words])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=list(words.values()), unk_token="<s>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def write_rows(folder: Path, *rows: Any) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def one(path: Path, tok: Any, seq_len: int = 200, **options: Any) -> tuple[list[int], list[int]]:
    """(ids, trained ids) of a file of one row."""
    documents = encode(read_rows(path), tok, seq_len, **options)
    assert len(documents) == 1
    return documents.ids.tolist(), documents.ids[documents.trained].tolist()


# --- files that cannot be used -------------------------------------------------------------------------------------

GOOD = b'{"prompt": "p", "completion": "c"}\n'
ALL_FORMS = (
    '{"input_ids"}, {"messages"}, {"conversations"}, {"prompt", "completion"}, {"instruction", "output"}, {"text"}'
)
RENAME = "rename the keys, or say in data.fields what they hold"

# What the file holds, and the message after "PATH": always the line, what is wrong there, and what to do about it.
WRONG = {
    "empty file": (b"", f" is empty; it needs rows of the form {ALL_FORMS}"),
    "gzip": (b"\x1f\x8b\x08\x00", " is a gzip file, not JSON lines; unpack it with gunzip"),
    "parquet": (
        b"PAR1\x15\x04",
        " is a damaged Parquet file (Parquet file size is 6 bytes, smaller than the minimum file footer (8 bytes)); "
        "write or copy it anew",
    ),
    "UTF-16": (
        '{"text": "a"}'.encode("utf-16"),
        " is UTF-16 text, not JSON lines; convert it with iconv -f UTF-16 -t UTF-8",
    ),
    "empty line": (
        GOOD + b"\n" + GOOD,
        ", line 2: is empty; every line holds one JSON object (delete the line)",
    ),
    "not JSON": (
        GOOD + b'{"prompt": "p" "completion": "c"}\n',
        ", line 2: is not JSON (Expecting ',' delimiter at column 16); one object a line",
    ),
    "one row over several lines": (
        b'{\n"text": "a"\n}\n',
        ": 3 rows cannot be used; line 1: is not JSON (Expecting property name enclosed in double quotes at column 2); "
        "one object a line; line 2: is not JSON (Extra data at column 7); one object a line; "
        "line 3: is not JSON (Expecting value at column 1); one object a line",
    ),
    "a JSON list over several lines": (
        b"[\n",
        ", line 1: is not JSON (Expecting value at column 2); a list belongs in a file called .json",
    ),
    "a JSON list": (
        b'[{"text": "a"}]\n',
        ", line 1: is a JSON list; call the file .json, or write one object a line: jq -c '.[]'",
    ),
    "a string": (b'"text"\n', ", line 1: is a string; a row is a JSON object"),
    "not UTF-8": (
        GOOD + '{"text": "\u00e9"}\n'.encode("latin-1"),
        ", line 2: is not UTF-8 (byte 10); convert the file, for example with iconv",
    ),
    "deep nesting": (
        b"[" * 200_000 + b"\n",
        ", line 1: is JSON nested too deeply; a row is a flat object",
    ),
    "unknown keys": (
        b'{"question": "p", "answer": "c"}\n',
        f', line 1: has the keys "question", "answer"; it must be one of {ALL_FORMS}; {RENAME}',
    ),
    "no completion": (b'{"prompt": "p"}\n', ', line 1: has "prompt" but no "completion"; a row needs both'),
    "no prompt": (GOOD + b'{"completion": "p"}\n', ', line 2: has "completion" but no "prompt"; a row needs both'),
    "another form": (
        GOOD + b'{"text": "a"}\n',
        ', line 2: is of the form {"text"}, but line 1 of {"prompt", "completion"}; one file holds one form',
    ),
    "a key missing": (
        b'{"text": "a"}\n{"txt": "a"}\n',
        f', line 2: has the keys "txt"; it must be of the form {{"text"}}, as line 1; {RENAME}',
    ),
    "null": (b'{"text": null}\n', ', line 1: "text" is null; it must be a string'),
    "a number": (b'{"prompt": "p", "completion": 4}\n', ', line 1: "completion" is a number; it must be a string'),
    "a conversation as prompt": (
        b'{"prompt": [{"role": "user", "content": "p"}], "completion": []}\n',
        ', line 1: "prompt" is a list; it must be a string; write a conversation as {"messages"}',
    ),
    "half a surrogate pair": (
        b'{"text": "ab\\ud800"}\n',
        ', line 1: "text" holds half a surrogate pair (character 2); replace it by U+FFFD',
    ),
    "messages is a string": (
        b'{"messages": "hi"}\n',
        ', line 1: "messages" is a string; it must be a list of {"role", "content"}',
    ),
    "no messages": (
        b'{"messages": []}\n',
        ', line 1: "messages" is an empty list; it must be a list of {"role", "content"}',
    ),
    "a message is a string": (
        b'{"messages": ["hi"]}\n',
        ', line 1: message 1 is a string; it must be an object with "role" and "content"',
    ),
    "another chat format": (
        b'{"messages": [{"from": "human", "value": "hi"}]}\n',
        ', line 1: message 1 has no "role"; it needs "role" and "content"; rename "messages" to "conversations"',
    ),
    "an image": (
        b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}\n',
        ', line 1: "content" of message 1 is a list; it must be a string',
    ),
    "a tool call": (
        b'{"messages": [{"role": "assistant", "content": "", "tool_calls": [1]}]}\n',
        ', line 1: a tool call of message 1 has no "function" with a "name"',
    ),
    "input_ids is a string": (
        b'{"input_ids": "1 2"}\n',
        ', line 1: "input_ids" is a string; it must be a list of integers',
    ),
    "no input_ids": (b'{"input_ids": []}\n', ', line 1: "input_ids" is an empty list; delete the row'),
    "a list in input_ids": (
        b'{"input_ids": [[1, 2]]}\n',
        ', line 1: "input_ids"[0] is a list; it must be an integer',
    ),
    "true in input_ids": (
        b'{"input_ids": [1, true]}\n',
        ', line 1: "input_ids"[1] is true or false; it must be an integer',
    ),
    "a huge id": (
        b'{"input_ids": [1, 99999999999]}\n',
        ', line 1: "input_ids"[1] is 99999999999; it lies outside every vocabulary',
    ),
    "labels too short": (
        b'{"input_ids": [1, 2], "labels": [2]}\n',
        ', line 1: "labels" has 1 entries and "input_ids" 2; there is one label a token',
    ),
    "labels shifted": (
        b'{"input_ids": [1, 2, 3], "labels": [2, 3, -100]}\n',
        ', line 1: "labels"[0] is 2 and "input_ids"[0] is 1; a label is its own token or -100 (labels are not shifted)',
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_told_line_reason_and_way_out(case: str, tmp_path: Path) -> None:
    content, expected = WRONG[case]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as error:
        read_rows(path)
    assert str(error.value) == f"{path}{expected}"


def test_a_path_that_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        read_rows(tmp_path)
    assert str(error.value).startswith(f"{tmp_path} cannot be read as a folder of the datasets library (EmptyDataset")
    with pytest.raises(DataError) as error:
        read_rows(tmp_path / "none.jsonl")
    assert str(error.value) == (
        f"{tmp_path}/none.jsonl does not exist; data.train and data.validation name a JSONL, JSON, CSV or Parquet "
        "file, a folder of the datasets library, or a name on the hub"
    )


def test_five_bad_rows_are_listed_and_the_others_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path, {"text": "good"}, *[{"text": number} for number in range(7)], {"text": "good"})
    with pytest.raises(DataError) as error:
        read_rows(path)
    listed = "; ".join(f'line {line}: "text" is a number; it must be a string' for line in range(2, 7))
    assert str(error.value) == f"{path}: 7 rows cannot be used; {listed}; and 2 more"


# --- files that can be used ----------------------------------------------------------------------------------------


def test_the_first_row_decides_and_extra_keys_are_ignored(tmp_path: Path) -> None:
    rows = read_rows(
        write_rows(
            tmp_path,
            {"id": 1, "prompt": "p", "completion": "c", "text": "x"},
            {"completion": "d", "prompt": "q", "meta": {"a": [1]}},
        )
    )
    assert (rows.form, rows.values, rows.lines.tolist()) == ("prompt", [("p", "c"), ("q", "d")], [1, 2])


def test_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    """Lines end at \\n only: U+2028 and \\r inside a string are text; Windows line ends and a UTF-8 mark do no harm."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a\xe2\x80\xa8b"}\r\n{"text": "c"}')
    assert read_rows(path).values == ["a\u2028b", "c"]


def test_max_rows_reads_no_further(tmp_path: Path) -> None:
    path = write_rows(tmp_path, {"text": "a"}, {"text": "b"}, {"text": 3})
    assert read_rows(path, max_rows=2).values == ["a", "b"]


def texts(values: list[str]) -> Rows:
    return Rows(Path("rows.jsonl"), "text", values, np.arange(1, len(values) + 1))


@settings(deadline=None)
@given(first=st.integers(0), seed=st.integers(0, 2**70))
def test_a_split_is_by_content_and_seed_alone(first: int, seed: int) -> None:
    values = [str(number) for number in range(first, first + 200)]
    train, held_out = split(texts(values + values), 0.3, seed)
    assert set(train.values).isdisjoint(held_out.values), "equal rows are on one side"
    assert sorted(train.values + held_out.values) == sorted(values + values)
    assert sorted([*train.lines, *held_out.lines]) == list(range(1, 2 * len(values) + 1))
    fewer = split(texts(values[::-1][:100]), 0.3, seed)[1]
    assert set(fewer.values) == set(held_out.values) & set(values[::-1][:100]), "other rows move no row"
    # 200 fair draws: six standard deviations
    assert abs(len(held_out.values) / len(values) / 2 - 0.3) < 6 * (0.3 * 0.7 / len(values)) ** 0.5


def test_splits_of_other_seeds_differ_and_other_forms_split_too() -> None:
    values = [str(number) for number in range(100)]
    assert split(texts(values), 0.5, 0)[0].values != split(texts(values), 0.5, 1)[0].values
    ready = [(np.array([1, number], dtype=np.int32), np.array([False, True])) for number in range(100)]
    parts = split(Rows(Path("ids"), "input_ids", ready, np.arange(1, 101)), 0.5, 0)
    assert sorted(value[0][1] for part in parts for value in part.values) == list(range(100))


def test_a_split_that_leaves_a_side_empty_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        split(texts(["a", "b", "c"]), 0.0001, 0)
    assert str(error.value) == (
        "data.validation is 0.0001; of the 3 rows of rows.jsonl that leaves none for validation; "
        "give another fraction, or a file of its own"
    )
    with pytest.raises(ConfigError, match="leaves none for training"):
        split(texts(["a"]), 0.9999999, 0)


# --- prompt and completion -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tok", "bos_tok", "spaced_tok"])
@pytest.mark.parametrize(
    ("prompt", "completion"), [("ab a:", " a b"), ("a\n", "ab"), ("a", "b"), ("a ", "b"), ("", "a")]
)
def test_the_prompt_is_tokenised_as_in_generation(
    name: str, prompt: str, completion: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tok = request.getfixturevalue(name)
    ids, trained = one(write_rows(tmp_path, {"prompt": prompt, "completion": completion}), tok)
    in_generation = tok(prompt)["input_ids"]
    assert ids[: len(in_generation)] == in_generation
    expected = ids[max(1, len(in_generation)) :]  # the very first token of all is predicted by none
    assert trained == expected
    assert ids.count(tok.eos_token_id) == 1 and ids[-1] == tok.eos_token_id
    assert tok.decode(ids, skip_special_tokens=True) == prompt + completion


def test_a_space_is_not_put_between_prompt_and_completion(spaced_tok: Any, tmp_path: Path) -> None:
    """Tokenised alone, "b" becomes " b" there; the model would learn to write a space that the row does not have."""
    assert spaced_tok.decode(spaced_tok("b", add_special_tokens=False)["input_ids"]) == "b"
    ids, trained = one(write_rows(tmp_path, {"prompt": "a\n", "completion": "b"}), spaced_tok)
    assert spaced_tok.convert_ids_to_tokens(ids) == ["<s>", "\u2581a", "\n", "b", "</s>"]
    assert spaced_tok.convert_ids_to_tokens(trained) == ["b", "</s>"]


def test_no_token_is_lost_where_the_completion_merges_with_a_line_end(spaced_tok: Any, tmp_path: Path) -> None:
    _, trained = one(write_rows(tmp_path, {"prompt": "a", "completion": "c"}), spaced_tok)
    assert spaced_tok.convert_ids_to_tokens(trained) == ["\u2581", "c", "</s>"]


def test_a_merge_across_the_border_does_not_change_the_prompt(tok: Any, tmp_path: Path) -> None:
    whole = tok("the")["input_ids"]
    assert len(whole) == 1, "this tokenizer merges t, h and e"
    ids, trained = one(write_rows(tmp_path, {"prompt": "t", "completion": "he"}), tok)
    assert ids[:1] == tok("t")["input_ids"] and len(trained) == len(ids) - 1


def test_one_bos_and_one_eos_also_where_the_text_has_them(bos_tok: Any, tmp_path: Path) -> None:
    ids, _ = one(write_rows(tmp_path, {"prompt": "<|endoftext|>a", "completion": "b<|im_end|>"}), bos_tok)
    assert ids.count(bos_tok.bos_token_id) == ids.count(bos_tok.eos_token_id) == 1
    assert (ids[0], ids[-1]) == (bos_tok.bos_token_id, bos_tok.eos_token_id)


def test_train_on_all_puts_loss_on_the_prompt_too(tok: Any, tmp_path: Path) -> None:
    ids, trained = one(write_rows(tmp_path, {"prompt": "a small", "completion": " day"}), tok, train_on="all")
    assert trained == ids[1:]


# --- text, ready tokens --------------------------------------------------------------------------------------------


def test_text_trains_on_all_and_ends(bos_tok: Any, tmp_path: Path) -> None:
    ids, trained = one(write_rows(tmp_path, {"text": "a small day"}), bos_tok)
    assert ids == [*bos_tok("a small day")["input_ids"], bos_tok.eos_token_id]
    assert trained == ids[1:]


def test_ready_tokens_stay_as_they_are(tok: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path, {"input_ids": [5, 6, 7, 8], "labels": [5, -100, 7, -100]})
    assert one(path, tok) == ([5, 6, 7, 8], [7])
    assert one(path, tok, train_on="all") == ([5, 6, 7, 8], [6, 7, 8])
    assert one(write_rows(tmp_path, {"input_ids": [5, 6, 7], "labels": None}), tok) == ([5, 6, 7], [6, 7])


def test_ids_outside_the_vocabulary_are_named(tok: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path, {"input_ids": [1, 2]}, {"input_ids": [3, 400, 500]}, {"input_ids": [3, -4]})
    with pytest.raises(DataError) as error:
        encode(read_rows(path), tok, 10)
    assert str(error.value) == (
        f"{path}: 2 rows cannot be used; line 2: token id 400 lies outside the model's vocabulary of 400; use the ids "
        "of this model's tokenizer; line 3: token id -4 lies outside the model's vocabulary of 400; use the ids of "
        "this model's tokenizer"
    )


def test_a_tokenizer_larger_than_the_model_is_an_error(tok: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path, {"text": "a small day"})
    with pytest.raises(
        DataError, match=r"line 1: token id \d+ lies outside .* of 90; the tokenizer does not belong to"
    ):
        encode(read_rows(path), tok, 10, vocab_size=90)


def test_padding_stays_within_the_models_vocabulary(spaced_tok: Any, tok: Any) -> None:
    assert encode(texts(["ab"]), tok, 10).pad_id == tok.pad_token_id
    assert encode(texts(["ab"]), spaced_tok, 10).pad_id == spaced_tok.eos_token_id, "it has no padding token"
    ready = Rows(Path("ids"), "input_ids", [(np.zeros(2, dtype=np.int32), np.ones(2, dtype=bool))], np.array([1]))
    assert encode(ready, tok, 10, vocab_size=1).pad_id == 0


# --- chat ----------------------------------------------------------------------------------------------------------


def rendered(tok: Any, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> list[int]:
    text = tok.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    return tok(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", ["tok", "bos_tok"])
@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "the program"}]])
def test_loss_is_on_what_the_assistant_says(name: str, system: list, tmp_path: Path, request) -> None:
    tok = request.getfixturevalue(name)
    messages = system + CHAT
    ids, trained = one(write_rows(tmp_path, {"messages": messages, "id": 7}), tok)
    assert tok.decode(ids) == tok.apply_chat_template(messages, tokenize=False)
    assert tok.decode(trained) == "a small day<|im_end|>the old one\n<|im_end|>"
    first = rendered(tok, messages[: len(system) + 1], add_generation_prompt=True)
    assert ids[: len(first)] == first, "the first answer is generated from exactly these tokens"
    all_ids, all_trained = one(write_rows(tmp_path, {"messages": messages}), tok, train_on="all")
    assert (all_ids, all_trained) == (rendered(tok, messages), rendered(tok, messages)[1:])


def with_template(folder: Path, template: str | None) -> Any:
    return tokenizer(write_tokenizer(folder / "tok", 400, chat_template=template))


def test_a_conversation_without_answer_is_left_out(tok: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path, {"messages": CHAT}, {"messages": CHAT[:1]})
    assert encode(read_rows(path), tok, 200).dropped_lines.tolist() == [2]


def test_no_chat_template(tmp_path: Path) -> None:
    path = write_rows(tmp_path, {"messages": CHAT})
    with pytest.raises(DataError) as error:
        encode(read_rows(path), with_template(tmp_path, None), 200)
    assert str(error.value) == (
        f"{path} holds conversations, but the tokenizer has no chat template, as of a base model; set "
        'data.chat_template to chatml or alpaca or a Jinja file, or write the rows as {"prompt", "completion"}'
    )


def test_a_template_that_rewrites_what_was_said_is_refused_by_line(tmp_path: Path) -> None:
    """As Qwen 3's does with the thoughts in all answers but the last."""
    said = "(message['content'] if loop.last or message['role'] == 'user' else '...')"
    tok = with_template(tmp_path, CHAT_TEMPLATE.replace("+ message['content'] +", f"+ {said} +"))
    path = write_rows(tmp_path, {"messages": CHAT[:1]}, {"messages": CHAT})
    with pytest.raises(DataError) as error:
        encode(read_rows(path), tok, 200)
    assert str(error.value) == (
        f"{path}, line 2: message 2: the chat template writes the conversation up to there differently when more "
        "follows, so what the assistant said cannot be told apart; end the conversation with its first answer, or set "
        "data.train_on=last"
    )
    assert len(encode(read_rows(path), tok, 200, train_on="all")) == 2
    assert (
        tok.decode(one(write_rows(tmp_path, {"messages": CHAT}), tok, train_on="last")[1]) == "the old one\n<|im_end|>"
    )


def test_a_conversation_that_begins_with_the_assistant_is_refused(tok: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path, {"messages": CHAT}, {"messages": CHAT[1:]})
    with pytest.raises(DataError) as error:
        encode(read_rows(path), tok, 200)
    assert str(error.value) == (
        f"{path}, line 2: message 1 is the assistant's; put a user message before it, or set data.train_on=all"
    )


def test_what_the_template_refuses_is_refused_by_line(tmp_path: Path) -> None:
    strict = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT_TEMPLATE
    )
    path = write_rows(tmp_path, {"messages": CHAT}, {"messages": [{"role": "system", "content": "s"}, *CHAT]})
    with pytest.raises(DataError) as error:
        encode(read_rows(path), with_template(tmp_path, strict), 200)
    assert str(error.value) == (
        f"{path}, line 2: the chat template refuses the messages (no system role); a plain chat is user and assistant "
        "in turn, with an optional system message first"
    )


# --- cutting and counting ------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=30),
    seq_len=st.integers(2, 40),
)
def test_cut_and_left_out_rows_are_counted(tok: Any, rows: list[tuple[int, int]], seq_len: int) -> None:
    """Prompts and completions of single characters: lengths are known without the tokenizer."""
    values = [("~" * prompt, "~" * completion) for prompt, completion in rows]
    made = Rows(Path("rows.jsonl"), "prompt", values, np.arange(1, len(rows) + 1))
    kept = [line for line, (prompt, _) in enumerate(rows, start=1) if prompt < seq_len]
    if not kept:
        with pytest.raises(DataError, match=f"no row has a trained token within data.seq_len = {seq_len}"):
            encode(made, tok, seq_len)
        return
    documents = encode(made, tok, seq_len)
    lengths = [prompt + completion + 1 for prompt, completion in rows]
    assert documents.lines.tolist() == kept
    assert documents.lengths.tolist() == [min(lengths[line - 1], seq_len) for line in kept]
    assert documents.n_targets.tolist() == [min(lengths[line - 1], seq_len) - rows[line - 1][0] for line in kept]
    assert documents.truncated_lines.tolist() == [line for line, n in enumerate(lengths, start=1) if n > seq_len]
    assert documents.stats() == {
        "rows": len(rows),
        "documents": len(kept),
        "tokens": sum(documents.lengths),
        "target_tokens": sum(documents.n_targets),
        "truncated_rows": sum(n > seq_len for n in lengths),
        "dropped_rows": len(rows) - len(kept),
        "longest_row": max(lengths),
    }


def test_the_notes_name_lines(tok: Any) -> None:
    values = [("~~", "~"), *[("~~", "~~~~~~~~")] * 6, ("~~~~~~~~~", "~")]
    documents = encode(Rows(Path("rows.jsonl"), "prompt", values, np.arange(1, 9)), tok, 8)
    assert documents.notes() == [
        "7 of 8 rows of rows.jsonl are longer than data.seq_len = 8 (the longest has 11 tokens) and were cut: "
        "lines 2, 3, 4, 5, 6 and 2 more",
        "1 of 8 rows of rows.jsonl have no trained token within data.seq_len = 8 and were left out: line 8",
    ]
    assert encode(Rows(Path("rows.jsonl"), "prompt", values[:1], np.array([1])), tok, 8).notes() == []


def test_data_without_any_target_is_an_error(tok: Any) -> None:
    with pytest.raises(DataError) as error:
        encode(Rows(Path("rows.jsonl"), "prompt", [("~" * 9, "~")] * 2, np.array([1, 2])), tok, 8)
    assert str(error.value) == (
        "rows.jsonl: no row has a trained token within data.seq_len = 8 (lines 1, 2); raise data.seq_len, or set "
        "data.train_on=all"
    )


def test_parts_of_a_large_file_join(tok: Any) -> None:
    """Rows are tokenised a thousand at a time; 2,500 different ones show a part lost or out of order."""
    documents = encode(texts([str(number) for number in range(2500)]), tok, 20)
    decoded = [
        tok.decode(documents.ids[documents.offsets[i] : documents.offsets[i + 1]], skip_special_tokens=True)
        for i in range(len(documents))
    ]
    assert decoded == [str(number) for number in range(2500)]


def test_tokens_are_kept_small(tok: Any) -> None:
    documents = encode(texts(["a small day"]), tok, 20)
    assert (documents.ids.dtype, documents.trained.dtype, documents.offsets.dtype) == (np.int32, np.bool_, np.int64)


def test_progress_is_told_by_the_thousand(tok: Any) -> None:
    told: list[tuple[int, int]] = []
    encode(texts(["a"] * 2001), tok, 20, progress=lambda done, total: told.append((done, total)))
    assert told == [(1000, 2001), (2000, 2001), (2001, 2001)]


# --- tokenizers ----------------------------------------------------------------------------------------------------


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError) as error:
        tokenizer(tmp_path)
    assert str(error.value) == (
        f"{tmp_path} has no tokenizer (tokenizer.json, tokenizer.model, vocab.json); "
        "copy it from where the model came from"
    )


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, 72)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"the tokenizer cannot be loaded \(.*\); copy the tokenizer files anew"):
        tokenizer(tmp_path)


def test_a_tokenizer_without_eos(tmp_path: Path, spaced_tok: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    endless = PreTrainedTokenizerFast(tokenizer_object=spaced_tok.backend_tokenizer, bos_token="<s>")
    with pytest.raises(ModelError) as error:
        encode(texts(["ab"]), endless, 20)
    assert str(error.value) == (
        "the tokenizer has no eos_token, so a completion could not end; add it to tokenizer_config.json"
    )


# --- the real tokenizer --------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def real_tok() -> Any:
    if not REAL_MODEL.is_dir():
        pytest.skip(
            f"{REAL_MODEL.name} is not there (scripts/get_data.py makes it): SmolLM2's own tokenizer not tested"
        )
    return tokenizer(REAL_MODEL)


def test_real_rows_with_the_real_tokenizer(real_tok: Any) -> None:
    rows = read_rows(SAMPLE)
    documents = encode(rows, real_tok, 1024)
    assert len(documents) == len(rows) == 150
    for number, (prompt, completion) in enumerate(rows.values):
        part = slice(documents.offsets[number], documents.offsets[number + 1])
        ids, trained = documents.ids[part].tolist(), documents.trained[part]
        in_generation = real_tok(prompt)["input_ids"]
        assert ids[: len(in_generation)] == in_generation
        assert real_tok.decode(np.array(ids)[trained]) == completion + "<|im_end|>"
        assert real_tok.decode(ids) == prompt + completion + "<|im_end|>"


def test_chat_with_the_real_template(real_tok: Any, tmp_path: Path) -> None:
    ids, trained = one(write_rows(tmp_path, {"messages": CHAT}), real_tok)
    assert ids == real_tok.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert real_tok.decode(trained) == "a small day<|im_end|>the old one\n<|im_end|>"
    first = real_tok.apply_chat_template(CHAT[:1], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert ids[: len(first)] == first
