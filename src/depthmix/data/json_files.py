"""JSON, read by the reader of text of `datasets`, a line a row, and parsed by Python.

The reader of JSON of `datasets` makes dates of texts that look like one, numbers of texts that
stand beside lists, rounds numbers to ten digits and fills objects with null; a row is to be trained
on as it was written.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from depthmix.data.fields import Row
from depthmix.data.opening import loaded, opened_file
from depthmix.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_TEXT = "text"


def line(_file: str, index: int) -> str:
    """Return the position of a row of a file with a row a line."""
    return f"line {index + 1}"


def load_lines(files: Sequence[str]) -> Dataset:
    """Load files that hold an object a line."""
    from datasets import Features, Value

    features = Features({_TEXT: Value("string")})
    return loaded("text", files, features=features, encoding="utf-8-sig")


def load_array(files: Sequence[str]) -> Dataset:
    """Load one file that holds an array, as a line of JSON a row."""
    lines = load_lines(files)
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


def parse_line(row: Row) -> Any:
    """Return the value that a line holds, or None where it is blank.

    Raises:
        DataError: it holds none.
    """
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


def holds_an_array(file: str) -> bool:
    """Whether a file of JSON begins with an array."""
    with opened_file(file, "rb") as opened:
        return bool(opened.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["))
