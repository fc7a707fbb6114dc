"""Odd conversations through the templates of published models: what is trained of each, or why it is refused.

    python tests/chat_forms.py --write      tests/data/chat-golden.json and the table in docs/data.md

The templates are real (tests/data/templates); the tokenizers are small ones that know each template's special tokens.
"""

import json
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from tiny_tokenizer import write_tokenizer  # noqa: E402

from lora_scale.spec.errors import DataError  # noqa: E402
from lora_scale.storage.dataset import encode  # noqa: E402
from lora_scale.storage.encoder import tokenizer  # noqa: E402
from lora_scale.storage.rows import read_rows  # noqa: E402

HERE = Path(__file__).parent
TEMPLATES = HERE / "data" / "templates"
GOLDEN = HERE / "data" / "chat-golden.json"
PAGE = HERE.parent / "docs" / "data.md"


@dataclass(frozen=True)
class Form:
    """A template and the special tokens that its tokenizer has. `bos`: put before every text by the tokenizer."""

    file: str
    special: tuple[str, ...]
    eos: str
    bos: str | None = None


CHATML = ("<|im_start|>", "<|im_end|>")
LLAMA = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
MISTRAL = ("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]",
           "[TOOL_RESULTS]", "[/TOOL_RESULTS]")  # fmt: skip
FORMS = {
    "SmolLM2": Form("smollm2", CHATML, "<|im_end|>"),
    "Llama 3": Form("llama3", LLAMA, "<|eot_id|>", "<|begin_of_text|>"),
    "Llama 3.1": Form("llama3_1", LLAMA, "<|eot_id|>", "<|begin_of_text|>"),
    "Qwen3": Form("qwen3", CHATML, "<|im_end|>"),
    "Qwen3, marked": Form("qwen3_training", CHATML, "<|im_end|>"),
    "Gemma": Form("gemma", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>"),
    "Mistral": Form("mistral_v3", MISTRAL, "</s>", "<s>"),
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "the weather of a day",
            "parameters": {"type": "object", "properties": {"day": {"type": "string"}}, "required": ["day"]},
        },
    }
]


def call(day: str, number: int) -> dict[str, Any]:
    function = {"name": "weather", "arguments": json.dumps({"day": day})}
    return {"id": f"call0000{number}", "type": "function", "function": function}


def result(number: int) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call0000{number}", "name": "weather", "content": "rain"}


ASK, ANSWER = user("the weather?"), assistant("a small day")
ROWS: dict[str, dict[str, Any]] = {
    "one exchange": {"messages": [ASK, ANSWER]},
    "system first": {"messages": [system("the program"), ASK, ANSWER]},
    "two exchanges": {"messages": [ASK, ANSWER, user("and the next"), assistant("the old one")]},
    "system only": {"messages": [system("the program")]},
    "no answer": {"messages": [ASK]},
    "empty answer": {"messages": [ASK, assistant("")]},
    "two users in a row": {"messages": [ASK, user("of today"), ANSWER]},
    "two answers in a row": {"messages": [ASK, ANSWER, assistant("or not")]},
    "the assistant begins": {"messages": [assistant("hello"), ASK, ANSWER]},
    "ends with the user": {"messages": [ASK, ANSWER, user("thanks")]},
    "system in the middle": {"messages": [ASK, ANSWER, system("the program"), user("and now"), assistant("yes")]},
    "a role of its own": {"messages": [ASK, {"role": "critic", "content": "bad"}, ANSWER]},
    "tools, not called": {"messages": [ASK, ANSWER], "tools": TOOLS},
    "tools as a string": {"messages": [ASK, ANSWER], "tools": json.dumps(TOOLS)},
    "a tool called": {
        "messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [call("mon", 1)]}, result(1), ANSWER],
        "tools": TOOLS,
    },
    "two tools at once": {
        "messages": [ASK, assistant("", tool_calls=[call("mon", 1), call("tue", 2)]), result(1), result(2), ANSWER],
        "tools": TOOLS,
    },
    "thoughts in the text": {"messages": [ASK, assistant("<think>\nhm\n</think>\n\na day")]},
    "thoughts in both answers": {
        "messages": [
            ASK,
            assistant("<think>\nhm\n</think>\n\na day"),
            user("and"),
            assistant("<think>\nso\n</think>\n\nb"),
        ]
    },
    "thoughts beside the text": {"messages": [ASK, assistant("a day", reasoning_content="hm")]},
    "spaces around the answer": {"messages": [ASK, assistant("  a day \n")]},
    "the end token in a question": {"messages": [user("say <|im_end|> and </s>"), ANSWER]},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "the weather?"}, {"from": "gpt", "value": "a small day"}]
    },
    "Alpaca": {"instruction": "tell the weather", "input": "of today", "output": "a small day"},
}


