"""`StateStore`: hidden states of rows on disk, by the digest of the row.

A folder holds segments (segment.py). A process writes segments of its own and reads all of them;
several processes and runs can share a folder. What one has written is seen by the others some time
later: where a row is not known, new indexes are looked for.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from depthmix.cache.folder import is_cache, remove_cache
from depthmix.cache.segment import Mapped, Segment, read_index, sweep

SEGMENT_BYTES = 256 * 2**20
SAVE_SECONDS = 30.0  # between the indexes of a segment
LOOK_SECONDS = 5.0  # between looks for those of others


class StateStore:
    """States of rows, each (tokens, width), in `dtype`.

    Args:
        folder: where the segments are; made when the first row is added.
        width: of a state.
        dtype: of a state.
        capacity: tokens that this process may add; beyond it, rows are not kept. None: no limit.

    Attributes:
        tokens: whose states are known.
    """

    def __init__(
        self, folder: Path, width: int, dtype: torch.dtype, capacity: int | None = None
    ) -> None:
        self.dtype = dtype
        self.tokens = 0
        self._folder, self._width, self._capacity = folder, width, capacity
        self._row_of: dict[bytes, tuple[Mapped, int, int]] = {}
        self._indexes: dict[Path, int] = {}  # read so far, and when each was written
        self._segment: Segment | None = None
        self._background = ThreadPoolExecutor(1)  # waits for the disk, so that no step does
        self._saving: list[Future[None]] = []
        self._saved_at = time.monotonic()
        sweep(folder, self.bytes_a_token)
        self.look()

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._row_of

    def __len__(self) -> int:
        return len(self._row_of)

    @property
    def bytes_a_token(self) -> int:
        """Bytes that the states of one token take."""
        return self._width * self.dtype.itemsize

    def knows(self, digests: Sequence[bytes]) -> bool:
        """Tell whether all rows are known, to this process or, by now, to another one."""
        self._save_if_due(digests)
        if all(digest in self._row_of for digest in digests):
            return True
        if time.monotonic() - self._looked_at > LOOK_SECONDS:
            self.look()
        return all(digest in self._row_of for digest in digests)

    def get(self, digest: bytes) -> Float[Tensor, "t d"]:
        """Return the states of a row, memory-mapped."""
        mapped, start, count = self._row_of[digest]
        return mapped.states[start : start + count]

    def read_ahead(self, digests: Sequence[bytes]) -> None:
        """Have the system read rows that come next from the disk."""
        for digest in digests:
            if digest in self._row_of:
                mapped, start, count = self._row_of[digest]
                mapped.read_ahead(start, count)

    def add(self, digest: bytes, states: Float[Tensor, "t d"]) -> None:
        """Keep the states of a row, if there is room and it is not kept already.

        Raises:
            OSError: the disk has no room. From then on rows are not kept.
        """
        count = len(states)
        left = self._capacity
        if digest in self._row_of or (left is not None and count > left):
            return
        if self._segment is None or self._segment.used + count > self._segment.capacity:
            self._begin_segment(count)
        assert self._segment is not None
        self._row_of[digest] = (self._segment.mapped, self._segment.used, count)
        self._segment.add(digest, states)
        self.tokens += count
        if left is not None:
            self._capacity = left - count

    def look(self) -> None:
        """Read the indexes that other processes have written since the last look."""
        self._looked_at = time.monotonic()
        for index in sorted(self._folder.glob("*.index")):
            with suppress(OSError, ValueError):  # gone since, or the states are: not known
                written = index.stat().st_mtime_ns
                if self._indexes.get(index) != written:
                    self._read_segment(index)
                    self._indexes[index] = written

    def close(self) -> None:
        """Save, and cut the files to what is used.

        Raises:
            OSError: something cannot be written; what was written whole stays.
        """
        self._finish_segment()
        self._background.shutdown()
        if is_cache(self._folder) and not any(self._folder.glob("*.states")):
            remove_cache(self._folder)
        for saved in self._saving:
            saved.result()

    def _begin_segment(self, count: int) -> None:
        self._finish_segment()
        room = max(count, SEGMENT_BYTES // self.bytes_a_token)
        room = room if self._capacity is None else min(room, self._capacity)
        try:
            self._segment = Segment(self._folder, self._width, self.dtype, room)
        except OSError:
            self._capacity = 0
            raise

    def _finish_segment(self) -> None:
        if self._segment is not None:
            self._saving.append(self._background.submit(self._segment.close))
        self._segment, self._saved_at = None, time.monotonic()

    def _save_if_due(self, digests: Sequence[bytes]) -> None:
        """Let others see the rows of the open segment: now and then, and when an epoch begins."""
        segment, age = self._segment, time.monotonic() - self._saved_at
        if segment is None or not segment.unsaved or age < LOOK_SECONDS:
            return
        if age > SAVE_SECONDS or any(digest in segment.places for digest in digests):
            self._saved_at = time.monotonic()
            self._background.submit(segment.save)  # what fails here fails again in `close`

    def _read_segment(self, index: Path) -> None:
        places = {d: place for d, place in read_index(index).items() if d not in self._row_of}
        if not places:
            return
        mapped = Mapped.read(index.with_suffix(".states"), self._width, self.dtype)
        for digest, (start, count) in places.items():
            if start + count <= len(mapped.states):
                self._row_of[digest] = (mapped, start, count)
                self.tokens += count
