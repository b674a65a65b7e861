"""What each layer predicts by itself beside the model: loss, accuracy, calibration, agreement.

All is over the tokens that are learned. A predictor is a layer alone or, as the last one, the
model itself (with MoDE, the ensemble).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from depthmix.analysis.observations import Observations

BINS = 10  # of a reliability diagram, of equal width


@dataclass(frozen=True)
class PredictorScore:
    """How well one predictor does.

    Attributes:
        name: `layer 29`, counted from 0, or `model`.
        loss: cross-entropy a token, in nats.
        loss_error: standard error of the loss, rows being what is drawn.
        accuracy: share of the tokens that it gives the highest probability.
        confidence: mean of that highest probability.
        calibration_error: expected calibration error: mean over tokens of |accuracy - confidence|
            of the bin that a token's confidence is in.
    """

    name: str
    loss: float
    loss_error: float
    accuracy: float
    confidence: float
    calibration_error: float


@dataclass(frozen=True)
class ReliabilityBin:
    """The tokens that a predictor is about so sure of.

    Attributes:
        name: of the predictor.
        confidence: mean over them of its highest probability.
        accuracy: share of them that it gets right.
        tokens: how many they are.
    """

    name: str
    confidence: float
    accuracy: float
    tokens: int


@dataclass(frozen=True)
class Complement:
    """A token that the last layer alone gets wrong and another late layer gets right.

    Attributes:
        place: of the token in the observations.
        layer: the layer that is surest of the right token.
        probability: what that layer gives it.
    """

    place: int
    layer: int
    probability: float


def names_of(seen: Observations) -> list[str]:
    """Return the names of the predictors, in their order."""
    return [*(f"layer {layer}" for layer in seen.layers), "model"]


def score_predictors(seen: Observations) -> list[PredictorScore]:
    """Return a line for each predictor."""
    seen = seen.where(seen.supervised)
    scores = []
    for place, name in enumerate(names_of(seen)):
        right, confidence = seen.right[:, place], seen.top_probability[:, place, 0]
        bins = _bins(name, confidence, right)
        gap = sum(b.tokens * abs(b.accuracy - b.confidence) for b in bins) / len(right)
        loss = seen.loss[:, place]
        scores.append(
            PredictorScore(
                name,
                float(loss.mean()),
                _error_of_mean(loss, seen.row),
                float(right.mean()),
                float(confidence.mean()),
                float(gap),
            )
        )
    return scores


def reliability(seen: Observations) -> list[ReliabilityBin]:
    """Return the points of a reliability diagram, predictor by predictor, empty bins left out."""
    seen = seen.where(seen.supervised)
    return [
        point
        for place, name in enumerate(names_of(seen))
        for point in _bins(name, seen.top_probability[:, place, 0], seen.right[:, place])
    ]


def agreement(seen: Observations) -> Float[np.ndarray, "p p"]:
    """Return how often each two predictors have the same likeliest token."""
    best = seen.where(seen.supervised).top[:, :, 0]
    shares: np.ndarray = (best[:, :, None] == best[:, None, :]).mean(axis=0)
    return shares


def complements(seen: Observations) -> list[Complement]:
    """Return the tokens that a late layer gets right and the last one wrong, the surest first."""
    late = len(seen.late) or len(seen.layers)
    columns = np.arange(len(seen.layers) - late, len(seen.layers))
    right = seen.right[:, columns]
    found = seen.supervised & ~right[:, -1] & right[:, :-1].any(axis=1)
    lines = []
    for place in found.nonzero()[0]:
        sure = np.where(right[place, :-1], seen.top_probability[place, columns[:-1], 0], 0.0)
        best = int(sure.argmax())
        layer = seen.layers[columns[best]]
        lines.append(Complement(int(place), layer, float(sure[best])))
    return sorted(lines, key=lambda line: -line.probability)


def gain_over_last(seen: Observations) -> tuple[float, float]:
    """Return by how much a token the ensemble's loss is below the last layer's, and its error.

    The error is the standard error of the mean over tokens, rows being what is drawn.
    """
    seen = seen.where(seen.supervised)
    gain = seen.loss[:, -2] - seen.loss[:, -1]
    return float(gain.mean()), _error_of_mean(gain, seen.row)


def _bins(
    name: str, confidence: Float[np.ndarray, " n"], right: Bool[np.ndarray, " n"]
) -> list[ReliabilityBin]:
    """Put tokens into bins by confidence; a bin's upper limit is its own."""
    place = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    return [
        ReliabilityBin(
            name,
            float(confidence[place == b].mean()),
            float(right[place == b].mean()),
            int((place == b).sum()),
        )
        for b in np.unique(place)
    ]


def _error_of_mean(values: Float[np.ndarray, " n"], row: np.ndarray) -> float:
    """Return the standard error of a mean over tokens whose rows are drawn (clustered by row)."""
    _, place = np.unique(row, return_inverse=True)
    rows = int(place.max()) + 1
    if rows < 2:
        return float("nan")
    residual = np.bincount(place, weights=values - values.mean())
    return float(np.sqrt((residual**2).sum() * rows / (rows - 1)) / len(values))
