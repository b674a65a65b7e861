"""Splits as `datasets` writes them (`train`, `train[:5]`, `train[:10%]+test`), mixtures, shares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from depthmix.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Piece:
    """A split or a slice of one.

    Attributes:
        split: name of the split.
        slice: the slice in square brackets, or nothing.
    """

    split: str
    slice: str = ""

    def of(self, rows: int) -> range:
        """Return the indices that the slice takes of that many rows."""
        from datasets import ReadInstruction

        if not self.slice:
            return range(rows)
        instruction = ReadInstruction.from_spec(f"rows{self.slice}")
        taken = instruction.to_absolute({"rows": rows})[0]
        return range(taken.from_ or 0, rows if taken.to is None else taken.to)


def pieces(split: str) -> list[Piece]:
    """Return the pieces of a split.

    Raises:
        DataError: it is none that `datasets` knows.
    """
    from datasets import ReadInstruction

    found = []
    for text in split.split("+"):
        name, bracket, slice_ = text.strip().partition("[")
        try:
            ReadInstruction.from_spec(f"rows{bracket}{slice_}")
        except (ValueError, AssertionError):
            raise DataError(
                f"split {split!r}: expected such as train, train[:100], train[:5%]"
            ) from None
        if not name:
            raise DataError(f"split {split!r} has no name: expected such as train[:100]")
        found.append(Piece(name, bracket + slice_))
    return found


def mixed(sources: Sequence[Dataset], weights: Sequence[float] | None, seed: int) -> Dataset:
    """Return the rows of all sources: one after another, or drawn by weight.

    With weights, a source that ends before every row of the others was drawn begins anew, so that
    no row is left out.

    Raises:
        ConfigError: there are more or fewer weights than sources.
    """
    from datasets import concatenate_datasets, interleave_datasets

    if weights is None:
        return concatenate_datasets(list(sources))
    if len(weights) != len(sources):
        raise ConfigError(
            f"dataset_weights: {len(weights)} weights for {len(sources)} sources in dataset"
        )
    shares = [weight / sum(weights) for weight in weights]
    return interleave_datasets(
        list(sources), probabilities=shares, seed=seed, stopping_strategy="all_exhausted"
    )


def held_out(rows: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Return what is left to train on, and a share drawn for validation.

    Raises:
        ConfigError: one of the two would be empty.
    """
    if not 0 < round(len(rows) * share) < len(rows):
        raise ConfigError(f"validation_split: {share} of {len(rows)} rows leaves one part empty")
    split = rows.train_test_split(test_size=round(len(rows) * share), seed=seed)
    return split["train"], split["test"]
