"""Quality against time: what a method has reached after so many seconds of training."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmix.charts import Looks, legend_below, looks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Run = dict[str, Any]
Point = tuple[float, float, float, float]

SHARES = (0.95, 0.99)
_METRICS = {
    "accuracy": "accuracy, share of rows",
    "loss": "held-out loss, nats a token",
    "ece": "calibration error",
}


def points_over_time(runs: Sequence[Run], metric: str) -> list[Point]:
    """Return (seconds, mean, lowest, highest) after each epoch, over the seeds of one method.

    Args:
        runs: of one task and method.
        metric: `accuracy`, `loss` or `ece`.
    """
    points: list[Point] = []
    for same in zip(*(run["curve"] for run in runs), strict=True):
        values = [point[metric] for point in same]
        seconds = statistics.mean(point["seconds"] for point in same)
        points.append((seconds, statistics.mean(values), min(values), max(values)))
    return points


def curves(runs: Sequence[Run], metric: str) -> dict[str, list[Point]]:
    """Return the points of each method of one task, in the order of the runs."""
    methods = dict.fromkeys(run["method"] for run in runs)
    return {
        method: points_over_time([run for run in runs if run["method"] == method], metric)
        for method in methods
    }


def seconds_to(points: Sequence[Point], accuracy: float) -> float | None:
    """Return after how many seconds a mean accuracy is reached, or None if it is not.

    Between two epochs it is taken to rise on a straight line; before the first, not at all.
    """
    before: Point | None = None
    for point in points:
        if point[1] >= accuracy:
            if before is None:
                return point[0]
            share = (accuracy - before[1]) / (point[1] - before[1])
            return before[0] + share * (point[0] - before[0])
        before = point
    return None


def reached(results: dict[str, Any], task: str) -> list[tuple[str, ...]]:
    """Return a row a method: the seconds until it has `SHARES` of the baseline's best accuracy.

    Accuracies are means over the seeds; a dash where it is not reached. No rows where the baseline
    has no runs.
    """
    found = curves([run for run in results["runs"] if run["task"] == task], "accuracy")
    best = max((p[1] for p in found.get(results["experiment"]["baseline"], ())), default=None)
    if best is None:
        return []
    rows = []
    for method, points in found.items():
        times = [seconds_to(points, share * best) for share in SHARES]
        rows.append((method, *("-" if time is None else f"{time:.0f}" for time in times)))
    return rows


def has_curves(results: dict[str, Any]) -> bool:
    """Whether any run was scored more than once."""
    return any(len(run.get("curve", ())) > 1 for run in results["runs"])


def plot_over_time(
    results: dict[str, Any], path: Path, metrics: Sequence[str] | None = None
) -> None:
    """Draw metrics against the time of training, a task a row; the band is the seeds' range.

    Unless metrics are named, all that every run has: those of earlier versions have no `ece`.
    Methods that were trained for a single epoch are points, and those for less are left out: the
    untuned base would stretch the axes. A dotted line is at 95 % of the best mean accuracy of the
    baseline.
    """
    from matplotlib.figure import Figure

    points = [point for run in results["runs"] for point in run["curve"]]
    metrics = metrics or [name for name in _METRICS if all(name in point for point in points)]
    tasks = list(dict.fromkeys(run["task"] for run in results["runs"]))
    figure = Figure(figsize=(5.2 * len(metrics), 3.6 * len(tasks)), layout="constrained")
    grid = figure.subplots(len(tasks), len(metrics), squeeze=False)
    baseline = results["experiment"]["baseline"]
    drawn_as = looks(run["method"] for run in results["runs"] if _trained(run))
    for row, task in zip(grid, tasks, strict=True):
        runs = [run for run in results["runs"] if run["task"] == task and _trained(run)]
        for axes, metric in zip(row, metrics, strict=True):
            _plot(axes, runs, metric, baseline, drawn_as)
            axes.set(title=task, xlabel="training, seconds", ylabel=_METRICS[metric])
    legend_below(figure, grid[0][0])
    figure.savefig(path, dpi=110)


def _trained(run: Run) -> bool:
    return bool(run["curve"][-1]["epoch"] >= 1)


def _plot(axes: Axes, runs: list[Run], metric: str, baseline: str, drawn_as: Looks) -> None:
    for method, points in curves(runs, metric).items():
        seconds, means, lows, highs = zip(*points, strict=True)
        colour = drawn_as[method]["color"]
        axes.plot(seconds, means, markersize=5, label=method, **drawn_as[method])
        axes.fill_between(seconds, lows, highs, color=colour, alpha=0.12, linewidth=0)
        if method == baseline and metric == "accuracy":
            axes.axhline(0.95 * max(means), color=colour, linestyle=":", linewidth=1)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
