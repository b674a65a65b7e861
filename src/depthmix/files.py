"""Writing files whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name, then rename: a crash leaves the old file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text if text.endswith("\n") else text + "\n", "utf-8")
    temporary.replace(path)


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
