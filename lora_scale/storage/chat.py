"""What a tokenizer's chat template writes for a conversation, and which part of it the assistant said.

Knows text only; refuses to know token ids.
"""

from typing import Any

from lora_scale.storage.problems import BadRowError


def spans(tokenizer: Any, messages: list[dict[str, str]], train_on_all: bool) -> list[tuple[str, bool]]:
    """(text, with loss or without), end to end the whole conversation as the template writes it.

    With loss: what generation would write, that is each assistant message with its end-of-turn token. It begins where
    the conversation before it ends, rendered with the template's generation prompt.
    """
    whole = _render(tokenizer, messages)
    if train_on_all:
        return [(whole, True)]
    eos = tokenizer.eos_token
    parts, done = [], 0
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if number == 0:
            raise BadRowError("message 1 is the assistant's; put a user message before it, or set data.train_on=all")
        before = _render(tokenizer, messages[:number], add_generation_prompt=True)
        through = _render(tokenizer, messages[: number + 1])
        if not (through.startswith(before) and whole.startswith(through)):
            raise BadRowError(
                f"message {number + 1}: the chat template writes the conversation up to there differently when more "
                "follows, so what the assistant said cannot be told apart; end the conversation with its "
                "first answer, or set data.train_on=all"
            )
        end = len(through)
        if eos and through.rstrip().endswith(eos):
            end = len(through.rstrip())  # the line end that follows is the template's, never generated
        parts += [(whole[done : len(before)], False), (whole[len(before) : end], True)]
        done = end
    return [*parts, (whole[done:], False)]


def _render(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool = False) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:
        raise BadRowError(
            f"the chat template refuses the messages ({error}); a plain chat is user and assistant in turn, "
            "with an optional system message first"
        ) from None
