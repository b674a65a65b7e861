"""Tests against chance of differences between groups of tokens, corrected for their number.

The tokens of a row depend on one another, so that the unit is the row. What is tested within rows
is each row's own difference between the tokens of a group and its others: were there none, its
sign would be as likely the other one. What is tested between rows is which row is of which group.
The correction is Westfall and Young's (1993, single-step min P): how often a permutation has, in
any of the tests, something as rare as what was found. It holds the chance of any false finding,
however the tests depend on each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

PERMUTATIONS = 9_999
LEAST_ROWS = 6  # of fewer rows no result could be significant: 2 / 2**5 > 0.05
_DIGITS = 7  # below them, differences of weights are rounding
_BLOCK = 500


@dataclass(frozen=True)
class Tested:
    """What a test found.

    Attributes:
        difference: mean over rows of the difference; NaN where no row has one.
        rows: the rows that it was seen in.
        p: chance of finding one as rare among as many tests; NaN where there are too few rows.
    """

    difference: float
    rows: int
    p: float


def within_rows(
    differences: Float[np.ndarray, "r c"], permutations: int = PERMUTATIONS, seed: int = 0
) -> list[Tested]:
    """Test c differences, each seen within up to r rows, by changing the signs of whole rows.

    Args:
        differences: of each row; NaN where a row has none.
        permutations: how many; the least p is 1 / (permutations + 1).
        seed: of their signs.
    """
    values = np.nan_to_num(differences)
    rows = (~np.isnan(differences)).sum(axis=0)
    generator = np.random.default_rng(seed)
    found = [values.sum(axis=0, keepdims=True)]
    for start in range(0, permutations, _BLOCK):
        shape = (min(_BLOCK, permutations - start), len(values))
        found.append(generator.choice([-1.0, 1.0], size=shape) @ values)
    p = _corrected(np.concatenate(found), rows >= LEAST_ROWS)
    means = found[0][0] / np.where(rows, rows, np.nan)
    return [Tested(float(m), int(r), float(q)) for m, r, q in zip(means, rows, p, strict=True)]


def between_rows(
    values: Float[np.ndarray, "r j"],
    groups: Sequence[Bool[np.ndarray, " r"]],
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> list[list[Tested]]:
    """Test of every group of rows whether its j means are those of the other rows.

    Args:
        values: j means of each row.
        groups: which rows are of each group.
        permutations: how many times rows are given to groups anew.
        seed: of these.

    Returns:
        For each group, a result for each of the j.
    """
    member = np.stack([np.asarray(group, dtype=float) for group in groups])
    generator = np.random.default_rng(seed)
    found = [_apart(values, member)]
    for _ in range(permutations):
        found.append(_apart(values, member[:, generator.permutation(len(values))]))
    counts = member.sum(axis=1)
    enough = (np.minimum(counts, len(values) - counts) >= 2) & (len(values) >= LEAST_ROWS)
    p = _corrected(np.stack(found).reshape(len(found), -1), np.repeat(enough, values.shape[1]))
    return [
        [Tested(float(d), int(count), float(q)) for d, q in zip(of_group, ps, strict=True)]
        for of_group, count, ps in zip(found[0], counts, p.reshape(found[0].shape), strict=True)
    ]


def _apart(
    values: Float[np.ndarray, "r j"], member: Float[np.ndarray, "g r"]
) -> Float[np.ndarray, "g j"]:
    """Return how far each group's mean is from that of the other rows."""
    inside = member.sum(axis=1, keepdims=True)
    outside = len(values) - inside
    total = member @ values
    others = (values.sum(axis=0) - total) / np.maximum(outside, 1.0)
    gaps: np.ndarray = total / np.maximum(inside, 1.0) - others
    return gaps


def _corrected(
    statistics: Float[np.ndarray, "b c"], enough: Bool[np.ndarray, " c"]
) -> Float[np.ndarray, " c"]:
    """Return p of c tests, corrected for their number; NaN where there is not enough for one.

    Args:
        statistics: in the first row what was found, in the others what permutations give.
        enough: which tests can be made.
    """
    corrected = np.full(statistics.shape[1], np.nan)
    if not enough.any():
        return corrected
    sizes = np.abs(statistics[:, enough]).round(_DIGITS)
    count = len(sizes)
    reached = np.stack([count - np.searchsorted(np.sort(c), c) for c in sizes.T], axis=1)
    rarest = np.sort(reached.min(axis=1))
    corrected[enough] = np.searchsorted(rarest, reached[0], side="right") / count
    return corrected
