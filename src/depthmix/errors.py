"""The errors that depthmix raises. All are `DepthmixError`, so one `except` catches them."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_SHOWN = 60  # characters of a wrong value


class DepthmixError(Exception):
    """Something is wrong that the user can mend; the message says how."""


class ConfigError(DepthmixError, ValueError):
    """A configuration value is unknown, of the wrong type or out of range."""


class DiscoveryError(DepthmixError, ValueError):
    """The structure of the model could not be established; the message names what was found."""


class CheckpointError(DepthmixError, ValueError):
    """A saved adapter does not fit: a missing, extra or misshapen tensor, or a wrong base model."""


class TrainingError(DepthmixError, RuntimeError):
    """A training set-up in which MoDE would silently learn nothing, or learn wrong."""


class Stopped(DepthmixError):
    """A signal ended training, with a checkpoint; the message says how to go on.

    Args:
        message: what is told.
        signal_number: of the signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.status = 128 + signal_number  # as a shell would give it


class DataError(DepthmixError, ValueError):
    """A data file or row is broken; the message names the file, the line and the field."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `; did you mean NAME?` with the known name nearest to a misspelt one, or nothing.

    Of names about as near, one with the same first word is meant: lora_rank is lora_r rather than
    local_rank.
    """
    names = [other for other in known if not other.startswith("-h")]
    close = difflib.get_close_matches(name, names, n=5) or [
        other for other in names if name in other
    ]
    if not close:
        return ""
    return f"; did you mean {max(close, key=lambda other: _likeness(name, other))}?"


def _likeness(name: str, other: str) -> float:
    ours, theirs = (n.replace("-", "_").strip("_").split("_")[0] for n in (name, other))
    return difflib.SequenceMatcher(None, name, other).ratio() + 0.2 * (ours == theirs)


def shown(value: object) -> str:
    """Return a wrong value for a message: on one line, and no longer than one."""
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} ..."
