"""Conversations: messages with roles, those of ShareGPT, tool calls and tools, all checked."""

from __future__ import annotations

import difflib
from typing import Any

from depthmix.data.fields import Row, common_length, kind, messages_of, text
from depthmix.data.json_files import parse_json
from depthmix.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")

# Whose words they are in ShareGPT's files.
_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
    "function_call": "assistant",
}


def chat(row: Row, field: str, parts: dict[str, bool]) -> Row:
    """Return the columns messages, tools and chat_template_kwargs of a row.

    Args:
        row: the row.
        field: the column with the messages.
        parts: role -> whether its content comes as parts; see `content_kinds`.

    Raises:
        DataError: a message is broken, or no answer is there to learn.
    """
    messages = _answered(_messages(row, field, parts), field)
    return {"messages": messages, **_extras(row)}


def chat_completion(row: Row, prompt: str, completion: str, parts: dict[str, bool]) -> Row:
    """Return the columns of a row whose prompt and completion are messages.

    Raises:
        DataError: as `chat`.
    """
    return {
        "prompt": _messages(row, prompt, parts),
        "completion": _answered(_messages(row, completion, parts), completion),
        **_extras(row),
    }


def open_chat(row: Row, field: str, parts: dict[str, bool]) -> list[Row]:
    """Return the messages of a row up to its last answer, which is for the model to give.

    Raises:
        DataError: a message is broken, or nothing is asked; tools and variables of a template,
            which TRL does not render in prompts to answer.
    """
    for name, value in _extras(row).items():
        if value is not None:
            raise DataError(
                f"field {name}: prompts to answer are rendered without it: leave it out"
            )
    messages = _messages(row, field, parts)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise DataError(f"field {field} holds no question: there is nothing to answer")
    return messages


def chat_preference(row: Row, prompt: str, parts: dict[str, bool]) -> Row:
    """Return the columns of a row whose chosen and rejected answers are messages.

    The prompt is a column of its own, of messages or a text, or what the two begin with in common.

    Raises:
        DataError: as `chat`, or the two answers are one.
    """
    pair = {name: _messages(row, name, parts) for name in ("chosen", "rejected")}
    if pair["chosen"] == pair["rejected"]:
        raise DataError("fields chosen and rejected are the same")
    asked = row.get(prompt)
    if isinstance(asked, list):
        before = _messages(row, prompt, parts)
    else:
        before = pair["chosen"][: common_length(pair["chosen"], pair["rejected"])]
        if not before and asked is not None:
            before = [{"role": "user", "content": text(row, prompt)}]
    if not before:
        raise DataError(
            f"there is no field {prompt}, and chosen and rejected have no beginning in common"
        )
    for name, messages in pair.items():
        rest = messages[len(before) :] if messages[: len(before)] == before else messages
        pair[name] = _answered(rest, name)
    return {"prompt": before, **pair, **_extras(row)}


def sharegpt(row: Row) -> Row:
    """Return the columns of a row of ShareGPT: from and value, a column system, a column tools.

    Raises:
        DataError: as `chat`, or a speaker is unknown.
    """
    turns = messages_of(row, "conversations")
    messages = [_from_sharegpt(turn, number) for number, turn in enumerate(turns, 1)]
    if row.get("system"):
        messages.insert(0, {"role": "system", "content": text(row, "system")})
    return {"messages": _answered(messages, "conversations"), **_extras(row)}


def content_kinds(row: Row, fields: tuple[str, ...]) -> dict[str, bool]:
    """Return {role: whether content comes as parts} of a row, which the others are to agree with.

    A file in which one content is a text and the next a list was put together of two.
    """
    kinds: dict[str, bool] = {}
    for field in fields:
        for message in row[field] if isinstance(row.get(field), list) else []:
            if isinstance(message, dict) and isinstance(message.get("content"), str | list):
                kinds.setdefault(str(message.get("role")), isinstance(message["content"], list))
    return kinds


def _messages(row: Row, field: str, parts: dict[str, bool]) -> list[Row]:
    if isinstance(row.get(field), str):  # JSON in a cell of a table
        row = {**row, field: parse_json(row[field])}
    checked = []
    for number, message in enumerate(messages_of(row, field), 1):
        try:
            checked.append(_message(message, parts))
        except DataError as problem:
            raise DataError(f"field {field}: message {number}: {problem}") from None
    return checked


def _message(message: Any, parts: dict[str, bool]) -> Row:
    if not isinstance(message, dict):
        raise DataError(f"must be an object, not {kind(message)}")
    role = text(message, "role")
    _require_role(role)
    calls, content = message.get("tool_calls"), message.get("content")
    if calls is not None and not isinstance(calls, list):
        raise DataError(f"field tool_calls must be a list, not {kind(calls)}")
    if isinstance(content, str | list):
        in_parts = isinstance(content, list)
        if in_parts != parts.get(role, in_parts):
            raise DataError(
                f"field content must be {'a text' if in_parts else 'a list of parts'} as in the "
                f"first row, not {kind(content)}"
            )
        content = _joined(content) if isinstance(content, list) else content
    if not (calls and content is None):
        text({"content": content}, "content", may_be_empty=role != "assistant" or bool(calls))
    return {**message, "content": content} if "content" in message else {**message}


def _joined(parts: list[Any]) -> str:
    """Return the text of content as parts; a template for texts would print them as a list."""
    found = []
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            named = part.get("type") if isinstance(part, dict) else kind(part)
            raise DataError(f"field content: a part must be of type text, not {named}")
        found.append(text(part, "text", may_be_empty=True))
    return "".join(found)


def _require_role(role: str) -> None:
    if role not in ROLES:
        near = difflib.get_close_matches(role, ROLES, n=1)
        hint = f"; did you mean {near[0]}?" if near else f": expected {', '.join(ROLES)}"
        raise DataError(f"field role: {role!r} is no role{hint}")


def _from_sharegpt(turn: Any, number: int) -> Row:
    try:
        if not isinstance(turn, dict):
            raise DataError(f"must be an object, not {kind(turn)}")
        speaker = text(turn, "from")
        if speaker not in _SHAREGPT:
            known = ", ".join(_SHAREGPT)
            raise DataError(f"field from: {speaker!r} is no speaker: expected {known}")
        role = _SHAREGPT[speaker]
        if speaker == "function_call":
            return {"role": role, "content": "", "tool_calls": _calls(text(turn, "value"))}
        return {"role": role, "content": text(turn, "value", may_be_empty=role != "assistant")}
    except DataError as problem:
        raise DataError(f"field conversations: message {number}: {problem}") from None


def _calls(value: str) -> list[Row]:
    """Return tool calls of ShareGPT, which are JSON: one, or a list of them."""
    calls = parse_json(value)
    return [
        {"type": "function", "function": call}
        for call in (calls if isinstance(calls, list) else [calls])
    ]


def _answered(messages: list[Row], field: str) -> list[Row]:
    """Require something to learn from: an assistant's message."""
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"field {field} holds no answer of the assistant")
    return messages


def _extras(row: Row) -> Row:
    """Return what a template takes beside the messages; TRL's columns."""
    tools, options = row.get("tools"), row.get("chat_template_kwargs")
    if isinstance(tools, str) and tools.strip():
        tools = parse_json(tools)
    if tools is not None and tools != "" and not isinstance(tools, list):
        raise DataError(f"field tools must be a list, not {kind(tools)}")
    if options is not None and not isinstance(options, dict):
        raise DataError(f"field chat_template_kwargs must be an object, not {kind(options)}")
    return {"tools": tools or None, "chat_template_kwargs": options or None}
