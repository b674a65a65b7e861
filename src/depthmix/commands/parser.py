"""The argument parser of every command: argparse, with errors of one line and checked values."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from depthmix.errors import ConfigError, nearest, shown

# What torch and NumPy take as an integer, and as a seed.
MOST_INTEGER = 2**31 - 1
MOST_SEED = 2**32 - 1


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` whose errors are a `ConfigError` instead of a usage text.

    `-` and `_` within an option are the same.

    Args:
        command: name of the sub-command.
        summary: first line of the help.
        examples: text at the end of the help, kept as it stands.
        usage: the usage line without the program's name; argparse writes one where it is None.
    """

    def __init__(self, command: str, summary: str, examples: str, usage: str | None = None) -> None:
        prog = f"depthmix {command}"
        super().__init__(
            prog=prog,
            usage=None if usage is None else f"{prog} {usage}",
            description=summary,
            epilog=examples,
            formatter_class=_formatter,
            allow_abbrev=False,
        )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """Parse; an option that there is not is named with the nearest one that there is."""
        arguments = [self._spelled(argument) for argument in args or ()]
        for argument in arguments:  # before argparse misses a required one, which is misspelt
            flag = argument.partition("=")[0]
            if _is_option(argument) and flag not in self._option_string_actions:
                hint = nearest(flag, self._option_string_actions)
                self.error(f"{flag}: no such option{hint}")
        several = any(a.nargs == "*" and not a.option_strings for a in self._actions)
        parse = self.parse_known_intermixed_args if several else self.parse_known_args
        found, unknown = parse(arguments, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(map(shown, unknown))}")
        return found

    def error(self, message: str) -> NoReturn:
        """Raise the message, with a pointer to the help."""
        message = re.sub("^argument ([^:]+):( must)?", _place, message)
        raise ConfigError(f"{' '.join(message.split())} (see `{self.prog} --help`)")

    def parse_with_train_options(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Return the command's own arguments, and the flags behind them that are `train`'s.

        Raises:
            ConfigError: what is left over does not begin with a flag.
        """
        arguments, options = self.parse_known_args(argv)
        if options and not options[0].startswith("-"):
            raise ConfigError(f"{options[0]}: MODEL and DATA come before the options")
        return arguments, options

    def _spelled(self, argument: str) -> str:
        """Return an option as it is declared, whether it is written with dashes or underscores."""
        flag, equals, value = argument.partition("=")
        dashed = f"--{flag[2:].replace('_', '-')}"
        known = flag.startswith("--") and dashed in self._option_string_actions
        return f"{dashed}{equals}{value}" if known else argument


def _is_option(argument: str) -> bool:
    """Whether argparse takes an argument for an option: what has a blank in it is a value."""
    return argument.startswith("--") and len(argument) > 2 and " " not in argument.partition("=")[0]


# Types of values, for `add_argument(type=...)`


def integer(least: int, most: int = MOST_INTEGER) -> Callable[[str], int]:
    """Return a type: integers from `least` to `most`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            limit = f">= {least}" if value is None or value < least else f"<= {most}"
            raise argparse.ArgumentTypeError(f"must be an integer {limit}, not {shown(text)}")
        return value

    return read


def number(
    least: int | float, most: int | float = math.inf, above: bool = False
) -> Callable[[str], float]:
    """Return a type: finite numbers from `least` (or above it) to `most`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        low_enough = value <= most and value < math.inf
        if not (low_enough and (value > least if above else value >= least)):
            raise argparse.ArgumentTypeError(f"must be {_interval()}, not {shown(text)}")
        return value

    def _interval() -> str:
        if most == math.inf:
            return f"{'>' if above else '>='} {least:g}"
        return f"in {'(' if above else '['}{least:g}, {most:g}]"

    return read


def folder(text: str) -> Path:
    """A type: a folder; `~` is the home folder."""
    path = file(text)
    if path.is_file():
        raise argparse.ArgumentTypeError(f"{text} is a file, not a folder")
    return path


def file(text: str) -> Path:
    """A type: a file to read; `~` is the home folder."""
    if not text.strip() or not _is_unicode(text) or "\0" in text:
        raise argparse.ArgumentTypeError(f"must be a path, not {shown(text)}")
    return Path(text).expanduser()


def require_matplotlib(what: str) -> None:
    """Raise a ConfigError, before any work is done, unless matplotlib is there."""
    if find_spec("matplotlib") is None:
        raise ConfigError(f"{what} needs matplotlib: pip install 'depthmix[plot]'")


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _place(found: re.Match[str]) -> str:
    """Name the option as other errors do: `--k must be`, `--k: expected one argument`."""
    return f"{found[1]}{found[2] or ':'}"


def output_file(text: str) -> Path:
    """A type: a file to write; that it can be is found before there is anything to write."""
    path = file(text)
    if path.is_dir() or any(parent.is_file() for parent in path.parents):
        raise argparse.ArgumentTypeError(f"there can be no file {text}")
    return path


def name_or_folder(text: str) -> str:
    """A type: a folder, or the name of a model on the hub; `~` is the home folder."""
    path = str(file(text))
    return path if text.startswith("~") else text


def _formatter(prog: str) -> argparse.RawDescriptionHelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=32)
