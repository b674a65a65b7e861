"""The folder of one cache: the mark that says it is depthmix's, its size, and how it is removed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from depthmix.files import write_text

# What backup programs know a cache by (https://bford.info/cachedir/), with a line of our own.
MARKER = "CACHEDIR.TAG"
_OURS = "# States of frozen layers, cached by depthmix; `depthmix cache clear` removes this folder."
_TAG = f"Signature: 8a477f597d28d172789f06886806bc55\n{_OURS}\n"

# Everything that depthmix writes into a cache.
_FILES = ("*.states", "*.index", "*.tmp", MARKER)


def make_cache(folder: Path) -> None:
    """Make the folder of a cache, with its mark."""
    if not is_cache(folder):
        write_text(folder / MARKER, _TAG)


def is_cache(folder: Path) -> bool:
    """Whether depthmix made this folder: nothing else is listed, or removed."""
    marker = folder / MARKER
    return marker.is_file() and _OURS in marker.read_text("utf-8", errors="replace")


def cached_bytes(folder: Path) -> Mapping[str, int]:
    """Return the size on disk of every cache in a folder, in bytes."""
    if not folder.is_dir():
        return {}
    return {
        cache.name: sum(file.stat().st_blocks * 512 for file in cache.iterdir())
        for cache in sorted(folder.iterdir())
        if cache.is_dir() and not cache.is_symlink() and is_cache(cache)
    }


def remove_cache(folder: Path) -> list[str]:
    """Remove what depthmix wrote, and the folder if that was all; return what else it holds."""
    for path in [path for pattern in _FILES for path in folder.glob(pattern)]:
        path.unlink()
    others = sorted(path.name for path in folder.iterdir())
    if not others:
        folder.rmdir()
    return others
