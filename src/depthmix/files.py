"""Writing files whole or not at all."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from depthmix.errors import ConfigError


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, then rename: a crash leaves the old file or none."""
    write_bytes(path, (text if text.endswith("\n") else text + "\n").encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write as `write_text` does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write into, which takes its name at the end of the block, or not at all.

    Raises:
        ConfigError: the folder holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty")
    staging = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield staging
        if folder.exists():
            folder.rmdir()
        staging.replace(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def allocate(descriptor: int, size: int) -> None:
    """Give a new file a size, with the room for it taken from the disk.

    Raises:
        OSError: there is no such room, or a quota is used up.
    """
    if sys.platform == "darwin":  # has no such call
        zeros = bytes(2**20)
        for start in range(0, size, len(zeros)):
            os.pwrite(descriptor, zeros[: size - start], start)
    else:
        os.posix_fallocate(descriptor, 0, size)


@contextmanager
def write_errors() -> Iterator[None]:
    """Turn what safetensors and torch raise where a file cannot be written into an OSError.

    Raises:
        OSError: a checkpoint could not be written.
    """
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise
        raise OSError(f"a checkpoint could not be written, is the disk full? {error}") from error
