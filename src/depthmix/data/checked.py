"""Rows checked and converted inside the cache of `datasets`, and what is said of broken ones.

A broken row is kept with its problem, so that all of them are counted, and found again in no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from depthmix.data.code import code_digest
from depthmix.data.fields import Row, as_json, kind
from depthmix.data.files import Item, Part
from depthmix.data.formats import FORMATS, Shape, made_columns
from depthmix.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")

_SHOWN_PROBLEMS = 5
_INDEX, _PROBLEM = "depthmix_index", "depthmix_problem"


def converted_part(part: Part, format: str, template: str | None, shape: Shape) -> Dataset:
    """Return the rows of a part in TRL's columns, each with its problem or without one.

    Args:
        part: what was read.
        format: key of `FORMATS`.
        template: key of `TEMPLATES`, or None for the format's own.
        shape: what the first row tells of the others.
    """
    from datasets import Features, Value

    made = made_columns(format, shape)
    texts = dict.fromkeys((*made, _PROBLEM), Value("string"))
    return part.rows.map(
        _convert_batch,
        batched=True,
        with_indices=True,
        remove_columns=part.rows.column_names,
        features=Features({**texts, _INDEX: Value("int64")}),
        fn_kwargs={
            "parse": part.reader.parse,
            "format": format,
            "template": template,
            "shape": shape,
            "made": made,
            "code": code_digest(),
        },
        desc="Checking rows",
    )


def _convert_batch(
    batch: Mapping[str, list[Any]],
    indices: list[int],
    parse: Callable[[Row], Any],
    format: str,
    template: str | None,
    shape: Shape,
    made: tuple[str, ...],
    code: str,
) -> dict[str, list[Any]]:
    del code  # it is there for the key of the cache alone
    table: dict[str, list[Any]] = {name: [] for name in (*made, _PROBLEM, _INDEX)}
    for index, values in zip(indices, zip(*batch.values(), strict=True), strict=True):
        row: Row = {}
        problem = None
        try:
            written = parse(dict(zip(batch, values, strict=True)))
            if written is None:
                continue
            row = _texts(FORMATS[format].training_row(_object(written), template, shape))
        except DataError as error:
            problem = str(error)
        for name in made:
            table[name].append(row.get(name))
        table[_PROBLEM].append(problem)
        table[_INDEX].append(index)
    return table


def _texts(row: Row) -> Row:
    return {
        name: value if value is None or isinstance(value, str) else as_json(value, name)
        for name, value in row.items()
    }


def _object(row: Any) -> Row:
    if not isinstance(row, dict):
        raise DataError(f"a row must be an object with named fields, not {kind(row)}")
    return row


def require_no_problem(converted: Sequence[tuple[Part, Dataset]]) -> None:
    """Raise the first problems and the number of the others."""
    count = sum(len(rows) - nulls(rows, _PROBLEM) for _, rows in converted)
    if count:
        raise DataError(_listed(_problems(converted), count))


def _problems(converted: Iterable[tuple[Part, Dataset]]) -> list[tuple[str, str]]:
    """Return the first problems, as (source, position and problem)."""
    found: list[tuple[str, str]] = []
    for part, rows in converted:
        columns = (rows.data.column(name).to_pylist() for name in (_INDEX, _PROBLEM))
        for index, problem in zip(*columns, strict=True):
            if problem is not None:
                source, position = part.place(index)
                found.append((source, f"{position}: {problem}"))
            if len(found) == _SHOWN_PROBLEMS:
                return found
    return found


def index_of(rows: Dataset, row: Row) -> int | None:
    """Return the index, in its part, of the first converted row that is the same as one."""
    names = [*row, _INDEX]
    for *values, index in zip(*(rows.data.column(name).to_pylist() for name in names), strict=True):
        if values == list(row.values()):
            return int(index)
    return None


def converted_items(items: Iterable[Item], convert: Callable[[Row], T]) -> list[T]:
    """Convert every row here and now, or raise the first problems."""
    converted: list[T] = []
    problems: list[tuple[Item, DataError]] = []
    for item in items:
        try:
            if isinstance(item.row, DataError):
                raise item.row
            converted.append(convert(_object(item.row)))
        except DataError as problem:
            problems.append((item, problem))
    if problems:
        places = [(item.place(), problem) for item, problem in problems[:_SHOWN_PROBLEMS]]
        found = [(source, f"{position}: {problem}") for (source, position), problem in places]
        raise DataError(_listed(found, len(problems)))
    return converted


def _listed(problems: list[tuple[str, str]], count: int) -> str:
    """Name the first problems, each file once, and count the others."""
    by_source: dict[str, list[str]] = {}
    for source, problem in problems:
        by_source.setdefault(source, []).append(problem)
    parts = [f"{source}: {'; '.join(found)}" for source, found in by_source.items()]
    more = count - len(problems)
    return "; ".join([*parts, f"and {more} more"] if more > 0 else parts)


def nulls(rows: Dataset, column: str) -> int:
    """Return how many rows have nothing in a column."""
    return int(rows.data.column(column).null_count)
