"""Formats: the columns that tell one, and how a row of it is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from depthmix.data.fields import Row, as_json, text
from depthmix.data.messages import (
    chat,
    chat_completion,
    chat_preference,
    content_kinds,
    open_chat,
    sharegpt,
)
from depthmix.data.preferences import text_preference
from depthmix.data.questions import Question, alpaca, gsm8k, is_nan, mawps
from depthmix.data.template import TEMPLATES, Template
from depthmix.errors import DataError

# What rows are read for: answers to learn, pairs of answers to compare, prompts to answer.
Purpose = Literal["completions", "pairs", "prompts"]


@dataclass(frozen=True)
class Columns:
    """The names of columns that can be given other ones; those of TRL by default."""

    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    text: str = "text"


@dataclass(frozen=True)
class Shape:
    """What is to be made of all rows, and what the first one tells of them.

    Attributes:
        columns: where the fields stand.
        parts: role -> whether its messages' content comes as parts.
        purpose: what the rows are read for.
        kept: columns to carry along with a prompt, as JSON.
    """

    columns: Columns = Columns()
    parts: dict[str, bool] = field(default_factory=dict)
    purpose: Purpose = "completions"
    kept: tuple[str, ...] = ()


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
        purposes: what rows of this kind can be read for.
        listed: the column that is a list where the rows are messages, and a text where they are
            not; None where the names of the columns tell.
    """

    columns: tuple[str, ...]
    template: str | None = None
    read: Callable[[Row], Question] | None = None
    convert: Callable[[Row, Shape], Row] | None = None
    made: tuple[str, ...] = ("prompt", "completion")
    purposes: tuple[Purpose, ...] = ("completions",)
    listed: str | None = None

    def training_row(self, row: Row, template: str | None, shape: Shape | None = None) -> Row:
        """Return TRL's columns, every field checked.

        Raises:
            DataError: a field is missing or empty; says which.
        """
        shape = shape or Shape()
        if shape.purpose == "prompts":
            kept = {name: as_json(_held(row, name), name) for name in shape.kept}
            return {"prompt": self.prompt(row, template, shape), **kept}
        if self.convert is not None:
            return self.convert(row, shape)
        assert self.read is not None
        question, form = self.read(row), self.template_named(template)
        if question.solution is None or is_nan(question.solution):
            raise DataError(f"field {self.columns[1]} is empty: there is nothing to learn")
        prompt = form.prompt(question.instruction, question.context)
        return {"prompt": prompt, "completion": form.completion(question.solution)}

    def prompt(self, row: Row, template: str | None, shape: Shape) -> str | list[Row]:
        """Return what a row asks, a text or messages, without its answer.

        Raises:
            DataError: a field is missing or broken; says which.
        """
        if self.read is not None:
            question = self.read(row)
            return self.template_named(template).prompt(question.instruction, question.context)
        assert self.convert is not None
        prompt: str | list[Row] = self.convert(row, shape)["prompt"]
        return prompt

    def question(self, row: Row) -> Question:
        """Return a row to score on.

        Raises:
            DataError: a field is missing or empty, or there is no answer to score by.
        """
        assert self.read is not None
        question = self.read(row)
        if not question.answer or is_nan(question.answer):
            raise DataError(
                f"there is no answer to score by: {' and '.join(self.columns[1:])} (or a field "
                f"answer) must hold one, not {question.answer or 'nothing'}"
            )
        return question

    def template_named(self, name: str | None) -> Template:
        """Return the template of that name, or this format's own."""
        return TEMPLATES[name or self.template or "question"]


def _held(row: Row, field: str) -> Any:
    if row.get(field) is None:
        raise DataError(f"field {field} is missing")
    return row[field]


# What turns a row into TRL's columns


def _prompt_completion(row: Row, shape: Shape) -> Row:
    prompt = text(row, shape.columns.prompt, may_be_empty=True)
    return {"prompt": prompt, "completion": text(row, shape.columns.completion)}


def _chat_completion(row: Row, shape: Shape) -> Row:
    return chat_completion(row, shape.columns.prompt, shape.columns.completion, shape.parts)


def _chat(row: Row, shape: Shape) -> Row:
    if shape.purpose == "prompts":
        return {"prompt": open_chat(row, shape.columns.messages, shape.parts)}
    return chat(row, shape.columns.messages, shape.parts)


def _sharegpt(row: Row, shape: Shape) -> Row:
    if shape.purpose == "prompts":
        return {"prompt": open_chat(sharegpt(row), "messages", {})}
    return sharegpt(row)


def _prompt(row: Row, shape: Shape) -> Row:
    return {"prompt": text(row, shape.columns.prompt)}


