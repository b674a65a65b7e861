"""`StateStore`: hidden states of rows on disk, by the digest of the row.

A folder holds segments, each a pair of files: `NAME.states`, the states one after the other, and
`NAME.index`, a safetensors file that says where each row's are. A process writes a segment of its
own, whose index appears, by renaming, once the states are on disk: what a crash leaves is a segment
without an index, which nobody reads. Several processes and runs can share a folder. The room for a
segment is taken from the disk before it is mapped: writing to a mapped hole of a full disk would
kill the process.
"""

from __future__ import annotations

import mmap
import os
import uuid
from contextlib import suppress
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from depthmix.cache.folder import is_cache, make_cache, remove_cache
from depthmix.files import allocate, write_errors

DIGEST_BYTES = 16


class StateStore:
    """States of rows, each (tokens, width), in `dtype`.

    Args:
        folder: where the segments are; made when the first row is added.
        width: of a state.
        dtype: of a state.
        capacity: tokens that this process may add; beyond it, rows are not kept.
    """

    def __init__(self, folder: Path, width: int, dtype: torch.dtype, capacity: int) -> None:
        self.dtype = dtype
        self._width = width
        self._row_of: dict[bytes, tuple[Tensor, int, int]] = {}
        for index in sorted(folder.glob("*.index")):
            with suppress(OSError, ValueError, SafetensorError):  # torn or half removed: not known
                self._read_segment(index)
        self._capacity = capacity
        self._path = folder / f"{uuid.uuid4().hex}.states"
        self._memory: mmap.mmap | None = None
        self._own: Tensor | None = None
        self._used = 0
        self._added: dict[bytes, tuple[int, int]] = {}

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._row_of

    def __len__(self) -> int:
        return len(self._row_of)

    @property
    def tokens(self) -> int:
        """Tokens whose states are known."""
        return sum(count for _, _, count in self._row_of.values())

    def get(self, digest: bytes) -> Float[Tensor, "t d"]:
        """Return the states of a row, memory-mapped."""
        segment, start, count = self._row_of[digest]
        return segment[start : start + count]

    def add(self, digest: bytes, states: Float[Tensor, "t d"]) -> None:
        """Keep the states of a row, if there is room and it is not kept already.

        Raises:
            OSError: the disk has no room. Nothing of this process stays there, and from then on
                rows are not kept.
        """
        count = len(states)
        if digest in self._row_of or self._used + count > self._capacity:
            return
        own = self._segment()
        own[self._used : self._used + count].copy_(states)
        self._row_of[digest] = (own, self._used, count)
        self._added[digest] = (self._used, count)
        self._used += count

    def save(self) -> None:
        """Make what was added last: flush it, then let its index appear.

        Raises:
            OSError: it cannot be written.
        """
        if self._memory is None or not self._added:
            return
        self._memory.flush()
        index = {
            "digests": torch.frombuffer(bytearray(b"".join(self._added)), dtype=torch.uint8),
            "places": torch.tensor(list(self._added.values()), dtype=torch.int64),
        }
        temporary = self._path.with_suffix(".tmp")
        with write_errors():
            save_file(index, temporary, metadata={"states": self._path.name})
        temporary.replace(self._path.with_suffix(".index"))

    def close(self) -> None:
        """Save, and cut the file to what is used.

        Raises:
            OSError: it cannot be written; nothing of this process stays on disk.
        """
        try:
            self.save()
            if self._memory is not None and self._path.exists():
                os.truncate(self._path, max(self._used, 1) * self.bytes_a_token)
        except OSError:
            self._discard()
            raise

    def _discard(self) -> None:
        """Take what this process wrote off the disk, and keep nothing more."""
        for suffix in (".states", ".tmp", ".index"):
            self._path.with_suffix(suffix).unlink(missing_ok=True)
        for digest in self._added:
            del self._row_of[digest]
        self._memory, self._own, self._added, self._capacity = None, None, {}, 0
        folder = self._path.parent
        if is_cache(folder) and not any(folder.glob("*.states")):
            remove_cache(folder)

    @property
    def bytes_a_token(self) -> int:
        """Bytes that the states of one token take."""
        return self._width * self.dtype.itemsize

    def _segment(self) -> Tensor:
        """Return the segment to write to, made on first use."""
        if self._own is None:
            size = self._capacity * self.bytes_a_token
            try:
                make_cache(self._path.parent)
                with self._path.open("wb+") as file:
                    allocate(file.fileno(), size)
                    self._memory = mmap.mmap(file.fileno(), size)
            except OSError:
                self._discard()
                raise
            self._own = self._as_tensor(self._memory)
        return self._own

    def _read_segment(self, index: Path) -> None:
        with safe_open(index, framework="pt") as file:
            digests: bytes = file.get_tensor("digests").numpy().tobytes()
            places = file.get_tensor("places").tolist()
        with index.with_suffix(".states").open("rb") as states:
            memory = mmap.mmap(states.fileno(), 0, access=mmap.ACCESS_COPY)
        segment = self._as_tensor(memory)
        for i, (start, count) in enumerate(places):
            digest = digests[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES]
            self._row_of[digest] = (segment, start, count)

    def _as_tensor(self, memory: mmap.mmap) -> Tensor:
        return torch.frombuffer(memory, dtype=self.dtype).view(-1, self._width)
