"""`cached_depth`: in training, frozen layers answer with what they gave for the same row before.

The model's own forward runs. Where every row of a batch is known, the first layer of the prefix
answers with the stored states and the others pass them on, so that no architecture needs code of
its own; otherwise the layers run, and what the last of them gives is stored.

    prefix.py   where the cut is, and the digest of what lies below it: the cache's folder
    keys.py     the rows of a batch, and the digest of what they are
    replay.py   the hooks
    check.py    whether the layers may be replayed: a batch is run again in other ways
    store.py    the states on disk, in segments (segment.py) of a folder (folder.py)
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from depthmix.cache.prefix import frozen_prefix
from depthmix.cache.replay import CachedDepth
from depthmix.errors import ConfigError


def default_folder() -> Path:
    """Return where caches go: $DEPTHMIX_CACHE, or the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DEPTHMIX_CACHE") or Path(home) / "depthmix")


@contextmanager
def cached_depth(
    model: nn.Module,
    k: int | None = None,
    tokens: int | None = None,
    folder: Path | None = None,
    dtype: torch.dtype | None = None,
    required: bool = True,
) -> Iterator[CachedDepth]:
    """Train `model` in this block with its frozen layers read from disk where they are known.

    Exact, unless `dtype` is given: the states are those that the layers gave. The first epoch fills
    the cache; later ones, and later runs with the same frozen layers, read it. Forwards with labels
    in evaluation mode are cached as well, others are not. The first batch is run again in some
    other ways, without gradients, to see whether it can be replayed at all.

    Example::

        with cached_depth(model, tokens=total_training_tokens):
            trainer.train()

    Args:
        model: with its first layers frozen (`tuned_layers`, `late_layers_only`, or MoDE alone).
        k: of no effect: the cut is below the lowest layer with a trained parameter, and not above
            the first late layer.
        tokens: tokens of all rows: what may be added to the cache. None: no limit.
        folder: of all caches; default: `default_folder()`.
        dtype: to store the states in, bfloat16 for instance: half the room, and not exact.
        required: where the first batch shows that the layers cannot be replayed, raise; otherwise
            warn, and go on without the cache.

    Raises:
        ConfigError: what the layers give is not the same in every epoch, or the disk is full; in
            the block, at the first batch, what could not be seen before.
    """
    del k
    prefix = frozen_prefix(model)
    cache = CachedDepth(prefix, tokens, folder or default_folder(), dtype, required)
    try:
        if tokens is not None:
            needed = (tokens - cache.store.tokens) * cache.store.bytes_a_token
            _require_space(cache.folder, needed)
        with cache.attached():
            yield cache
    finally:
        cache.close()


def _size(count: int) -> str:
    gibibytes = count / 2**30
    return f"{gibibytes:,.1f} GiB" if gibibytes >= 1 else f"{count / 2**20:.1f} MiB"


def _require_space(folder: Path, needed: int) -> None:
    existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ConfigError(
            f"the states take {_size(needed)}, but {existing} has {_size(free)} free; choose "
            "another folder with cache_dir"
        )
