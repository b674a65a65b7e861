"""Load rows for training or evaluation: local files, the hub or a generator, every row checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

from depthmix.data.files import Item, read_items
from depthmix.data.formats import FORMATS, Format, Question, kind, recognise, text_format
from depthmix.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")

_SHOWN_PROBLEMS = 5


def load_data(
    source: Sequence[str],
    *,
    split: str = "train",
    config: str | None = None,
    format: str = "auto",
    template: str | None = None,
    text_field: str = "text",
) -> tuple[Dataset, str]:
    """Load rows to train on, in TRL's columns: prompt and completion, messages, or text.

    TRL adds the end-of-sequence token to a completion and to a text, where it is supervised.

    Args:
        source: local json, jsonl, csv or parquet files, folders with `<split>.*`, one hub name, or
            one `reasoning_gym:...` (see `depthmix.data.gym`).
        split: split of a folder or of the hub data set.
        config: configuration of the hub data set.
        format: key of `FORMATS`, or auto to tell it from the columns of the first row.
        template: key of `TEMPLATES`, for formats that hold questions; default: the format's own.
        text_field: the column of format text.

    Returns:
        The converted rows, and the name of their format.

    Raises:
        DataError: a source is missing or a row is broken; names the file, the line and the field.
    """
    items, name, kind_of_rows = _recognised(source, split, config, format, text_field)
    from datasets import Dataset

    rows = _converted(items, lambda row: kind_of_rows.training_row(row, template))
    return Dataset.from_list(rows), name


def load_questions(
    source: Sequence[str],
    *,
    split: str = "test",
    config: str | None = None,
    format: str = "auto",
) -> tuple[list[Question], Format]:
    """Load rows to evaluate on: questions with answers, and their format.

    Raises:
        DataError: as `load_data`, or the rows hold no questions.
    """
    items, name, kind_of_rows = _recognised(source, split, config, format, "text")
    if kind_of_rows.read is None:
        able = ", ".join(known for known, form in FORMATS.items() if form.read)
        raise DataError(
            f"{', '.join(source)}: rows of format {name} hold no question and answer to score; "
            f"formats that do are {able}"
        )
    return _converted(items, kind_of_rows.read), kind_of_rows


def _recognised(
    source: Sequence[str], split: str, config: str | None, format: str, text_field: str
) -> tuple[Iterable[Item], str, Format]:
    items = read_items(source, split, config)
    first = next(items, None)
    if first is None:
        raise DataError(f"{', '.join(source)}: there are no rows")
    name = _format_of(first, text_field) if format == "auto" else format
    return chain([first], items), name, text_format(text_field) if name == "text" else FORMATS[name]


def _format_of(first: Item, text_field: str) -> str:
    if isinstance(first.row, DataError):
        raise DataError(f"{first.source}: {first.position}: {first.row}")
    name = recognise(first.row, text_field)
    if name is not None:
        return name
    columns = list(first.row) if isinstance(first.row, dict) else []
    expected = dict.fromkeys(" + ".join(form.columns) for form in FORMATS.values())
    raise DataError(
        f"{first.source}: {first.position}: the columns {', '.join(map(str, columns)) or '(none)'} "
        f"are of no known format: expected {'; '.join(expected)}"
    )


def _converted(items: Iterable[Item], convert: Callable[[dict[str, Any]], T]) -> list[T]:
    """Convert every row, or raise the first problems and the number of the others."""
    converted: list[T] = []
    problems: list[tuple[str, str]] = []
    for source, position, row in items:
        try:
            if isinstance(row, DataError):
                raise row
            if not isinstance(row, dict):
                raise DataError(f"a row must be an object with named fields, not {kind(row)}")
            converted.append(convert(row))
        except DataError as problem:
            problems.append((source, f"{position}: {problem}"))
    if problems:
        raise DataError(_listed(problems))
    return converted


def _listed(problems: list[tuple[str, str]]) -> str:
    """Name the first problems, each file once, and count the others."""
    by_source: dict[str, list[str]] = {}
    for source, problem in problems[:_SHOWN_PROBLEMS]:
        by_source.setdefault(source, []).append(problem)
    parts = [f"{source}: {'; '.join(found)}" for source, found in by_source.items()]
    more = len(problems) - _SHOWN_PROBLEMS
    return "; ".join([*parts, f"and {more} more"] if more > 0 else parts)
