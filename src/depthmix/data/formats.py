"""Formats: the columns that tell one, and how a row of it is read."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from depthmix.data.fields import Row, kind, text
from depthmix.data.messages import chat, chat_completion, content_kinds, sharegpt
from depthmix.data.template import TEMPLATES, Template
from depthmix.errors import DataError


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
class Columns:
    """The names of columns that can be given other ones; those of TRL by default."""

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    text: str = "text"


@dataclass(frozen=True)
class Shape:
    """What the first row tells of all.

    Attributes:
        columns: where the fields stand.
        parts: role -> whether its messages' content comes as parts.
    """

    columns: Columns = Columns()
    parts: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Format:
    """A kind of rows.

    Attributes:
        columns: what a row of this kind has; the first format that fits is taken.
        template: name of the template that its questions get by default; None for rows that are
            prompts already.
        read: what makes a question of a row; None where there is no question.
        convert: what makes TRL's columns of a row that needs no template.
        made: TRL's columns; where it is empty, that of the text.
    """

    columns: tuple[str, ...]
    template: str | None = None
    read: Callable[[Row], Question] | None = None
    convert: Callable[[Row, Shape], Row] | None = None
    made: tuple[str, ...] = ("prompt", "completion")

    def training_row(self, row: Row, template: str | None, shape: Shape | None = None) -> Row:
        """Return TRL's columns, every field checked.

        Raises:
            DataError: a field is missing or empty; says which.
        """
        if self.convert is not None:
            return self.convert(row, shape or Shape())
        assert self.read is not None
        question, form = self.read(row), self.template_named(template)
        if question.solution is None or _is_nan(question.solution):
            raise DataError(f"field {self.columns[1]} is empty: there is nothing to learn")
        prompt = form.prompt(question.instruction, question.context)
        return {"prompt": prompt, "completion": form.completion(question.solution)}

    def question(self, row: Row) -> Question:
        """Return a row to score on.

        Raises:
            DataError: a field is missing or empty, or there is no answer to score by.
        """
        assert self.read is not None
        question = self.read(row)
        if not question.answer or _is_nan(question.answer):
            raise DataError(
                f"there is no answer to score by: {' and '.join(self.columns[1:])} (or a field "
                f"answer) must hold one, not {question.answer or 'nothing'}"
            )
        return question

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
        number = float(answer)  # type: ignore[arg-type]  # the upstream file has both
    except (TypeError, ValueError):
        raise DataError(f"field ans must be a number, not {kind(answer)}") from None
    if not math.isfinite(number):
        raise DataError(f"field ans must be a number, not {number}")
    result = f"{number:.12g}"
    expression = re.sub(r"^[xX]=|(?<=\d)\.0\b", "", equation.strip())
    return Question(question, "", f"{expression} = {result}", result)


def _is_nan(text: str) -> bool:
    """Whether a text is what a table without a value was written as."""
    return text.lower() == "nan"


# What turns a row into TRL's columns


def _prompt_completion(row: Row, shape: Shape) -> Row:
    prompt = text(row, shape.columns.prompt, may_be_empty=True)
    return {"prompt": prompt, "completion": text(row, shape.columns.completion)}


def _chat_completion(row: Row, shape: Shape) -> Row:
    return chat_completion(row, shape.columns.prompt, shape.columns.completion, shape.parts)


def _chat(row: Row, shape: Shape) -> Row:
    return chat(row, shape.columns.messages, shape.parts)


def _text(row: Row, shape: Shape) -> Row:
    return {shape.columns.text: text(row, shape.columns.text)}


# Beside the messages, what the chat template takes.
EXTRAS = ("tools", "chat_template_kwargs")
_PAIR = ("prompt", "completion")

FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), convert=_chat, made=("messages", *EXTRAS)),
    "sharegpt": Format(
        ("conversations",), convert=lambda row, _: sharegpt(row), made=("messages", *EXTRAS)
    ),
    "chat_completion": Format(_PAIR, convert=_chat_completion, made=(*_PAIR, *EXTRAS)),
    "prompt_completion": Format(_PAIR, convert=_prompt_completion),
    "alpaca": Format(("instruction", "output"), "alpaca", read=_alpaca),
    "question": Format(("question", "answer"), "question", read=_question),
    "mawps": Format(("original_text", "equation", "ans"), "question", read=_mawps),
    "text": Format(("text",), convert=_text, made=()),
}
FORMAT_NAMES = ("auto", *FORMATS)  # what an option may say; auto: told from the columns


def recognise(row: Any, columns: Columns) -> str | None:
    """Return the name of the format that a row's columns tell, or None."""
    found = set(row) if isinstance(row, dict) else set()
    for name in _candidates(columns):
        if set(required(name, columns)) <= found:
            if name == "chat_completion" and not isinstance(row[columns.prompt], list):
                continue
            return name
    return None


def _candidates(columns: Columns) -> list[str]:
    """Return the formats that columns of the user's choice leave."""
    if columns.messages != "messages":
        return ["messages"]
    if (columns.prompt, columns.completion) != _PAIR:
        return ["chat_completion", "prompt_completion"]
    return list(FORMATS)


def required(format: str, columns: Columns) -> tuple[str, ...]:
    """Return the columns that a row of a format has, under the names that they were given."""
    named = {name: getattr(columns, name) for name in ("prompt", "completion", "messages", "text")}
    return tuple(named.get(name, name) for name in FORMATS[format].columns)


def shape_of(row: Row, format: str, columns: Columns) -> Shape:
    """Return what the first row tells of the others."""
    return Shape(columns, content_kinds(row, required(format, columns)))


def conversational(format: str) -> bool:
    """Whether rows of this format need the tokenizer's chat template."""
    return format in ("messages", "sharegpt", "chat_completion")


def prompt_for(instruction: str, format: str, template: str | None = None) -> str:
    """Return the prompt that rows of this format have for an instruction, to generate with."""
    if FORMATS[format].read is None:
        return instruction
    return FORMATS[format].template_named(template).prompt(instruction)
