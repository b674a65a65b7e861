"""A segment: states of rows one after the other in a file, and an index that says whose they are.

`NAME.states` is written through a map of memory, by one process, which holds a lock on it. The room
is taken from the disk before it is mapped: writing to a mapped hole of a full disk would kill the
process. `NAME.index`, a safetensors file, appears by renaming once the states that it names are on
disk. A file without a lock and without an index was left by a process that was killed.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import uuid
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from depthmix.cache.folder import make_cache
from depthmix.cache.keys import DIGEST_BYTES
from depthmix.files import allocate, write_errors

Places = dict[bytes, tuple[int, int]]  # of a row: its first token's place in the file, its tokens


class Mapped:
    """The states of a file in memory.

    Attributes:
        states: (tokens, width).
    """

    def __init__(self, memory: mmap.mmap, width: int, dtype: torch.dtype) -> None:
        tokens = len(memory) // (width * dtype.itemsize)
        flat = torch.frombuffer(memory, dtype=dtype, count=tokens * width)
        self.states = flat.view(tokens, width)
        self._memory, self._bytes_a_token = memory, width * dtype.itemsize

    @classmethod
    def read(cls, path: Path, width: int, dtype: torch.dtype) -> Mapped:
        """Map the states of a segment that is there."""
        with path.open("rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        return cls(memory, width, dtype)

    def read_ahead(self, start: int, count: int) -> None:
        """Have the system read the states of some tokens from the disk, without waiting for it."""
        first, last = start * self._bytes_a_token, (start + count) * self._bytes_a_token
        first -= first % mmap.PAGESIZE
        self._memory.madvise(mmap.MADV_WILLNEED, first, last - first)


class Segment:
    """A segment that this process writes.

    Args:
        folder: of the cache; made if it is not there.
        width: of a state.
        dtype: of a state.
        capacity: tokens that there is to be room for.

    Raises:
        OSError: the disk has no room; nothing of the segment stays there.
    """

    def __init__(self, folder: Path, width: int, dtype: torch.dtype, capacity: int) -> None:
        self._path = folder / f"{uuid.uuid4().hex}.states"
        self._bytes_a_token = width * dtype.itemsize
        self.places: Places = {}
        self.used, self.capacity = 0, capacity
        self._saved = 0
        make_cache(folder)
        temporary = self._path.with_suffix(".tmp")  # until it is locked
        self._file = temporary.open("wb+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            size = capacity * self._bytes_a_token
            allocate(self._file.fileno(), size)
            self.mapped = Mapped(mmap.mmap(self._file.fileno(), size), width, dtype)
            temporary.rename(self._path)
        except OSError:
            self._file.close()
            temporary.unlink(missing_ok=True)
            raise

    @property
    def unsaved(self) -> bool:
        """Whether rows were added that no index names."""
        return len(self.places) > self._saved

    def add(self, digest: bytes, states: Tensor) -> None:
        """Write the states of a row, for which there must be room."""
        self.mapped.states[self.used : self.used + len(states)].copy_(states)
        self.places[digest] = (self.used, len(states))
        self.used += len(states)

    def save(self) -> None:
        """Make what was added last, and be seen by other processes. Waits for the disk.

        Raises:
            OSError: it cannot be written.
        """
        places = dict(self.places)  # rows are added while this waits
        if len(places) == self._saved:
            return
        os.fsync(self._file.fileno())
        index = {
            "digests": torch.frombuffer(bytearray(b"".join(places)), dtype=torch.uint8),
            "places": torch.tensor(list(places.values()), dtype=torch.int64),
        }
        temporary = self._path.with_suffix(".tmp")
        with write_errors():
            save_file(index, temporary)
        temporary.replace(self._path.with_suffix(".index"))
        self._saved = len(places)

    def close(self) -> None:
        """Save, and cut the file to what is used.

        Raises:
            OSError: it cannot be written; nothing of the segment stays on disk.
        """
        try:
            self.save()
            self._file.truncate(self.used * self._bytes_a_token)
        except OSError:
            self.discard()
            raise
        self._release()

    def discard(self) -> None:
        """Take the segment off the disk."""
        for suffix in (".states", ".tmp", ".index"):
            self._path.with_suffix(suffix).unlink(missing_ok=True)
        self._release()

    def _release(self) -> None:
        fcntl.flock(self._file, fcntl.LOCK_UN)  # for copies of this process too (data workers)
        self._file.close()


def read_index(index: Path) -> Places:
    """Return where the rows of a segment are; none if the index is torn or gone."""
    with suppress(OSError, ValueError, SafetensorError), safe_open(index, framework="pt") as file:
        digests: bytes = file.get_tensor("digests").numpy().tobytes()
        places = file.get_tensor("places").tolist()
        return {
            digests[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES]: (start, count)
            for i, (start, count) in enumerate(places)
        }
    return {}


def sweep(folder: Path, bytes_a_token: int) -> None:
    """Give back the room that processes which were killed had taken."""
    for path in folder.glob("*.states"):
        with suppress(OSError), path.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an OSError: it is being written
            index = path.with_suffix(".index")
            if not index.exists():
                path.unlink()
                continue
            used = max((start + count for start, count in read_index(index).values()), default=0)
            if used and path.stat().st_size > used * bytes_a_token:
                file.truncate(used * bytes_a_token)
