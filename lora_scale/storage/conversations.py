"""From a row to a conversation: messages as they are, ShareGPT's and Alpaca's, brought into one form and checked.

Knows what messages look like in data sets; refuses to know templates and tokens.
"""

import json
from typing import Any

from lora_scale.storage.chat import Conversation
from lora_scale.storage.problems import BadRowError
from lora_scale.storage.sources import kind

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}
_KEPT = ("name", "tool_call_id")  # strings that a template may write beside role and content
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # one thing, by the names that servers give it


def of_messages(row: dict[str, Any]) -> Conversation:
    """{"messages": [{"role", "content"}]}, with tool calls and thoughts as OpenAI's interface writes them."""
    messages = _list(row, "messages", '{"role", "content"}')
    return Conversation([_message(message, number) for number, message in enumerate(messages, start=1)], _tools(row))


def of_sharegpt(row: dict[str, Any]) -> Conversation:
    """{"conversations": [{"from", "value"}]}; also lists of {"role", "content"} under that name."""
    turns = _list(row, "conversations", '{"from", "value"}')
    if isinstance(turns[0], dict) and "role" in turns[0]:
        return of_messages({**row, "messages": turns})
    messages = _system(row)
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            raise BadRowError(f'turn {number} is no object with "from" and "value"')
        where = f" of turn {number}"
        speaker, value = text_of(turn, "from", where), text_of(turn, "value", where)
        if speaker not in SHAREGPT_ROLES:
            raise BadRowError(f'"from"{where} is {json.dumps(speaker)}; it must be {", ".join(SHAREGPT_ROLES)}')
        if speaker == "function_call":
            messages.append({"role": "assistant", "content": "", "tool_calls": _calls(_parsed(value, where), number)})
        else:
            messages.append({"role": SHAREGPT_ROLES[speaker], "content": value})
    return Conversation(messages, _tools(row))


def of_alpaca(row: dict[str, Any]) -> Conversation:
    """{"instruction", "input", "output"}, with "system" and "history" where a row has them: one exchange."""
    messages = _system(row)
    for number, pair in enumerate(row.get("history") or [], start=1):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise BadRowError(f'"history"[{number - 1}] is no pair of question and answer')
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    more = text_of(row, "input") if row.get("input") is not None else ""
    asked = text_of(row, "instruction")
    messages.append({"role": "user", "content": f"{asked}\n\n{more}" if more else asked})
    messages.append({"role": "assistant", "content": text_of(row, "output")})
    return Conversation(messages, None)


def text_of(row: dict[str, Any], key: str, where: str = "") -> str:
    """The string under a key, or what else stands there."""
    value = row[key]
    if not isinstance(value, str):
        hint = '; write a conversation as {"messages"}' if isinstance(value, list) and not where else ""
        raise BadRowError(f'"{key}"{where} is {kind(value)}; it must be a string{hint}')
    _check_unicode(value, f'"{key}"{where}')
    return value


def _check_unicode(value: str, what: str) -> None:
    try:
        value.encode()
    except (
        UnicodeEncodeError
    ) as error:  # "\ud800" is valid JSON but no text; tokenizers fail on it without a line number
        raise BadRowError(
            f"{what} holds half a surrogate pair (character {error.start}); replace it by U+FFFD"
        ) from None


def _list(row: dict[str, Any], key: str, of: str) -> list[Any]:
    value = row[key]
    if not isinstance(value, list) or not value:
        what = "an empty list" if isinstance(value, list) else kind(value)
        raise BadRowError(f'"{key}" is {what}; it must be a list of {of}')
    return value


def _system(row: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": text_of(row, "system")}] if row.get("system") else []


def _message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise BadRowError(f'message {number} is {kind(message)}; it must be an object with "role" and "content"')
    calls = message.get("tool_calls")
    for key in ("role", "content"):
        if key not in message and not (key == "content" and calls):
            hint = '; rename "messages" to "conversations"' if "from" in message else ""
            raise BadRowError(f'message {number} has no "{key}"; it needs "role" and "content"{hint}')
    where = f" of message {number}"
    empty = calls and message.get("content") is None
    made = {"role": text_of(message, "role", where), "content": "" if empty else text_of(message, "content", where)}
    made |= {key: text_of(message, key, where) for key in _KEPT if message.get(key) is not None}
    thoughts = [text_of(message, key, where) for key in _THOUGHTS if message.get(key) is not None]
    if thoughts:
        made["reasoning_content"] = thoughts[0]
    return made | {"tool_calls": _calls(calls, number)} if calls else made


def _calls(calls: Any, number: int) -> list[dict[str, Any]]:
    """Calls as {"type", "id", "function": {"name", "arguments": object}}: templates turn arguments into JSON."""
    made = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRowError(f'a tool call of message {number} has no "function" with a "name"')
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parsed(arguments, f" (arguments of a tool call of message {number})")
        if not isinstance(arguments, dict):
            raise BadRowError(
                f"the arguments of a tool call of message {number} are {kind(arguments)}; write an object"
            )
        made.append(
            {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
            | ({"id": call["id"]} if isinstance(call.get("id"), str) else {})
        )
    _check_unicode(json.dumps(made, ensure_ascii=False, default=str), f"a tool call of message {number}")
    return made


def _tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The row's tools: a list of JSON Schemas, or a string that holds one."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _parsed(tools, ' ("tools")') if tools.strip() else None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRowError(f'"tools" is {kind(tools)}; it must be a list of objects (JSON Schema), or a string of one')
    _check_unicode(json.dumps(tools, ensure_ascii=False, default=str), '"tools"')
    return tools


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise BadRowError(f"{where.strip()} is not JSON: {text[:40]!r}") from None
