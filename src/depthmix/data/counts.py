"""How long tokenised rows are, how much of them is supervised, and what `max_length` does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from depthmix.data.tokens import IGNORED

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

_AT_ONCE = 10_000


@dataclass(frozen=True)
class TokenCounts:
    """Counts of tokenised rows.

    Attributes:
        lengths: tokens of every row, before anything is cut.
        supervised: supervised tokens of every row, before anything is cut.
        left: supervised tokens of every row that `max_length` leaves.
        max_length: the limit, or None.
    """

    lengths: np.ndarray[Any, Any]
    supervised: np.ndarray[Any, Any]
    left: np.ndarray[Any, Any]
    max_length: int | None

    @property
    def longer(self) -> int:
        """Rows that are longer than the limit."""
        return 0 if self.max_length is None else int((self.lengths > self.max_length).sum())

    @property
    def cut(self) -> int:
        """Rows that are longer than the limit, with something left to learn."""
        limit = self.max_length
        return 0 if limit is None else int(((self.lengths > limit) & (self.left > 0)).sum())

    @property
    def dropped(self) -> int:
        """Rows of which nothing is left to learn."""
        return int((self.left == 0).sum())

    @property
    def share(self) -> float:
        """The share of the tokens that is supervised."""
        return float(self.supervised.sum() / max(self.lengths.sum(), 1))


def count_tokens(rows: Dataset, max_length: int | None, keep_end: bool = False) -> TokenCounts:
    """Count the tokens of rows with `input_ids` and `labels`.

    Args:
        rows: tokenised rows.
        max_length: tokens that a row is cut to, or None.
        keep_end: whether the end of a row is kept, instead of its start.
    """
    import numpy as np

    counted = [
        _counts(table["labels"].combine_chunks(), max_length, keep_end)
        for table in rows.with_format("arrow").iter(_AT_ONCE)
    ]
    lengths, supervised, left = (np.concatenate(column) for column in zip(*counted, strict=True))
    return TokenCounts(lengths, supervised, left, max_length)


def _counts(
    labels: Any, max_length: int | None, keep_end: bool
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return lengths, supervised tokens and those that are left, of an Arrow array of lists."""
    import numpy as np

    lengths = labels.value_lengths().to_numpy()
    ends = np.cumsum(lengths)
    starts = ends - lengths
    before = np.concatenate([[0], np.cumsum(labels.flatten().to_numpy() != IGNORED)])
    supervised = before[ends] - before[starts]
    if max_length is None:
        return lengths, supervised, supervised
    if keep_end:
        return lengths, supervised, before[ends] - before[np.maximum(starts, ends - max_length)]
    return lengths, supervised, before[np.minimum(ends, starts + max_length)] - before[starts]
