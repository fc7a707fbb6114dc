"""What a tokenizer's chat template writes for a conversation, and which part of it the assistant said.

Knows text only; refuses to know token ids. The parts come from the template's own `{% generation %}` marks; where it
has none, from rendering the conversation up to each answer. Where such a beginning is not what the whole begins with,
as in templates that drop earlier thoughts, the row is refused: never a guess.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lora_scale.spec.errors import ConfigError
from lora_scale.storage.problems import BadRowError

TrainOn = Literal["completion", "last", "assistant", "all"]
MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")

TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    # The wording is Stanford's (https://github.com/tatsu-lab/stanford_alpaca); an input stands below its instruction.
    "alpaca": (
        "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] + '\\n\\n' }}{% else %}"
        "{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\\n\\n' }}{% endif %}{% for message in messages %}"
        "{% if message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
        "{% elif message['role'] != 'system' or not loop.first %}"
        "{{ raise_exception('alpaca has no role ' + message['role'] + ' here') }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
}
"""What `data.chat_template` can name; written for models that have none."""

# What a row can hold beside text, and how a template that writes it calls it: nothing is dropped in silence.
_BESIDES = {
    "tool_calls": ("tool_calls",),
    "reasoning_content": ("reasoning_content", "reasoning", "thinking"),
}


class Conversation(NamedTuple):
    """Messages, and the tools that the assistant may call (as JSON Schema), or None."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def template_of(name: str) -> str:
    """The text of `data.chat_template`: one of TEMPLATES, or a file."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(
            f"data.chat_template is {name}; it must be {', '.join(TEMPLATES)} or a Jinja file ({why})"
        ) from None


def spans(tokenizer: Any, conversation: Conversation, train_on: TrainOn, ends: Sequence[str]) -> list[tuple[str, bool]]:
    """(text, with loss or without), end to end the whole conversation as the template writes it.

    With loss: what generation would write, that is an assistant's message with its end-of-turn token, one of `ends`.
    """
    template = _template(tokenizer, conversation)
    whole = render(tokenizer, conversation)
    _check_nothing_is_dropped(conversation, whole)
    if train_on == "all":
        return [(whole, True)]
    answers = [n for n, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    if train_on == "last":
        answers = answers[-1:]
    marked = MARKED.search(template) is not None
    found = (_by_marks if marked else _by_prefixes)(tokenizer, conversation, whole, answers, template)
    parts, done = [], 0
    for number, start, stop in found:
        end = _end_of_turn(whole, start, stop, ends)
        if end is None:
            raise BadRowError(
                f"message {number + 1}: the chat template ends it with {whole[start:stop][-20:]!r}, which is no "
                "end-of-turn token of this tokenizer, so the model would not learn to stop; name another "
                "data.chat_template"
            )
        parts += [(whole[done:start], False), (whole[start:end], True)]
        done = end
    return [*parts, (whole[done:], False)]


def _check_nothing_is_dropped(conversation: Conversation, whole: str) -> None:
    """Templates pass over roles that they do not know, or a system message where there are tools, without a word."""
    for number, message in enumerate(conversation.messages, start=1):
        text = message["content"].strip()
        as_json = json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]  # Llama 3.1's tool results
        if message["role"] != "assistant" and not any(form in whole for form in (text, *as_json)):
            raise BadRowError(
                f"message {number} ({message['role']}) is not in what the chat template writes; name another "
                "data.chat_template, or leave the message out"
            )


def _by_prefixes(
    tokenizer: Any, conversation: Conversation, whole: str, answers: Sequence[int], _template: str
) -> list[tuple[int, int, int]]:
    """(message, start, stop): an answer begins where the conversation before it ends, with the generation prompt."""
    found = []
    for number in answers:
        if number == 0:
            raise BadRowError("message 1 is the assistant's; put a user message before it, or set data.train_on=all")
        messages, tools = conversation
        before = render(tokenizer, Conversation(messages[:number], tools), add_generation_prompt=True)
        through = render(tokenizer, Conversation(messages[: number + 1], tools))
        if not through.startswith(before):
            raise BadRowError(
                f"message {number + 1}: the chat template writes what comes before it differently once it follows, so "
                "what the assistant said cannot be told apart; name another data.chat_template, or set "
                "data.train_on=all"
            )
        if not whole.startswith(through):
            way_out = "data.train_on=last" if number != answers[-1] else "data.train_on=all"
            raise BadRowError(
                f"message {number + 1}: the chat template writes the conversation up to there differently when more "
                "follows, so what the assistant said cannot be told apart; end the conversation with its first "
                f"answer, or set {way_out}"
            )
        found.append((number, len(before), len(through)))
    return found


def _by_marks(
    tokenizer: Any, conversation: Conversation, whole: str, answers: Sequence[int], template: str
) -> list[tuple[int, int, int]]:
    """(message, start, stop) from the template's `{% generation %}` marks, one pair for each assistant message."""
    from transformers.utils.chat_template_utils import render_jinja_template

    (text,), (marks,) = render_jinja_template(
        conversations=[conversation.messages],
        tools=conversation.tools,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
    )
    everyone = [n for n, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    if text != whole or len(marks) != len(everyone):
        raise BadRowError(
            f"the chat template marks {len(marks)} parts as generated and the assistant has {len(everyone)} messages, "
            "so what it said cannot be told apart; set data.train_on=all, or name another data.chat_template"
        )
    places = dict(zip(everyone, marks, strict=True))
    return [(number, *places[number]) for number in answers]


def _end_of_turn(whole: str, start: int, stop: int, ends: Sequence[str]) -> int | None:
    """Where the answer ends with its end-of-turn token: what follows that one is the template's, never generated."""
    said = whole[start:stop].rstrip()
    if any(said.endswith(end) for end in ends):
        return start + len(said)
    # marks that stand around the text alone
    return next((stop + len(end) for end in ends if whole.startswith(end, stop)), None)


def _template(tokenizer: Any, conversation: Conversation) -> str:
    """The template in use, once it is known to write everything that the conversation holds."""
    messages, tools = conversation
    text: str = tokenizer.get_chat_template(tools=tools)
    if tools and "tools" not in text:
        raise BadRowError('has "tools", which the chat template does not write; name another data.chat_template')
    for key, names in _BESIDES.items():
        number = next((n for n, message in enumerate(messages, start=1) if message.get(key)), None)
        if number and not any(name in text for name in names):
            raise BadRowError(
                f'message {number} has "{key}", which the chat template does not write; name another '
                "data.chat_template, or write it into the content"
            )
    return text


def render(tokenizer: Any, conversation: Conversation, add_generation_prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(
            conversation.messages,
            tools=conversation.tools,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except Exception as error:  # a template is a foreign program: what it trips over has a dozen types
        raise BadRowError(
            f"the chat template refuses the messages ({error}); a plain chat is user and assistant in turn, "
            "with an optional system message first"
        ) from None
