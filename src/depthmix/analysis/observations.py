"""Rows to look at, and what was seen of their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int


@dataclass(frozen=True)
class ObservedRow:
    """A row to look at.

    Attributes:
        ids: its tokens.
        supervised: for each, whether it is one that the model is to learn.
        source: the data set that it is of.
        generated: whether the model wrote what is supervised.
        in_full: whether every layer's predictions of the other tokens are wanted as well.
    """

    ids: Sequence[int]
    supervised: Sequence[bool]
    source: str = ""
    generated: bool = False
    in_full: bool = False


@dataclass(frozen=True)
class Observations:
    """What was seen of n predicted tokens: all of the rows but the first of each.

    A predictor is one of the l layers alone, or, as the last one, the model itself: with MoDE, the
    ensemble. Losses are in nats, layers are counted from 0. Of tokens that are not learned, what
    a layer alone predicts is left out unless their row is wanted in full: NaN, and token -1.

    Attributes:
        layers: the l layers, the last one last.
        late: the k late layers that the gate weighs; none without MoDE.
        row: (n,) place of its row.
        position: (n,) its place in the row.
        token: (n,) the token that stands there, and is to be predicted.
        supervised: (n,) whether it is one that the model is to learn.
        gate: (n, k) weights with which it was predicted.
        loss: (n, l + 1) cross-entropy of each predictor.
        top: (n, l + 1, 3) the likeliest tokens of each predictor, the likeliest first.
        top_probability: (n, l + 1, 3) their probabilities.
    """

    layers: tuple[int, ...]
    late: tuple[int, ...]
    row: Int[np.ndarray, " n"]
    position: Int[np.ndarray, " n"]
    token: Int[np.ndarray, " n"]
    supervised: Bool[np.ndarray, " n"]
    gate: Float[np.ndarray, "n k"]
    loss: Float[np.ndarray, "n p"]
    top: Int[np.ndarray, "n p m"]
    top_probability: Float[np.ndarray, "n p m"]

    @property
    def right(self) -> Bool[np.ndarray, "n p"]:
        """Whether the likeliest token of each predictor is the one that stands there."""
        hits: np.ndarray = self.top[:, :, 0] == self.token[:, None]
        return hits

    @property
    def surprise(self) -> Float[np.ndarray, " n"]:
        """The model's own loss of each token."""
        return self.loss[:, -1]

    @property
    def entropy(self) -> Float[np.ndarray, " n"]:
        """Entropy of each gate, in nats."""
        gate = np.clip(self.gate, 1e-30, None)
        entropy: np.ndarray = -(self.gate * np.log(gate)).sum(axis=1)
        return entropy

    def where(self, chosen: Bool[np.ndarray, " n"]) -> Observations:
        """Return those of the chosen tokens."""
        parts = {name: value[chosen] for name, value in vars(self).items() if name not in _NAMES}
        return Observations(layers=self.layers, late=self.late, **parts)


_NAMES = ("layers", "late")
