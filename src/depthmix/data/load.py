"""Load rows for training or evaluation: local files, the hub or a generator, every row checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from depthmix.data.checked import (
    converted_items,
    converted_part,
    index_of,
    nulls,
    require_no_problem,
)
from depthmix.data.fields import Row
from depthmix.data.files import Item, Part, read_items, read_parts
from depthmix.data.formats import (
    EXTRAS,
    FORMATS,
    Columns,
    Format,
    Purpose,
    Shape,
    conversational,
    formats_for,
    made_columns,
    recognise,
    required,
    shape_of,
)
from depthmix.data.questions import Question
from depthmix.data.splits import Piece, mixed
from depthmix.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Source:
    """What is to be loaded.

    Attributes:
        names: local files (json, jsonl, csv, tsv, parquet, arrow; also compressed), folders with
            `<split>.*`, patterns (`data/*.jsonl`), hub names, `reasoning_gym:...` (see
            `depthmix.data.gym`).
        split: split of a folder or of a hub data set, and slices (`train[:100]`) of all of them.
        config: configuration of a hub data set.
        format: key of `FORMATS`, or auto to tell it from the columns of the first row.
        template: key of `TEMPLATES`, for formats that hold questions; default: the format's own.
        columns: where prompt, completion, messages and text stand.
        weights: of the names, to draw rows by; None: one after another.
        seed: of the drawing.
        purpose: what the rows are read for.
        kept: columns to carry along with a prompt, as JSON.
    """

    names: Sequence[str]
    split: str = "train"
    config: str | None = None
    format: str = "auto"
    template: str | None = None
    columns: Columns = field(default_factory=Columns)
    weights: Sequence[float] | None = None
    seed: int = 0
    purpose: Purpose = "completions"
    kept: tuple[str, ...] = ()


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
    Messages and tools are columns of type Json, which gives numbers of up to 64 bits; `depthmix
    train` takes them from `load_source`, exact.
    The arguments are fields of `Source`; `text_field` is the column of format text.

    Returns:
        The converted rows, and the name of their format.

    Raises:
        DataError: a source is missing or a row is broken; names the file, the line and the field.
    """
    columns = Columns(text=text_field)
    rows, name = load_source(Source(source, split, config, format, template, columns))
    if not conversational(name):
        return rows, name
    from datasets import Json

    for column in rows.column_names:
        rows = rows.cast_column(column, Json())
    return rows, name


def load_source(source: Source) -> tuple[Dataset, str]:
    """Return rows in TRL's columns, and the name of their format; messages and tools as JSON texts.

    Arrow has no type for values of many shapes, and gives every object all keys; a text stays what
    it is. What was converted once is found again in the cache of `datasets`.

    Raises:
        DataError: as `load_data`.
        ConfigError: the sources do not go together.
    """
    loaded = [_load_one(name, source) for name in source.names]
    require_no_problem([pair for one in loaded for pair in one.converted])
    name = _common_format(source, [one.format for one in loaded])
    rows = mixed([one.rows() for one in loaded], source.weights, source.seed)
    written = rows.data.num_rows  # of which a mixture draws
    unused = [n for n in EXTRAS if n in rows.column_names and nulls(rows, n) == written]
    return rows.remove_columns(unused), name


def place_of(row: Row, source: Source) -> str:
    """Return the file and the position of a row that `load_source` has given.

    Of equal rows it is the first one's, which is as good: what is wrong with one is with the other.
    """
    for name in source.names:
        for part, converted in _load_one(name, source).converted:
            index = index_of(converted, row)
            if index is not None:
                return ": ".join(part.place(index))
    raise LookupError("the row is of another source")


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
    items = list(read_items(source, split, config))
    name = _format_of(items[:1], source, format, Columns())
    kind_of_rows = FORMATS[name]
    if kind_of_rows.read is None:
        able = ", ".join(known for known, form in FORMATS.items() if form.read)
        raise DataError(
            f"{', '.join(source)}: rows of format {name} hold no question and answer to score; "
            f"formats that do are {able}"
        )
    return converted_items(items, kind_of_rows.question), kind_of_rows


# One source


@dataclass(frozen=True)
class _Loaded:
    """Rows of one source, converted or with their problems."""

    name: str
    format: str
    shape: Shape
    pieces: list[tuple[Piece, list[tuple[Part, Dataset]]]]

    @property
    def converted(self) -> list[tuple[Part, Dataset]]:
        return [pair for _, pairs in self.pieces for pair in pairs]

    def rows(self) -> Dataset:
        """Return what the split takes of the rows, in TRL's columns alone."""
        from datasets import concatenate_datasets

        taken = []
        for piece, pairs in self.pieces:
            rows = concatenate_datasets([converted for _, converted in pairs])
            taken.append(rows.select(piece.of(len(rows))))
        rows = concatenate_datasets(taken)
        if len(rows) == 0:
            raise DataError(f"{self.name}: the split takes no rows")
        return rows.select_columns(list(made_columns(self.format, self.shape)))


def _load_one(name: str, source: Source) -> _Loaded:
    read = list(read_parts(name, source.split, source.config))
    first = next((item for _, parts in read for part in parts for item in part.items()), None)
    format = _format_of(
        [first] if first else [], [name], source.format, source.columns, source.purpose
    )
    row = first.row if first and isinstance(first.row, dict) else {}
    shape = shape_of(row, format, source.columns, source.purpose, source.kept)
    pieces = [
        (piece, [(part, converted_part(part, format, source.template, shape)) for part in parts])
        for piece, parts in read
    ]
    return _Loaded(name, format, shape, pieces)


def _format_of(
    first: Sequence[Item],
    source: Sequence[str],
    format: str,
    columns: Columns,
    purpose: Purpose = "completions",
) -> str:
    if not first:
        raise DataError(f"{', '.join(source)}: there are no rows")
    if format != "auto":
        return format
    row = first[0].row
    if isinstance(row, DataError):
        raise DataError(f"{': '.join(first[0].place())}: {row}")
    name = recognise(row, columns, purpose)
    if name is not None:
        return name
    found = ", ".join(map(str, row)) if isinstance(row, dict) else ""
    expected = dict.fromkeys(" + ".join(required(name, columns)) for name in formats_for(purpose))
    raise DataError(
        f"{': '.join(first[0].place())}: the columns {found or '(none)'} "
        f"are of no known format: expected {'; '.join(expected)}"
    )


def _common_format(source: Source, formats: list[str]) -> str:
    """Return the format that is recorded, by which the tuned model is prompted later."""
    prompts = {(FORMATS[name].made, source.template or FORMATS[name].template) for name in formats}
    if len(prompts) > 1:
        named = ", ".join(f"{n} is {f}" for n, f in zip(source.names, formats, strict=True))
        raise ConfigError(
            f"dataset: the sources would be prompted in different ways ({named}): choose one "
            "dataset_template for questions, or tune on messages alone"
        )
    return formats[0]
