"""Tables: CSV and TSV, read by the reader of `datasets`; every cell is a text."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING

from depthmix.data.opening import loaded, opened_file, suffix
from depthmix.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


def load_csv(files: Sequence[str], separator: str = ",") -> Dataset:
    """Load tables, every cell a text as it was written: `NA` and `1.0` stay what they are.

    Raises:
        DataError: a table is broken; names the line.
    """
    from datasets import Features, Value, concatenate_datasets

    tables = []
    for file in files:
        features = Features(dict.fromkeys(_header(file, separator), Value("string")))
        plain = {"keep_default_na": False, "na_filter": False}
        try:
            tables.append(loaded("csv", [file], features=features, sep=separator, **plain))
        except DataError:
            _require_no_surplus(file, separator)
            raise
    return concatenate_datasets(tables)


def load_tsv(files: Sequence[str]) -> Dataset:
    """Load tables whose cells are parted by tabs."""
    return load_csv(files, "\t")


def table_line(file: str, index: int) -> str:
    """Return the line that a row of a table ends in."""
    separator = "\t" if suffix(file) == ".tsv" else ","
    records = enumerate(_records(file, separator), -1)  # -1: the header
    return next(f"line {line}" for number, (line, _) in records if number == index)


def _header(file: str, separator: str) -> list[str]:
    """Return the names of the columns.

    pandas would take a first column without a name for an index, and shift the others in silence.
    """
    try:
        _require_no_surplus(file, separator, most=2)
        header: list[str] = next((cells for _, cells in _records(file, separator)), [])
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file}: line 1: not valid CSV: {error}") from error
    twice = {name for name in header if header.count(name) > 1}
    if twice:
        raise DataError(f"{file}: line 1: the column {min(twice)!r} is named twice")
    return header


def _require_no_surplus(file: str, separator: str, most: int | None = None) -> None:
    """Raise a `DataError` for the first of the records that is longer than the header."""
    width = None
    for line, cells in islice(_records(file, separator), most):
        width = len(cells) if width is None else width
        if len(cells) > width:
            raise DataError(f"{file}: line {line}: more cells than the header has columns")


def _records(file: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield (line, cells) of a table, blank lines left out."""
    csv.field_size_limit(sys.maxsize)
    with opened_file(file, "rt", encoding="utf-8-sig", newline="") as opened:
        reader = csv.reader(opened, delimiter=separator)
        yield from ((reader.line_num, cells) for cells in reader if cells)
