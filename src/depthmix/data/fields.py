"""Fields of a row: what they must hold, and what is said when they do not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from depthmix.errors import DataError

Row = dict[str, Any]


def text(row: Row, field: str, *, may_be_empty: bool = False) -> str:
    """Return a text field of a row; a `DataError` names what is wrong with it."""
    value = row.get(field)
    if value is None:
        raise DataError(f"field {field} is missing")
    if not isinstance(value, str):
        raise DataError(f"field {field} must be a text, not {kind(value)}")
    if not value.strip() and not may_be_empty:
        raise DataError(f"field {field} is empty")
    require_whole_characters(value, field)
    return value


def messages_of(row: Row, field: str) -> list[Any]:
    """Return a field that holds a list of messages; a `DataError` says why it does not."""
    value = row.get(field)
    if value is None:
        raise DataError(f"field {field} is missing")
    if not isinstance(value, list) or not value:
        raise DataError(f"field {field} must be a list of messages, not {kind(value)}")
    return value


def as_json(value: Any, field: str) -> str:
    """Return a value as JSON, numbers and the order of keys as they were.

    Raises:
        DataError: JSON or UTF-8 cannot say it.
    """
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise DataError(f"field {field} holds NaN or an infinite number") from None
    except (TypeError, RecursionError) as error:
        raise DataError(f"field {field} cannot be written as JSON: {error}") from None
    require_whole_characters(written, field)
    return written


def require_whole_characters(value: str, field: str) -> None:
    """Raise a `DataError` for half of a surrogate pair, which is no character of UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise DataError(
            f"field {field} holds half of a surrogate pair ({half}), as where an emoji was cut"
        ) from None


def common_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many characters, or tokens, two sequences begin with in common."""
    shorter = min(len(one), len(other))
    if one[:shorter] == other[:shorter]:
        return shorter
    pairs = enumerate(zip(one, other, strict=False))
    return next(number for number, (mine, its) in pairs if mine != its)


def kind(value: object) -> str:
    """Say in JSON's words what a value is."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else "null")
