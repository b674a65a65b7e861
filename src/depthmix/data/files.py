"""Sources: what a name stands for, and its rows, each with its place."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from depthmix.data.gym import gym_rows, is_gym
from depthmix.data.opening import suffix
from depthmix.data.readers import READERS, Reader, numbered, reader_of, without_nulls
from depthmix.data.splits import Piece, pieces
from depthmix.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


class Item(NamedTuple):
    """A row as it was read; a line that cannot be read is a DataError.

    `place()` gives file and position, such as "line 3": found when asked for, which takes time.
    """

    row: Any
    place: Callable[[], tuple[str, str]]


@dataclass(frozen=True)
class Part:
    """Rows that one reader has read.

    Attributes:
        names: the files, or the one name of what is no file.
        reader: how they are read.
        rows: what `datasets` made of them.
    """

    names: tuple[str, ...]
    reader: Reader
    rows: Dataset

    def place(self, index: int) -> tuple[str, str]:
        """Return the file and the position in it of a row. The files are read once more."""
        for name in self.names[:-1]:
            length = len(self.reader.load([name]))
            if index < length:
                return name, self.reader.position(name, index)
            index -= length
        return self.names[-1], self.reader.position(self.names[-1], index)

    def items(self) -> Iterator[Item]:
        """Yield the rows as they were written."""
        for index, raw in enumerate(self.rows):
            row = self.reader.read(raw)
            if row is not None:
                yield Item(row, partial(self.place, index))


def read_items(source: Sequence[str], split: str, config: str | None) -> Iterator[Item]:
    """Yield the rows of files, folders, generators of reasoning-gym or hub data sets.

    Raises:
        DataError: a source is missing, of an unknown type, or cannot be read.
    """
    for name in source:
        if is_gym(name):
            rows = list(gym_rows(name))
            items = [Item(row, partial(_place_in, name, n)) for n, row in enumerate(rows)]
            yield from (items[index] for piece in pieces(split) for index in piece.of(len(items)))
            continue
        for piece, parts in read_parts(name, split, config):
            items = [item for part in parts for item in part.items()]
            yield from (items[index] for index in piece.of(len(items)))


def _place_in(name: str, index: int) -> tuple[str, str]:
    return name, numbered(name, index)


def read_parts(name: str, split: str, config: str | None) -> Iterator[tuple[Piece, list[Part]]]:
    """Yield every piece of a split with the parts that it is a piece of.

    Raises:
        DataError: as `read_items`.
    """
    if _is_hub(name):
        yield Piece(split), [_hub_part(name, split, config)]
        return
    for piece in pieces(split):
        if is_gym(name):
            yield piece, [_gym_part(name)]
        else:
            yield piece, list(_file_parts(_files(name, piece.split)))


def _file_parts(files: list[str]) -> Iterator[Part]:
    readers = [reader_of(file) for file in files]
    for _, group in groupby(zip(files, readers, strict=True), key=_together):
        names, (reader, *_) = zip(*group, strict=True)
        yield Part(names, reader, reader.load(names))


def _together(read: tuple[str, Reader]) -> object:
    """Tell files that one call reads: those of one type, but an array of JSON by itself."""
    file, reader = read
    return reader if suffix(file) != ".json" else file


def _files(name: str, split: str) -> list[str]:
    """Return the files that a name stands for: itself, those of a folder or of a pattern."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _files_in(path, split)
    if path.exists():
        return [str(path)]
    found = glob.glob(str(path), recursive=True)  # noqa: PTH207  # takes absolute patterns as well
    files = sorted(name for name in found if Path(name).is_file())
    if files:
        return files
    raise DataError(f"{path}: No such file or directory")


def _files_in(folder: Path, split: str) -> list[str]:
    named = re.compile(rf"{re.escape(split)}([-_.].*)?\.[^.]+")
    files = (path for path in folder.iterdir() if suffix(path.name) in READERS)
    found = sorted(str(path) for path in files if named.fullmatch(path.name))
    if not found:
        raise DataError(
            f"{folder}: no file {split}.* of type {', '.join(READERS)}; give files of other names "
            f"as a pattern: '{folder}/*.jsonl'"
        )
    return found


def _is_hub(name: str) -> bool:
    here = Path(name).expanduser().exists() or glob.has_magic(name)
    return not (is_gym(name) or here or suffix(name) in READERS)


def _hub_part(name: str, split: str, config: str | None) -> Part:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        rows = load_dataset(name, config, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"data set {name!r} is neither a file or folder here nor readable from the hub: {error}"
        ) from error
    return Part((f"{name} ({split})",), Reader(_nothing, without_nulls, numbered), rows)


def _gym_part(name: str) -> Part:
    from datasets import Dataset

    # Entries as JSON: those of a generator differ in their fields.
    rows = Dataset.from_list([{**row, "entry": json.dumps(row["entry"])} for row in gym_rows(name)])
    return Part((name,), Reader(_nothing, _gym_row, numbered), rows)


def _gym_row(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "entry": json.loads(row["entry"])}


def _nothing(_files: Sequence[str]) -> Dataset:
    raise NotImplementedError("has no files")
