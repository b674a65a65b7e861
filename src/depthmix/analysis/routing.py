"""Whether the router treats some tokens otherwise than others, and more so than by chance.

seen = observe(model, rows)
groups = groupings(seen, rows, tokenizer)
table = differences(seen.gate, seen.row, groups)     # one line a group and layer
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, Int

from depthmix.analysis.observations import Observations, ObservedRow
from depthmix.analysis.parts_of_speech import parts_of_speech
from depthmix.analysis.permutation import (
    PERMUTATIONS,
    Tested,
    between_rows,
    within_rows,
)
from depthmix.analysis.token_classes import CLASSES, Pieces

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Labels = Sequence[str]
SIGNIFICANT = 0.05
_SURPRISE = ((0.1, "below 0.1 nats"), (1.0, "0.1 to 1 nats"), (3.0, "1 to 3 nats"))
_FREQUENCY = ((2, "once"), (10, "2 to 9 times"), (100, "10 to 99 times"))
_POSITION = (
    (1, "first"),
    (2, "second"),
    (4, "3rd and 4th"),
    (8, "5th to 8th"),
    (16, "9th to 16th"),
)


@dataclass(frozen=True)
class Grouping:
    """One way to tell tokens apart.

    Attributes:
        name: what of a token it goes by.
        labels: (n,) the group of every token; empty for one that is left out.
        order: the groups, in the order in which they are shown.
        of_rows: whether all tokens of a row are of one group.
    """

    name: str
    labels: Labels
    order: tuple[str, ...]
    of_rows: bool = False


@dataclass(frozen=True)
class Difference:
    """How the tokens of one group are routed to one layer.

    Attributes:
        grouping: name of the grouping.
        group: name of the group.
        layer: place in the gate, from 0.
        tokens: of the group.
        weight: mean weight of the layer over them.
        difference: mean over rows of (mean weight in the group - mean weight of the row's other
            tokens); of a grouping of rows, the group's rows less the other rows.
        rows: rows that have tokens of the group, and others.
        p: chance of as rare a difference among all tests of the table, were there none; NaN where
            there are too few rows.
    """

    grouping: str
    group: str
    layer: int
    tokens: int
    weight: float
    difference: float
    rows: int
    p: float

    @property
    def is_real(self) -> bool:
        """Whether it is more than chance, at 0.05 for the whole table."""
        return self.p < SIGNIFICANT


def groupings(
    seen: Observations,
    rows: Sequence[ObservedRow],
    tokenizer: PreTrainedTokenizerBase,
    tagger: Any = None,
) -> list[Grouping]:
    """Return the ways in which a report tells tokens apart, each by the token that is predicted.

    Class, position, frequency and surprise are looked at among the tokens that are learned, and
    class among the others as well, so that no difference is one between prompt and completion.

    Args:
        seen: what was seen of the tokens.
        rows: the rows that they are of.
        tokenizer: of the model.
        tagger: a pipeline of spaCy, for parts of speech.
    """
    learned = seen.supervised
    pieces = Pieces(tokenizer)
    kinds_of_row = {place: pieces.kinds(rows[place].ids) for place in set(seen.row.tolist())}
    kinds = [kinds_of_row[r][t] for r, t in zip(seen.row, seen.position, strict=True)]
    frequency = np.unique(seen.token, return_inverse=True, return_counts=True)
    counts = frequency[2][frequency[1]]
    sources = [rows[place].source for place in seen.row]
    found = [
        Grouping("part", _named(learned, "completion", "prompt"), ("prompt", "completion")),
        Grouping("token class", _only(kinds, learned), CLASSES),
        Grouping("token class in prompts", _only(kinds, ~learned), CLASSES),
        _binned("position in the completion", _places(seen), _POSITION, "later", learned),
        _binned("frequency among these rows", counts, _FREQUENCY, "100 times or more", learned),
        _binned("surprise", seen.surprise, _SURPRISE, "3 nats or more", learned),
    ]
    if tagger is not None:
        found += _by_part_of_speech(seen, rows, pieces, tagger)
    names = tuple(dict.fromkeys(sources))
    if len(names) > 1:
        found.append(Grouping("data set", _only(sources, learned), names, of_rows=True))
    return [grouping for grouping in found if len(set(grouping.labels) - {""}) > 1]


def _by_part_of_speech(
    seen: Observations, rows: Sequence[ObservedRow], pieces: Pieces, tagger: Any
) -> list[Grouping]:
    tags = {
        place: parts_of_speech([pieces[token] for token in rows[place].ids], tagger)
        for place in set(seen.row.tolist())
    }
    labels = [tags[r][t] for r, t in zip(seen.row, seen.position, strict=True)]
    return [
        grouped_by("part of speech", _only(labels, seen.supervised)),
        grouped_by("part of speech in prompts", _only(labels, ~seen.supervised)),
    ]


def differences(
    gate: Float[np.ndarray, "n k"],
    row: Int[np.ndarray, " n"],
    groups: Sequence[Grouping],
    permutations: int = PERMUTATIONS,
    seed: int = 0,
) -> list[Difference]:
    """Compare the mean weights of groups of tokens, each with a test against chance.

    Args:
        gate: weights of every token; of a classifier that pools its tokens, of every row.
        row: the row of each; tokens of one row are not taken to be independent.
        groups: the groups.
        permutations: of a test; see `depthmix.analysis.permutation`.
        seed: of the permutations.

    Returns:
        A line for each group and layer. All tests within rows are corrected as one family, and
        those of each grouping of rows as another.
    """
    _, place = np.unique(row, return_inverse=True)
    within = [(g, name) for g in groups if not g.of_rows for name in _present(g)]
    lines: dict[tuple[str, str], list[Tested]] = {}
    if within:
        cells = [_within(gate, place, *_members(g, name)) for g, name in within]
        tested = within_rows(np.concatenate(cells, axis=1), permutations, seed)
        width = gate.shape[1]
        for i, (g, name) in enumerate(within):
            lines[g.name, name] = tested[i * width : (i + 1) * width]
    for g in groups:
        if g.of_rows:
            lines |= _between(gate, place, g, permutations, seed)
    return [
        line
        for g in groups
        for name in _present(g)
        for line in _lines(g, name, gate, lines[g.name, name])
    ]


def _lines(
    g: Grouping, name: str, gate: Float[np.ndarray, "n k"], tested: Sequence[Tested]
) -> list[Difference]:
    member, _ = _members(g, name)
    weights = gate[member].mean(axis=0)
    return [
        Difference(
            g.name, name, layer, int(member.sum()), float(weights[layer]), t.difference, t.rows, t.p
        )
        for layer, t in enumerate(tested)
    ]


def _within(
    gate: Float[np.ndarray, "n k"],
    place: Int[np.ndarray, " n"],
    member: Bool[np.ndarray, " n"],
    others: Bool[np.ndarray, " n"],
) -> Float[np.ndarray, "r k"]:
    """Return each row's mean weights in the group less those of its other tokens."""
    gaps: np.ndarray = _row_means(gate, place, member) - _row_means(gate, place, others)
    return gaps


