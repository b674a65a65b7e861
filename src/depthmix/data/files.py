"""Files and hub data sets as rows, each with its place; one reader a type of file."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from depthmix.data.gym import gym_rows, is_gym
from depthmix.errors import DataError


class Item(NamedTuple):
    """A row as it was read, and where; a line that cannot be read is a DataError."""

    source: str
    position: str  # "line 3", or "row 3" where lines say nothing
    row: Any


def read_items(source: Sequence[str], split: str, config: str | None) -> Iterator[Item]:
    """Yield the rows of files, folders, a generator of reasoning-gym or a hub data set.

    Raises:
        DataError: a source is missing or of an unknown type.
    """
    if len(source) == 1 and is_gym(source[0]):
        yield from (Item(source[0], *numbered) for numbered in _numbered(gym_rows(source[0])))
        return
    if len(source) == 1 and not Path(source[0]).exists() and _suffix(source[0]) not in _READERS:
        yield from _hub_items(source[0], split, config)
        return
    for path in chain.from_iterable(_files(Path(name), split) for name in source):
        reader = _READERS.get(_suffix(path.name))
        if reader is None:
            raise DataError(f"{path}: expected a file of type {', '.join(_READERS)}")
        try:
            for position, row in reader(path):
                yield Item(str(path), position, row)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}") from error


def _files(path: Path, split: str) -> list[Path]:
    if not path.is_dir():
        return [path]
    named = re.compile(rf"{re.escape(split)}([-_.].*)?")
    found = sorted(
        p for p in path.iterdir() if named.fullmatch(p.stem) and _suffix(p.name) in _READERS
    )
    if not found:
        raise DataError(f"{path}: no file {split}.* of type {', '.join(_READERS)}")
    return found


def _suffix(name: str) -> str:
    return Path(name).suffix.lower()


def _read_json(path: Path) -> Iterator[tuple[str, object]]:
    """Read a JSON array; a file that does not begin with `[` holds one object a line."""
    with path.open("rb") as file:
        start = file.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        yield from _read_lines(path)
        return
    try:
        rows = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: line {error.lineno}: not valid JSON: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8") from error
    yield from _numbered(rows)


def _read_lines(path: Path) -> Iterator[tuple[str, object]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"line {number}", _parse_line(line)


def _parse_line(line: bytes) -> object:
    try:
        return json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except json.JSONDecodeError as error:
        return DataError(f"not valid JSON: {error.msg} at column {error.colno}")
    except UnicodeDecodeError:
        return DataError("not UTF-8")


def _read_csv(path: Path) -> Iterator[tuple[str, object]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                surplus = None in row
                problem = DataError("more cells than the header has columns")
                yield f"line {reader.line_num}", problem if surplus else row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}: line {reader.line_num + 1}: not valid CSV: {error}"
            ) from error


def _read_parquet(path: Path) -> Iterator[tuple[str, object]]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield from _numbered(row for batch in file.iter_batches() for row in batch.to_pylist())
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file: {error}") from error


def _hub_items(name: str, split: str, config: str | None) -> Iterator[Item]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        raise DataError(
            f"data set {name!r} is neither a file or folder here nor readable from the hub: {error}"
        ) from error
    for position, row in _numbered(rows):
        yield Item(f"{name} ({split})", position, row)


def _numbered(rows: Iterable[object]) -> Iterator[tuple[str, object]]:
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, object]]]] = {
    ".json": _read_json,
    ".jsonl": _read_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
