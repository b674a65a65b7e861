"""Training data: local files or the hub, any of the usual row formats, every row checked first.

The result is what TRL takes: prompt and completion, messages, or text. TRL adds the end-of-sequence
token to a completion and to a text, where it is supervised.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from depthmix.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_SHOWN_PROBLEMS = 5


def load_data(
    source: Sequence[str],
    *,
    split: str = "train",
    config: str | None = None,
    format: str = "auto",
    text_field: str = "text",
) -> tuple[Dataset, str]:
    """Load, check and convert the rows of files, folders or a hub data set.

    Args:
        source: local json, jsonl, csv or parquet files, folders with `<split>.*`, or one hub name.
        split: split of a folder or of the hub data set.
        config: configuration of the hub data set.
        format: key of `FORMATS`, or auto to tell it from the columns of the first row.
        text_field: the column of format text.

    Returns:
        The converted rows, and the name of their format.

    Raises:
        DataError: a source is missing or a row is broken; names the file, the line and the field.
    """
    rows = _items(source, split, config)
    first = next(rows, None)
    if first is None:
        raise DataError(f"{', '.join(source)}: there are no rows")
    if format == "auto":
        format = _recognise(first, text_field)
    convert = FORMATS[format][1] if format != "text" else _text_converter(text_field)
    from datasets import Dataset

    return Dataset.from_list(_converted(chain([first], rows), convert)), format


def conversational(format: str) -> bool:
    """Whether rows of this format need the tokenizer's chat template."""
    return format in ("messages", "chat_completion")


def prompt_for(text: str, format: str) -> str:
    """Return the prompt that rows of this format would have for `text`, to generate with."""
    if format == "alpaca":
        return alpaca_prompt(text)
    return question_prompt(text) if format == "question" else text


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """Return the prompt of Stanford Alpaca, which LLM-Adapters uses too."""
    context = ", paired with an input that provides further context" if input else ""
    given = f"### Input:\n{input}\n\n" if input else ""
    return (
        f"Below is an instruction that describes a task{context}. Write a response that "
        "appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n{given}### Response:\n"
    )


def question_prompt(question: str) -> str:
    """Return the prompt that evaluation harnesses use for GSM8K."""
    return f"Question: {question}\nAnswer:"


Row = dict[str, Any]


class _Item(NamedTuple):
    """A row as it was read, and where; a line that cannot be read is a DataError."""

    source: str
    position: str  # "line 3", or "row 3" where lines say nothing
    row: Any


# Formats: the columns that tell one, and what turns a row into TRL's columns


def _alpaca(row: Row) -> Row:
    instruction = _text(row, "instruction").strip()
    context = _text(row, "input").strip() if row.get("input") else ""
    # The prompt ends with a line break: a blank before the answer would be one token with it.
    completion = _text(row, "output").strip()
    return {"prompt": alpaca_prompt(instruction, context), "completion": completion}


def _question(row: Row) -> Row:
    answer = re.sub(r"<<.*?>>", "", _text(row, "answer")).strip()
    return {"prompt": question_prompt(_text(row, "question").strip()), "completion": f" {answer}"}


def _prompt_completion(row: Row) -> Row:
    return {
        "prompt": _text(row, "prompt", may_be_empty=True),
        "completion": _text(row, "completion"),
    }


def _chat_completion(row: Row) -> Row:
    return {
        "prompt": _messages(row, "prompt"),
        "completion": _answered(_messages(row, "completion"), "completion"),
        **_tools(row),
    }


def _chat(row: Row) -> Row:
    return {"messages": _answered(_messages(row, "messages"), "messages"), **_tools(row)}


def _text_converter(field: str) -> Callable[[Row], Row]:
    return lambda row: {field: _text(row, field)}


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Row], Row]]] = {
    "messages": (("messages",), _chat),
    "chat_completion": (("prompt", "completion"), _chat_completion),
    "prompt_completion": (("prompt", "completion"), _prompt_completion),
    "alpaca": (("instruction", "output"), _alpaca),
    "question": (("question", "answer"), _question),
    "text": (("text",), _text_converter("text")),
}


