"""Paired bootstrap intervals of the difference between a method and the baseline.

Test rows and seeds are both resampled, rows together for both methods and all seeds: the interval
tells what another draw of questions and of seeds could have given (Efron and Tibshirani, 1993).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = dict[tuple[str, str, int], dict[str, Any]]

RESAMPLES = 10_000
LEVEL = 0.95


def differences(rows: Rows, baseline: str) -> list[dict[str, Any]]:
    """Return mean difference and 95 % interval a task, method and metric; positive is better.

    Args:
        rows: {(task, method, seed): {tokens, loss, exact}}, one value a test row.
        baseline: the method that the others are compared with, on the seeds that both have.
    """
    found = []
    for task, method in dict.fromkeys((task, method) for task, method, _ in rows):
        seeds = [s for t, m, s in rows if (t, m) == (task, method) and (t, baseline, s) in rows]
        if method == baseline or not seeds:
            continue
        ours = [rows[task, method, seed] for seed in seeds]
        theirs = [rows[task, baseline, seed] for seed in seeds]
        for metric, (sums, counts) in _METRICS.items():
            better = np.array([np.array(t[sums], float) for t in theirs])
            better = better - np.array([np.array(o[sums], float) for o in ours])
            better = better if metric == "loss" else -better
            weights = np.array(ours[0][counts], float) if counts else np.ones(better.shape[1])
            mean, low, high = paired_interval(better, weights)
            found.append(
                {
                    "task": task,
                    "method": method,
                    "baseline": baseline,
                    "metric": metric,
                    "mean": mean,
                    "low": low,
                    "high": high,
                    "seeds": seeds,
                }
            )
    return found


# The metric: sums a row, and what they are divided by.
_METRICS: dict[str, tuple[str, str | None]] = {
    "loss": ("loss", "tokens"),
    "accuracy": ("exact", None),
}


def paired_interval(
    better: NDArray[np.float64], weights: NDArray[np.float64], resamples: int = RESAMPLES
) -> tuple[float, float, float]:
    """Return mean, lower and upper end of the interval of sum(better) / sum(weights).

    Args:
        better: (seeds, rows) sums by which the method is better on a row.
        weights: (rows,) tokens, or ones.
        resamples: draws of rows and seeds.
    """
    seeds, count = better.shape
    generator = np.random.default_rng(0)
    drawn = generator.multinomial(count, np.full(count, 1 / count), size=resamples)
    chosen = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
    ratios = (drawn @ better.T) / (drawn @ weights)[:, None]
    values = (ratios * chosen).sum(axis=1)
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(better.sum() / weights.sum() / seeds), float(low), float(high)
