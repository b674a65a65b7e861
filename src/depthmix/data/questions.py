"""Rows that hold a question and its answer, which a template renders."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from depthmix.data.fields import Row, kind, text
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


def alpaca(row: Row) -> Question:
    """LLM-Adapters and Alpaca: `answer` is what is compared, where there is one."""
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


def gsm8k(row: Row) -> Question:
    """GSM8K: calculator marks `<<...>>` go; the answer stands behind `####`."""
    solution = re.sub(r"<<.*?>>", "", text(row, "answer")).strip()
    return Question(text(row, "question").strip(), "", solution, solution.split("####")[-1].strip())


def mawps(row: Row) -> Question:
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


def is_nan(text: str) -> bool:
    """Whether a text is what a table without a value was written as."""
    return text.lower() == "nan"