def _row_means(
    gate: Float[np.ndarray, "n k"], place: Int[np.ndarray, " n"], chosen: Bool[np.ndarray, " n"]
) -> Float[np.ndarray, "r k"]:
    """Return the mean weights of each row's chosen tokens; NaN where it has none."""
    rows = int(place.max()) + 1
    count = np.bincount(place[chosen], minlength=rows)[:, None]
    columns = [
        np.bincount(place[chosen], weights=column[chosen], minlength=rows) for column in gate.T
    ]
    means: np.ndarray = np.stack(columns, axis=1) / np.where(count, count, np.nan)
    return means


def _between(
    gate: Float[np.ndarray, "n k"],
    place: Int[np.ndarray, " n"],
    g: Grouping,
    permutations: int,
    seed: int,
) -> dict[tuple[str, str], list[Tested]]:
    labels = np.array(g.labels)
    means = _row_means(gate, place, labels != "")
    names = _present(g)
    groups = [np.bincount(place[labels == name], minlength=len(means)) > 0 for name in names]
    there = ~np.isnan(means[:, 0])
    tested = between_rows(means[there], [group[there] for group in groups], permutations, seed)
    return {(g.name, name): results for name, results in zip(names, tested, strict=True)}


def _present(g: Grouping) -> list[str]:
    return [name for name in g.order if name in set(g.labels)]


def _members(g: Grouping, name: str) -> tuple[Bool[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """Return which tokens are of a group, and which of the others of its grouping."""
    labels = np.array(g.labels)
    return labels == name, (labels != name) & (labels != "")


def _named(chosen: Bool[np.ndarray, " n"], yes: str, no: str) -> list[str]:
    return [yes if value else no for value in chosen]


def _only(labels: Labels, chosen: Bool[np.ndarray, " n"]) -> list[str]:
    return [label if wanted else "" for label, wanted in zip(labels, chosen, strict=True)]


def _binned(
    name: str,
    values: np.ndarray,
    limits: Sequence[tuple[int | float, str]],
    last: str,
    chosen: Bool[np.ndarray, " n"],
) -> Grouping:
    """Group numbers by upper limits, each with the name of what is below it."""
    names = [*(label for _, label in limits), last]
    bins = np.searchsorted([limit for limit, _ in limits], values, side="right")
    return Grouping(name, _only([names[b] for b in bins], chosen), tuple(names))


def _places(seen: Observations) -> Int[np.ndarray, " n"]:
    """Return how many supervised tokens of its row stand before each token."""
    before = np.concatenate([[0], np.cumsum(seen.supervised)[:-1]])
    first = np.concatenate([[True], np.diff(seen.row) != 0])
    places: np.ndarray = before - np.maximum.accumulate(np.where(first, before, 0))
    return places


def grouped_by(name: str, labels: Labels, of_rows: bool = False) -> Grouping:
    """Return a grouping by labels of your own, one a token; empty where one is left out.

    Example::

        differences(gates, rows, [grouped_by("label", labels, of_rows=True)])
    """
    return Grouping(name, labels, tuple(dict.fromkeys(label for label in labels if label)), of_rows)
