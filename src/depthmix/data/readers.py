"""Readers: how files of each type become rows, by the readers of `datasets`, which cache them.

JSON goes through their reader of text, a line a row, and is parsed here. Their reader of JSON makes
dates of texts that look like one, numbers of texts that stand beside lists, rounds numbers to ten
digits and fills objects with null; a row is to be trained on as it was written.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import logging
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmix.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_TEXT = "text"


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


def suffix(name: str) -> str:
    """Return the type of a file: its suffix, that of a compression left out."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def reader_of(file: str) -> Reader:
    """Return the reader of a file.

    Raises:
        DataError: the type is unknown.
    """
    if suffix(file) not in READERS:
        raise DataError(f"{file}: expected a file of type {', '.join(READERS)}")
    if suffix(file) == ".json" and _holds_an_array(file):
        return _ARRAY
    return READERS[suffix(file)]


def numbered(_file: str, index: int) -> str:
    """Return the position of a row in a file whose lines say nothing."""
    return f"row {index + 1}"


# JSON


def _line(_file: str, index: int) -> str:
    return f"line {index + 1}"


def _load_lines(files: Sequence[str]) -> Dataset:
    from datasets import Features, Value

    features = Features({_TEXT: Value("string")})
    return _loaded("text", files, features=features, encoding="utf-8-sig")


def _load_array(files: Sequence[str]) -> Dataset:
    """Load one file that holds an array, as a line of JSON a row."""
    lines = _load_lines(files)
    return lines.map(
        _one_a_row, batched=True, batch_size=None, fn_kwargs={"file": files[0]}, desc="Reading JSON"
    )


def _one_a_row(batch: Mapping[str, list[str]], file: str) -> dict[str, list[str]]:
    try:
        return {_TEXT: [json.dumps(row) for row in json.loads("\n".join(batch[_TEXT]))]}
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: line {error.lineno}: not valid JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON: {_in_short(error)}") from None


def _parse_line(row: Row) -> Any:
    """Return the value that a line holds, or None where it is blank."""
    line = row[_TEXT].strip()
    return parse_json(line) if line else None


def parse_json(text: str) -> Any:
    """Return the value of a JSON text, its numbers exact.

    Raises:
        DataError: it is none, or too large to be read.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"not valid JSON: {_in_short(error)}") from None


def _in_short(error: Exception) -> str:
    """Say what Python refuses in a text that keeps to the grammar."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return f"a number of more than {sys.get_int_max_str_digits()} digits"


def _holds_an_array(file: str) -> bool:
    with _opened(file, "rb") as opened:
        return bool(opened.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["))


@contextmanager
def _opened(file: str, mode: str, **options: Any) -> Iterator[Any]:
    import fsspec  # type: ignore[import-untyped]

    try:
        with fsspec.open(file, mode, compression="infer", **options) as opened:
            yield opened
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{file}: a broken archive: {error}") from error


# CSV


def _load_csv(files: Sequence[str], separator: str = ",") -> Dataset:
    """Load tables, every cell a text as it was written: `NA` and `1.0` stay what they are."""
    from datasets import Features, Value, concatenate_datasets

    tables = []
    for file in files:
        header = _csv_header(file, separator)
        features = Features(dict.fromkeys(header, Value("string")))
        plain = {"keep_default_na": False, "na_filter": False}
        tables.append(_loaded("csv", [file], features=features, sep=separator, **plain))
    return concatenate_datasets(tables)


def _load_tsv(files: Sequence[str]) -> Dataset:
    return _load_csv(files, "\t")


def _csv_header(file: str, separator: str) -> list[str]:
    """Return the names of the columns.

    pandas would take a first column without a name for an index, and shift the others in silence.
    """
    try:
        records = list(_csv_records(file, separator, 2))
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{file}: line 1: not valid CSV: {error}") from error
    header = records[0][1] if records else []
    twice = {name for name in header if header.count(name) > 1}
    if twice:
        raise DataError(f"{file}: line 1: the column {min(twice)!r} is named twice")
    if len(records) > 1 and len(records[1][1]) > len(header):
        raise DataError(f"{file}: line {records[1][0]}: {_SURPLUS}")
    return header


_SURPLUS = "more cells than the header has columns"


def _csv_records(file: str, separator: str, most: int | None = None) -> Iterator[tuple[int, Any]]:
    """Yield (line, cells) of a table, blank lines left out."""
    csv.field_size_limit(sys.maxsize)
    with _opened(file, "rt", encoding="utf-8-sig", newline="") as opened:
        reader = csv.reader(opened, delimiter=separator)
        for number, cells in enumerate(filter(None, reader)):
            if number == most:
                return
            yield reader.line_num, cells


def _csv_line(file: str, index: int) -> str:
    separator = "\t" if suffix(file) == ".tsv" else ","
    for number, (line, _) in enumerate(_csv_records(file, separator), -1):  # -1: the header
        if number == index:
            return f"line {line}"
    return numbered(file, index)


# Parquet and Arrow


def _load_parquet(files: Sequence[str]) -> Dataset:
    return _loaded("parquet", files)


def _load_arrow(files: Sequence[str]) -> Dataset:
    return _loaded("arrow", files)


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


_LINES = Reader(_load_lines, _parse_line, _line)
_ARRAY = Reader(_load_array, _parse_line, numbered)
READERS = {
    ".json": _LINES,
    ".jsonl": _LINES,
    ".ndjson": _LINES,
    ".csv": Reader(_load_csv, as_it_is, _csv_line),
    ".tsv": Reader(_load_tsv, as_it_is, _csv_line),
    ".parquet": Reader(_load_parquet, without_nulls, numbered),
    ".arrow": Reader(_load_arrow, without_nulls, numbered),
}


# Calling `datasets`, and what it says


def _loaded(builder: str, files: Sequence[str], **options: Any) -> Dataset:
    """Load files of one type.

    Raises:
        DataError: one cannot be read; names it, and the line where that is known.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    pattern = [glob.escape(str(Path(file).absolute())) for file in files]
    try:
        with _silent():
            return datasets.load_dataset(builder, data_files=pattern, split="train", **options)
    except (DatasetGenerationError, ValueError, OSError) as error:
        if isinstance(error, OSError):
            raise DataError(f"{files[0]}: {error.strerror or error}") from error
        if "corresponds to no data" in str(error):
            return datasets.Dataset.from_list([], features=options.get("features"))
        if len(files) > 1:  # which one it is
            for file in files:
                _loaded(builder, [file], **options)
        cause = error.__cause__ or error
        raise DataError(f"{files[0]}: {_problem(builder, files[0], cause)}") from error


@contextmanager
def _silent() -> Iterator[None]:
    """Keep `datasets` from logging what is raised as an error of ours."""
    import datasets

    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def _problem(builder: str, file: str, error: BaseException) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"{_undecodable_line(file)}not UTF-8"
    if builder == "csv":
        return _csv_problem(file) or f"not valid CSV: {error}"
    if builder == "text":
        return f"cannot be read: {error}"
    return f"not a file of type {builder}: {error}"


def _csv_problem(file: str) -> str:
    separator = "\t" if suffix(file) == ".tsv" else ","
    width = None
    for line, cells in _csv_records(file, separator):
        width = len(cells) if width is None else width
        if len(cells) > width:
            return f"line {line}: {_SURPLUS}"
    return ""


def _undecodable_line(file: str) -> str:
    with _opened(file, "rb") as opened:
        for number, line in enumerate(opened, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f"line {number}: "
    return ""