def _recognise(first: _Item, text_field: str) -> str:
    if isinstance(first.row, DataError):
        raise DataError(f"{first.source}: {first.position}: {first.row}")
    columns = list(first.row) if isinstance(first.row, dict) else []
    for name, (required, _) in FORMATS.items():
        if set((text_field,) if name == "text" else required) <= set(columns):
            if name == "chat_completion" and not isinstance(first.row["prompt"], list):
                continue
            return name
    expected = dict.fromkeys(" + ".join(required) for required, _ in FORMATS.values())
    raise DataError(
        f"{first.source}: {first.position}: the columns {', '.join(map(str, columns)) or '(none)'} "
        f"are of no known format: expected {'; '.join(expected)}"
    )


def _text(row: Row, field: str, *, may_be_empty: bool = False) -> str:
    value = row.get(field)
    if value is None:
        raise DataError(f"field {field} is missing")
    if not isinstance(value, str):
        raise DataError(f"field {field} must be a text, not {_kind(value)}")
    if not value.strip() and not may_be_empty:
        raise DataError(f"field {field} is empty")
    return value


def _messages(row: Row, field: str) -> list[Row]:
    value = row.get(field)
    if value is None:
        raise DataError(f"field {field} is missing")
    if not isinstance(value, list) or not value:
        raise DataError(f"field {field} must be a list of messages, not {_kind(value)}")
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise DataError(f"field {field}: message {number} must be an object")
        try:
            _text(message, "role")
            if not message.get("tool_calls"):
                _text(message, "content", may_be_empty=True)
        except DataError as problem:
            raise DataError(f"field {field}: message {number}: {problem}") from None
    return value


def _answered(messages: list[Row], field: str) -> list[Row]:
    """Require something to learn from: an assistant's message that is not empty."""
    for message in messages:
        if message["role"] == "assistant" and (message.get("content") or message.get("tool_calls")):
            return messages
    raise DataError(f"field {field} holds no answer of the assistant")


def _tools(row: Row) -> Row:
    return {"tools": row["tools"]} if row.get("tools") else {}


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else "null")


def _converted(items: Iterable[_Item], convert: Callable[[Row], Row]) -> list[Row]:
    """Convert every row, or raise the first problems and the number of the others."""
    converted: list[Row] = []
    problems: list[tuple[str, str]] = []
    for source, position, row in items:
        try:
            if isinstance(row, DataError):
                raise row
            if not isinstance(row, dict):
                raise DataError(f"a row must be an object with named fields, not {_kind(row)}")
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


# Sources: readers yield (position, row)


def _items(source: Sequence[str], split: str, config: str | None) -> Iterator[_Item]:
    if len(source) == 1 and not Path(source[0]).exists() and _suffix(source[0]) not in _READERS:
        yield from _hub_items(source[0], split, config)
        return
    for path in chain.from_iterable(_files(Path(name), split) for name in source):
        reader = _READERS.get(_suffix(path.name))
        if reader is None:
            raise DataError(f"{path}: expected a file of type {', '.join(_READERS)}")
        try:
            for position, row in reader(path):
                yield _Item(str(path), position, row)
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


def _hub_items(name: str, split: str, config: str | None) -> Iterator[_Item]:
    from datasets import load_dataset

    try:
        rows = load_dataset(name, config, split=split)
    except (OSError, ValueError) as error:
        raise DataError(
            f"data set {name!r} is neither a file or folder here nor readable from the hub: {error}"
        ) from error
    for position, row in _numbered(rows):
        yield _Item(f"{name} ({split})", position, row)


def _numbered(rows: Iterable[object]) -> Iterator[tuple[str, object]]:
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, object]]]] = {
    ".json": _read_json,
    ".jsonl": _read_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
