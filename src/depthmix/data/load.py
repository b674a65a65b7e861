"""Load rows for training or evaluation: local files, the hub or a generator, every row checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from depthmix.data.code import code_digest
from depthmix.data.fields import Row, as_json, kind
from depthmix.data.files import Item, Part, read_items, read_parts
from depthmix.data.formats import (
    EXTRAS,
    FORMATS,
    Columns,
    Format,
    Question,
    Shape,
    conversational,
    recognise,
    required,
    shape_of,
)
from depthmix.data.splits import Piece, mixed
from depthmix.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

T = TypeVar("T")

_SHOWN_PROBLEMS = 5

# Columns of what `datasets` caches, beside TRL's: a row that is broken is kept with its problem,
# so that all of them are found, and found again in no time.
_INDEX, _PROBLEM = "depthmix_index", "depthmix_problem"


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
    """

    names: Sequence[str]
    split: str = "train"
    config: str | None = None
    format: str = "auto"
    template: str | None = None
    columns: Columns = field(default_factory=Columns)
    weights: Sequence[float] | None = None
    seed: int = 0


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
    _require_no_problem([pair for one in loaded for pair in one.converted])
    name = _common_format(source, [one.format for one in loaded])
    rows = mixed([one.rows(source.columns) for one in loaded], source.weights, source.seed)
    unused = [n for n in EXTRAS if n in rows.column_names and _nulls(rows, n) == len(rows)]
    return rows.remove_columns(unused), name


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
    return _converted(items, kind_of_rows.question), kind_of_rows


# One source


@dataclass(frozen=True)
class _Loaded:
    """Rows of one source, converted or with their problems."""

    name: str
    format: str
    pieces: list[tuple[Piece, list[tuple[Part, Dataset]]]]

    @property
    def converted(self) -> list[tuple[Part, Dataset]]:
        return [pair for _, pairs in self.pieces for pair in pairs]

    def rows(self, columns: Columns) -> Dataset:
        """Return what the split takes of the rows, in TRL's columns alone."""
        from datasets import concatenate_datasets

        taken = []
        for piece, pairs in self.pieces:
            rows = concatenate_datasets([converted for _, converted in pairs])
            taken.append(rows.select(piece.of(len(rows))))
        rows = concatenate_datasets(taken)
        if len(rows) == 0:
            raise DataError(f"{self.name}: the split takes no rows")
        return rows.select_columns(list(_made(self.format, columns)))


def _load_one(name: str, source: Source) -> _Loaded:
    read = list(read_parts(name, source.split, source.config))
    first = next((item for _, parts in read for part in parts for item in part.items()), None)
    format = _format_of([first] if first else [], [name], source.format, source.columns)
    row = first.row if first and isinstance(first.row, dict) else {}
    shape = shape_of(row, format, source.columns)
    pieces = [
        (piece, [(part, _converted_part(part, format, source.template, shape)) for part in parts])
        for piece, parts in read
    ]
    return _Loaded(name, format, pieces)


def _format_of(first: Sequence[Item], source: Sequence[str], format: str, columns: Columns) -> str:
    if not first:
        raise DataError(f"{', '.join(source)}: there are no rows")
    if format != "auto":
        return format
    row = first[0].row
    if isinstance(row, DataError):
        raise DataError(f"{': '.join(first[0].place())}: {row}")
    name = recognise(row, columns)
    if name is not None:
        return name
    found = ", ".join(map(str, row)) if isinstance(row, dict) else ""
    expected = dict.fromkeys(" + ".join(required(name, columns)) for name in FORMATS)
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


def _nulls(rows: Dataset, column: str) -> int:
    return int(rows.data.column(column).null_count)


# Checking and converting, inside the cache of `datasets`


def _made(format: str, columns: Columns) -> tuple[str, ...]:
    """Return the columns of TRL that a format becomes."""
    return FORMATS[format].made or (columns.text,)


def _converted_part(part: Part, format: str, template: str | None, shape: Shape) -> Dataset:
    from datasets import Features, Value

    made = _made(format, shape.columns)
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


# What is said of broken rows


def _require_no_problem(converted: Sequence[tuple[Part, Dataset]]) -> None:
    """Raise the first problems and the number of the others."""
    count = sum(len(rows) - _nulls(rows, _PROBLEM) for _, rows in converted)
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


def _converted(items: Iterable[Item], convert: Callable[[Row], T]) -> list[T]:
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