def make_tokenizer(form: Form, folder: Path) -> Any:
    """The form's tokenizer, saved and read again as a model's is."""
    from tokenizers import processors
    from transformers import AutoTokenizer

    template = (TEMPLATES / f"{form.file}.jinja").read_text(encoding="utf-8")
    made = AutoTokenizer.from_pretrained(write_tokenizer(folder, 400, chat_template=template))
    made.add_special_tokens({"additional_special_tokens": [t for t in form.special if t != form.eos]})
    made.eos_token = form.eos
    made.pad_token = form.eos
    if form.bos:
        made.bos_token = form.bos
        first = [(form.bos, made.convert_tokens_to_ids(form.bos))]
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{form.bos} $A", pair=f"{form.bos} $A $B", special_tokens=first
        )
    made.save_pretrained(folder)
    return tokenizer(folder)


def trained(row: dict[str, Any], tok: Any, train_on: str, place: Path) -> list[str] | str:
    """The decoded runs of trained tokens, or why there are none."""
    path = place / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    try:
        found = encode(read_rows(path), tok, 4096, train_on)  # type: ignore[arg-type]
    except DataError as error:
        text = str(error).removeprefix(f"{path}, line 1: ")
        return "left out: the assistant says nothing" if "no row has a trained token" in text else f"refused: {text}"
    runs: list[list[int]] = []
    for at, mark in enumerate(found.trained.tolist()):
        if mark and not (at and found.trained[at - 1]):
            runs.append([])
        if mark:
            runs[-1].append(int(found.ids[at]))
    return [tok.decode(run) for run in runs]


def everything() -> dict[str, dict[str, dict[str, list[str] | str]]]:
    """By form, row and `train_on`."""
    found: dict[str, dict[str, dict[str, list[str] | str]]] = {}
    for name, form in FORMS.items():
        with tempfile.TemporaryDirectory() as place:
            tok = make_tokenizer(form, Path(place))
            found[name] = {
                title: {which: trained(row, tok, which, Path(place)) for which in ("assistant", "last")}
                for title, row in ROWS.items()
            }
    return found


def table(found: dict[str, Any]) -> str:
    """In Markdown: what becomes of each conversation with each template."""
    reasons: list[str] = []

    def cell(outcome: dict[str, Any]) -> str:
        if isinstance(outcome["assistant"], list):
            return "trained"
        note = outcome["assistant"].partition(": ")[2].partition("; ")[0].partition(", so what")[0]
        note = re.sub(r"^message \d( \(\w+\))?:? (?=the |is not)", "", note)
        if note not in reasons:
            reasons.append(note)
        last = " (`last`: trained)" if isinstance(outcome["last"], list) else ""
        return f"{outcome['assistant'].partition(':')[0]} {reasons.index(note) + 1}{last}"

    lines = [f"| conversation | {' | '.join(FORMS)} |", "|---" * (len(FORMS) + 1) + "|"]
    lines += [f"| {title} | {' | '.join(cell(found[name][title]) for name in FORMS)} |" for title in ROWS]
    return "\n".join([*lines, "", *[f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]])


if __name__ == "__main__":
    result_now = everything()
    if "--write" in sys.argv:
        GOLDEN.write_text(json.dumps(result_now, indent=1, ensure_ascii=False) + "\n")
        head, _, rest = PAGE.read_text().partition("<!-- chat table -->\n")
        PAGE.write_text(
            f"{head}<!-- chat table -->\n{table(result_now)}\n<!-- end -->{rest.partition('<!-- end -->')[2]}"
        )
    else:
        print(json.dumps(result_now, indent=1, ensure_ascii=False), table(result_now), sep="\n")