def _chat_prompt(row: Row, shape: Shape) -> Row:
    return {"prompt": open_chat(row, shape.columns.prompt, shape.parts)}


def _preference(row: Row, shape: Shape) -> Row:
    return text_preference(row, shape.columns.prompt)


def _chat_preference(row: Row, shape: Shape) -> Row:
    return chat_preference(row, shape.columns.prompt, shape.parts)


def _text(row: Row, shape: Shape) -> Row:
    return {shape.columns.text: text(row, shape.columns.text)}


# Beside the messages, what the chat template takes.
EXTRAS = ("tools", "chat_template_kwargs")
_PAIR = ("prompt", "completion")
_COMPARED = ("chosen", "rejected")
_ANY: tuple[Purpose, ...] = ("completions", "prompts")

FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), convert=_chat, made=("messages", *EXTRAS), purposes=_ANY),
    "sharegpt": Format(
        ("conversations",), convert=_sharegpt, made=("messages", *EXTRAS), purposes=_ANY
    ),
    "chat_completion": Format(
        _PAIR, convert=_chat_completion, made=(*_PAIR, *EXTRAS), listed="prompt"
    ),
    "prompt_completion": Format(_PAIR, convert=_prompt_completion),
    "alpaca": Format(("instruction", "output"), "alpaca", read=alpaca, purposes=_ANY),
    "question": Format(("question", "answer"), "question", read=gsm8k, purposes=_ANY),
    "mawps": Format(("original_text", "equation", "ans"), "question", read=mawps, purposes=_ANY),
    "text": Format(("text",), convert=_text, made=()),
    "chat_preference": Format(
        _COMPARED,
        convert=_chat_preference,
        made=("prompt", *_COMPARED, *EXTRAS),
        purposes=("pairs",),
        listed="chosen",
    ),
    "preference": Format(
        _COMPARED, convert=_preference, made=("prompt", *_COMPARED), purposes=("pairs",)
    ),
    "chat_prompt": Format(
        ("prompt",), convert=_chat_prompt, purposes=("prompts",), listed="prompt"
    ),
    "prompt": Format(("prompt",), convert=_prompt, purposes=("prompts",)),
}
FORMAT_NAMES = ("auto", *FORMATS)  # what an option may say; auto: told from the columns


def formats_for(purpose: Purpose) -> list[str]:
    """Return the names of the formats that can be read for a purpose."""
    return [name for name, form in FORMATS.items() if purpose in form.purposes]


def recognise(row: Any, columns: Columns, purpose: Purpose = "completions") -> str | None:
    """Return the name of the format that a row's columns tell, or None."""
    found = set(row) if isinstance(row, dict) else set()
    for name in _candidates(columns, purpose):
        if set(required(name, columns)) <= found:
            listed = FORMATS[name].listed
            if listed and not isinstance(row[named(listed, columns)], list):
                continue
            return name
    return None


def _candidates(columns: Columns, purpose: Purpose) -> list[str]:
    """Return the formats that columns of the user's choice leave."""
    names = formats_for(purpose)
    if purpose == "pairs":
        return names
    if columns.messages != "messages":
        return ["messages"]
    if (columns.prompt, columns.completion) != _PAIR:
        return [name for name in names if "prompt" in FORMATS[name].columns]
    return names


def required(format: str, columns: Columns) -> tuple[str, ...]:
    """Return the columns that a row of a format has, under the names that they were given."""
    return tuple(named(name, columns) for name in FORMATS[format].columns)


def named(column: str, columns: Columns) -> str:
    """Return the name that a column was given, or its own."""
    return str(getattr(columns, column, column))


def made_columns(format: str, shape: Shape) -> tuple[str, ...]:
    """Return the columns of TRL that a format becomes."""
    if shape.purpose == "prompts":
        return ("prompt", *shape.kept)
    return FORMATS[format].made or (shape.columns.text,)


def shape_of(
    row: Row,
    format: str,
    columns: Columns,
    purpose: Purpose = "completions",
    kept: tuple[str, ...] = (),
) -> Shape:
    """Return what is to be made of all rows, with what the first one tells of them."""
    fields = (*required(format, columns), columns.prompt)
    return Shape(columns, content_kinds(row, fields), purpose, kept)


def conversational(format: str) -> bool:
    """Whether rows of this format need the tokenizer's chat template."""
    form = FORMATS[format]
    return form.listed is not None or "messages" in form.made


def prompt_for(instruction: str, format: str, template: str | None = None) -> str:
    """Return the prompt that rows of this format have for an instruction, to generate with."""
    if FORMATS[format].read is None:
        return instruction
    return FORMATS[format].template_named(template).prompt(instruction)
