"""Readers: how files of each type become rows, by the readers of `datasets`, which cache them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from depthmix.data.fields import Row
from depthmix.data.json_files import holds_an_array, line, load_array, load_lines, parse_line
from depthmix.data.opening import loaded, suffix
from depthmix.data.tables import load_csv, load_tsv, table_line
from depthmix.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Reader:
    """How files of one type are read.

    Attributes:
        load: the files as a data set.
        parse: a row of it -> the row that was written, or None for a blank line. It is part of
            what `datasets` keys its cache by, so it is a function of a module.
        position: (file, index of a row in it) -> where the row stands.
    """

    load: Callable[[Sequence[str]], Dataset]
    parse: Callable[[Row], Any]
    position: Callable[[str, int], str]

    def read(self, raw: Row) -> Any:
        """Return what `parse` does, or the DataError that it raises."""
        try:
            return self.parse(raw)
        except DataError as problem:
            return problem


def reader_of(file: str) -> Reader:
    """Return the reader of a file.

    Raises:
        DataError: the type is unknown.
    """
    if suffix(file) not in READERS:
        raise DataError(f"{file}: expected a file of type {', '.join(READERS)}")
    if suffix(file) == ".json" and holds_an_array(file):
        return _ARRAY
    return READERS[suffix(file)]


def numbered(_file: str, index: int) -> str:
    """Return the position of a row in a file whose lines say nothing."""
    return f"row {index + 1}"


def _load_parquet(files: Sequence[str]) -> Dataset:
    return loaded("parquet", files)


def _load_arrow(files: Sequence[str]) -> Dataset:
    return loaded("arrow", files)


def without_nulls(row: Row) -> Row:
    """Return a row of a typed table without the keys that its types alone brought in.

    Where one object of a column has a key, Arrow gives it to all objects, with null.
    """
    return {name: _filled(value) for name, value in row.items()}


def _filled(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _filled(held) for name, held in value.items() if held is not None}
    return [_filled(held) for held in value] if isinstance(value, list) else value


def as_it_is(row: Row) -> Row:
    """Return the row."""
    return row


_LINES = Reader(load_lines, parse_line, line)
_ARRAY = Reader(load_array, parse_line, numbered)
READERS = {
    ".json": _LINES,
    ".jsonl": _LINES,
    ".ndjson": _LINES,
    ".csv": Reader(load_csv, as_it_is, table_line),
    ".tsv": Reader(load_tsv, as_it_is, table_line),
    ".parquet": Reader(_load_parquet, without_nulls, numbered),
    ".arrow": Reader(_load_arrow, without_nulls, numbered),
}
