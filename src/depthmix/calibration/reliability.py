"""How far confidence is from accuracy: expected calibration error, and what its diagram shows.

Naeini, Cooper and Hauskrecht (2015); Guo, Pleiss, Sun and Weinberger (2017), with 15 bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from depthmix.charts import Looks, looks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 15


def _zeros() -> NDArray[np.float64]:
    return np.zeros(BINS)


@dataclass(frozen=True, eq=False)
class Reliability:
    """Sums over predictions, by 15 bins of equal width of their confidence; (0, 1/15] is the first.

    Attributes:
        counts: (15,) predictions.
        confidence: (15,) sum of their confidence.
        right: (15,) how many of them are right.
    """

    counts: NDArray[np.float64] = field(default_factory=_zeros)
    confidence: NDArray[np.float64] = field(default_factory=_zeros)
    right: NDArray[np.float64] = field(default_factory=_zeros)

    @classmethod
    def of(cls, confidence: ArrayLike, right: ArrayLike) -> Reliability:
        """Return the sums over some predictions.

        Args:
            confidence: (n,) the probability that the model gave to what it predicted.
            right: (n,) whether that is right.
        """
        values, marks = np.asarray(confidence, float), np.asarray(right, float)
        places = np.clip(np.ceil(values * BINS).astype(int) - 1, 0, BINS - 1)

        def summed(weights: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.bincount(places, weights, BINS).astype(np.float64)

        return cls(summed(np.ones_like(values)), summed(values), summed(marks))

    def __add__(self, other: Reliability) -> Reliability:
        """Return the sums over the predictions of both."""
        return Reliability(
            self.counts + other.counts,
            self.confidence + other.confidence,
            self.right + other.right,
        )

    @property
    def error(self) -> float:
        """Expected calibration error: mean over predictions of |accuracy - confidence| of a bin."""
        return float(np.abs(self.right - self.confidence).sum() / max(self.counts.sum(), 1.0))

    def as_dict(self) -> dict[str, list[float]]:
        """Return the sums as lists."""
        return {name: values.tolist() for name, values in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, list[float]]) -> Reliability:
        """Return what `as_dict` has written."""
        return cls(**{name: np.array(sums) for name, sums in values.items()})


def draw_reliability(axes: Axes, found: Mapping[str, Reliability], drawn_as: Looks) -> None:
    """Draw reliability diagrams: accuracy of a bin against its confidence, the ideal dashed.

    The area of a point goes with the predictions in its bin.
    """
    axes.plot([0, 1], [0, 1], "--", color="#888", linewidth=1)
    for name, sums in found.items():
        there = sums.counts > 0
        counts = sums.counts[there]
        confidence, accuracy = sums.confidence[there] / counts, sums.right[there] / counts
        look = drawn_as[name]
        line = {part: look[part] for part in ("color", "linestyle")}
        axes.plot(confidence, accuracy, linewidth=1, label=f"{name}: {sums.error:.3f}", **line)
        axes.scatter(confidence, accuracy, 120 * counts / counts.max(), color=look["color"])
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="confidence", ylabel="accuracy")


def reliability_figure(found: Mapping[str, Reliability], title: str) -> Any:
    """Return a matplotlib figure of one diagram."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    axes = figure.subplots()
    draw_reliability(axes, found, looks(found))
    axes.set_title(title, fontsize=9)
    if found:
        axes.legend(title="calibration error", fontsize=7, title_fontsize=7)
    return figure
