"""Formats: the columns that tell one, and how a row of it is read."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from depthmix.data.template import TEMPLATES, Template
from depthmix.errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """A row that a template can render.

    Attributes:
        instruction: what is asked.
        context: further input, or nothing.
        solution: the text to learn, or None where a test file has none.
        answer: what a reply is compared with.
    """

    instruction: str
    context: str
    solution: str | None
    answer: str


@dataclass(frozen=True)
class Format:
    """A kind of rows.

    Attributes:
        columns: what a row of this kind has; the first format that fits is taken.
        template: name of the template that its questions get by default; None for rows that are
            prompts already.
        read: what makes a question of a row; None where there is no question.
        convert: what makes TRL's columns of a row that needs no template.
    """

    columns: tuple[str, ...]
    template: str | None = None
    read: Callable[[Row], Question] | None = None
    convert: Callable[[Row], Row] | None = None

    def training_row(self, row: Row, template: str | None) -> Row:
        """Return TRL's columns, every field checked.

        Raises:
            DataError: a field is missing or empty; says which.
        """
        if self.convert is not None:
            return self.convert(row)
        assert self.read is not None
        question, form = self.read(row), self.template_named(template)
        if question.solution is None:
            raise DataError(f"field {self.columns[1]} is empty: there is nothing to learn")
        prompt = form.prompt(question.instruction, question.context)
        return {"prompt": prompt, "completion": form.completion(question.solution)}

    def template_named(self, name: str | None) -> Template:
        """Return the template of that name, or this format's own."""
        return TEMPLATES[name or self.template or "question"]


# What turns a row into a question


def _alpaca(row: Row) -> Question:
    solution = row.get("output")
    if not isinstance(solution, str | None):
        raise DataError(f"field output must be a text, not {kind(solution)}")
    answer = row.get("answer")
    return Question(
        text(row, "instruction").strip(),
        text(row, "input").strip() if row.get("input") else "",
        (solution or "").strip() or None,
        str(answer).strip() if answer is not None else (solution or "").strip(),
    )


def _question(row: Row) -> Question:
    """GSM8K: calculator marks `<<...>>` go; the answer stands behind `####`."""
    solution = re.sub(r"<<.*?>>", "", text(row, "answer")).strip()
    return Question(text(row, "question").strip(), "", solution, solution.split("####")[-1].strip())


def _mawps(row: Row) -> Question:
    """MAWPS: the equation with its result, in whole numbers where they are whole."""
    question, equation = text(row, "original_text").strip(), text(row, "equation")
    answer = row.get("ans")
    try:
        result = f"{float(answer):.12g}"  # type: ignore[arg-type]  # the upstream file has both
    except (TypeError, ValueError):
        raise DataError(f"field ans must be a number, not {kind(answer)}") from None
    expression = re.sub(r"^[xX]=|(?<=\d)\.0\b", "", equation.strip())
    return Question(question, "", f"{expression} = {result}", result)


# What turns a row into TRL's columns


def _prompt_completion(row: Row) -> Row:
    prompt = text(row, "prompt", may_be_empty=True)
    return {"prompt": prompt, "completion": text(row, "completion")}


def _chat_completion(row: Row) -> Row:
    return {
        "prompt": _messages(row, "prompt"),
        "completion": _answered(_messages(row, "completion"), "completion"),
        **_tools(row),
    }


def _chat(row: Row) -> Row:
    return {"messages": _answered(_messages(row, "messages"), "messages"), **_tools(row)}


def text_format(field: str) -> Format:
    """Return the format of rows whose text stands in a column of that name."""
    return Format((field,), convert=lambda row: {field: text(row, field)})


FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), convert=_chat),
    "chat_completion": Format(("prompt", "completion"), convert=_chat_completion),
    "prompt_completion": Format(("prompt", "completion"), convert=_prompt_completion),
    "alpaca": Format(("instruction", "output"), "alpaca", read=_alpaca),
    "question": Format(("question", "answer"), "question", read=_question),
    "mawps": Format(("original_text", "equation", "ans"), "question", read=_mawps),
    "text": text_format("text"),
}


def recognise(row: Any, text_field: str) -> str | None:
    """Return the name of the format that a row's columns tell, or None."""
    columns = set(row) if isinstance(row, dict) else set()
    for name, format in FORMATS.items():
        required = (text_field,) if name == "text" else format.columns
        if set(required) <= columns:
            if name == "chat_completion" and not isinstance(row["prompt"], list):
                continue
            return name
    return None


def conversational(format: str) -> bool:
    """Whether rows of this format need the tokenizer's chat template."""
    return format in ("messages", "chat_completion")


def prompt_for(instruction: str, format: str, template: str | None = None) -> str:
    """Return the prompt that rows of this format have for an instruction, to generate with."""
    if FORMATS[format].read is None:
        return instruction
    return FORMATS[format].template_named(template).prompt(instruction)


def text(row: Row, field: str, *, may_be_empty: bool = False) -> str:
    """Return a text field of a row; a `DataError` names what is wrong with it."""
    value = row.get(field)
    if value is None:
        raise DataError(f"field {field} is missing")
    if not isinstance(value, str):
        raise DataError(f"field {field} must be a text, not {kind(value)}")
    if not value.strip() and not may_be_empty:
        raise DataError(f"field {field} is empty")
    return value


def _messages(row: Row, field: str) -> list[Row]:
    value = row.get(field)
    if value is None:
        raise DataError(f"field {field} is missing")
    if not isinstance(value, list) or not value:
        raise DataError(f"field {field} must be a list of messages, not {kind(value)}")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise DataError(f"field {field}: message {number} must be an object")
        try:
            text(message, "role")
            if not message.get("tool_calls"):
                text(message, "content", may_be_empty=True)
        except DataError as problem:
            raise DataError(f"field {field}: message {number}: {problem}") from None
    return value


def _answered(messages: list[Row], field: str) -> list[Row]:
    """Require something to learn from: an assistant's message that is not empty."""
    for message in messages:
        if message["role"] == "assistant" and (message.get("content") or message.get("tool_calls")):
            return messages
    raise DataError(f"field {field} holds no answer of the assistant")


def _tools(row: Row) -> Row:
    return {"tools": row["tools"]} if row.get("tools") else {}


def kind(value: object) -> str:
    """Say in JSON's words what a value is."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else "null")
