"""What a result was made by: the command and the versions of what ran it."""

from __future__ import annotations

import sys
from importlib.metadata import version

PACKAGES = ("depthmix", "torch", "transformers", "peft", "trl")


def versions(*further: str) -> dict[str, str]:
    """Return the versions of `PACKAGES` and of further packages."""
    return {name: version(name) for name in (*PACKAGES, *further)}


def command() -> str:
    """Return the command line of this process."""
    return " ".join(["depthmix", *sys.argv[1:]])
