"""Calling the readers of `datasets`, and what is said when a file cannot be read."""

from __future__ import annotations

import glob
import gzip
import logging
import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmix.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")


def suffix(name: str) -> str:
    """Return the type of a file: its suffix, that of a compression left out."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


@contextmanager
def opened_file(file: str, mode: str, **options: Any) -> Iterator[Any]:
    """Open a file, a compressed one as what is in it.

    Raises:
        DataError: it is not compressed as its name says, or cut off.
    """
    import fsspec  # type: ignore[import-untyped]

    try:
        with fsspec.open(file, mode, compression="infer", **options) as opened:
            yield opened
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise DataError(f"{file}: a broken archive: {error}") from error


def loaded(builder: str, files: Sequence[str], **options: Any) -> Dataset:
    """Load files of one type.

    Raises:
        DataError: one cannot be read; names it, and the line where that is known.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError

    pattern = [glob.escape(str(Path(file).absolute())) for file in files]
    try:
        with _silent():
            return datasets.load_dataset(builder, data_files=pattern, split="train", **options)
    except (DatasetGenerationError, ValueError, OSError) as error:
        if isinstance(error, OSError):
            raise DataError(f"{files[0]}: {error.strerror or error}") from error
        if "corresponds to no data" in str(error):
            features = options.get("features", {})
            return datasets.Dataset.from_dict({name: [] for name in features}, features or None)
        if len(files) > 1:
            for file in files:  # which one it is
                loaded(builder, [file], **options)
            raise DataError(
                f"{files[0]} and {len(files) - 1} more: their columns differ; give them one by "
                "one, as several sources"
            ) from error
        cause = error.__cause__ or error
        raise DataError(f"{files[0]}: {_problem(builder, files[0], cause)}") from error


@contextmanager
def _silent() -> Iterator[None]:
    """Keep `datasets` from logging what is raised as an error of ours."""
    import datasets

    before = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(before)


def _problem(builder: str, file: str, error: BaseException) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"{_undecodable_line(file)}not UTF-8"
    return f"cannot be read as {builder}: {error}"


def _undecodable_line(file: str) -> str:
    with opened_file(file, "rb") as opened:
        for number, line in enumerate(opened, 1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f"line {number}: "
    return ""
