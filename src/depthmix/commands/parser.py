"""The argument parser of every command: argparse, with errors of one line."""

from __future__ import annotations

import argparse
from typing import NoReturn

from depthmix.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` whose errors are a `ConfigError` instead of a usage text.

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

    def error(self, message: str) -> NoReturn:
        """Raise the message, with a pointer to the help."""
        raise ConfigError(f"{message} (see `{self.prog} --help`)")


def _formatter(prog: str) -> argparse.RawDescriptionHelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=32)
