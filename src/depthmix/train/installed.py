"""Packages and files that an option needs: looked for before the option is used."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from depthmix.errors import ConfigError


def require_package(option: str, package: str) -> None:
    """Raise a ConfigError that says what to install, unless the package is there."""
    if find_spec(package) is None:
        raise ConfigError(f"{option} needs a package: pip install {package.replace('_', '-')}")


def require_file(option: str, value: Any) -> None:
    """Raise a ConfigError unless a value is something else than a path, or a file is there."""
    if isinstance(value, str) and not Path(value).is_file():
        raise ConfigError(f"{option} {value}: No such file or directory")


def require_deepspeed(value: Any) -> None:
    """Look at the option `deepspeed`; transformers keeps half of a configuration it refuses."""
    if value is not None:
        require_package("deepspeed", "deepspeed")
        require_file("deepspeed", value)
