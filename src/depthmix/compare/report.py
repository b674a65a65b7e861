"""What a comparison comes to: tables on the terminal and in Markdown, and plots."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmix.calibration.reliability import Reliability, draw_reliability
from depthmix.charts import Looks, legend_below, looks
from depthmix.compare.over_time import SHARES, has_curves, reached
from depthmix.tables import print_figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Run = dict[str, Any]

HEADER = (
    "method",
    "held-out loss",
    "better than the baseline by",
    "accuracy",
    "better by",
    "calibration error",
    "trained parameters",
    "seconds",
    "peak GiB",
)


# Columns of the two tables that a terminal shows, and how it calls them.
_QUALITY, _COST = (0, 1, 2, 3, 4), (0, 5, 6, 7, 8)
_NARROW = {
    "held-out loss": "loss",
    "better than the baseline by": "better by",
    "calibration error": "ECE",
}


def print_tables(results: dict[str, Any]) -> None:
    """Print two tables a task: how good the methods are, and what they take."""
    for task in _tasks(results["runs"]):
        rows = [[_in_lines(cell) for cell in row] for row in table_rows(results, task)]
        for part in (_QUALITY, _COST):
            print_figures(
                f"{task}, {_seeds(results['runs'], task)}",
                [_NARROW.get(HEADER[i], HEADER[i]) for i in part],
                [[row[i] for i in part] for row in rows],
            )


def _in_lines(cell: str) -> str:
    """Put an error or an interval below its figure."""
    return cell.replace(" [", "\n[").replace(" ± ", "\n± ")


def markdown(results: dict[str, Any], plots: str) -> str:
    """Return the tables as Markdown, with the plots of that name and the layers' figures."""
    parts = []
    for task in _tasks(results["runs"]):
        split = next(run["split"] for run in results["runs"] if run["task"] == task)
        parts.append(f"### {task} ({split} rows, {_seeds(results['runs'], task)})\n")
        parts.append(_markdown_table(HEADER, table_rows(results, task)))
        parts += _calibrated(results, task)
        layers = list(layer_rows(results["runs"], task))
        if layers:
            parts.append("The late layers, means over the seeds, the last layer last:\n")
            parts.append(_markdown_table(LAYER_HEADER, layers))
        if has_curves(results) and (times := reached(results, task)):
            parts.append("Seconds of training until so much of the baseline's best accuracy:\n")
            header = ("method", *(f"{share:.0%}" for share in SHARES))
            parts.append(_markdown_table(header, times))
    parts.append(
        f"![Loss curves; loss and accuracy against trained parameters; reliability]({plots})\n"
    )
    return "\n".join(parts)


def table_rows(results: dict[str, Any], task: str) -> list[tuple[str, ...]]:
    """Return one row a method, in the order of the runs."""
    runs = [run for run in results["runs"] if run["task"] == task]
    rows: list[tuple[str, ...]] = []
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        rows.append(
            (
                method,
                spread([run["loss"] for run in own], "{:.4f}"),
                _interval(results["differences"], task, method, "loss", "{:+.4f}"),
                spread([run["accuracy"] for run in own], "{:.3f}"),
                _interval(results["differences"], task, method, "accuracy", "{:+.3f}"),
                spread([run["ece"] for run in own if "ece" in run], "{:.3f}"),
                f"{own[0]['trainable_parameters']:,}",
                f"{statistics.mean(run['seconds'] for run in own):.0f}",
                f"{statistics.mean(run['peak_bytes'] for run in own) / 2**30:.2f}",
            )
        )
    return rows


def _calibrated(results: dict[str, Any], task: str) -> list[str]:
    """Say at which temperatures a method was scored, and on which rows they were fitted."""
    runs = [run for run in results["runs"] if run["task"] == task]
    lines = []
    for method, own in _by_method(runs):
        found = [run["temperature"] for run in own if run.get("temperature", 1.0) != 1.0]
        if found:
            scored = own[0]["split"] == "validation"
            where = "the rows scored here" if scored else "the task's validation rows"
            lines.append(f"{method}: temperature {spread(found, '{:.3f}')}, fitted on {where}.\n")
    return lines


LAYER_HEADER = (
    "method",
    "loss of each layer alone",
    "tokens right, each layer alone",
    "last wrong, another right",
    "mean weight",
    "router entropy",
)


def layer_rows(runs: list[Run], task: str) -> Iterable[tuple[str, ...]]:
    """Yield one row a method with MoDE."""
    own = [run for run in runs if run["task"] == task and run["gate"]]
    for method in dict.fromkeys(run["method"] for run in own):
        same = [run for run in own if run["method"] == method]
        yield (
            method,
            _listed(_means(same, "layer_loss"), "{:.3f}"),
            _listed(_means(same, "layer_accuracy"), "{:.3f}"),
            f"{statistics.mean(run['rescued'] for run in same):.3f}",
            _listed(_means(same, "gate"), "{:.3f}"),
            f"{statistics.mean(run['entropy'] for run in same):.3f}",
        )


def spread(values: list[float], form: str) -> str:
    """Return mean and standard deviation over the seeds; nothing where nothing was measured."""
    if not values:
        return ""
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw, a task a row: training; held-out loss and accuracy by parameters; reliability."""
    from matplotlib.figure import Figure

    tasks = list(_tasks(results["runs"]))
    drawn_as = looks(run["method"] for run in results["runs"])
    figure = Figure(figsize=(17, 3.6 * len(tasks)), layout="constrained")
    rows = figure.subplots(len(tasks), 4, squeeze=False)
    for (curves, losses, accuracies, reliability), task in zip(rows, tasks, strict=True):
        runs = [run for run in results["runs"] if run["task"] == task]
        _plot_curves(curves, runs, drawn_as)
        _plot_sizes(losses, runs, "loss", drawn_as)
        _plot_sizes(accuracies, runs, "accuracy", drawn_as)
        _plot_reliability(reliability, runs, drawn_as)
        curves.set_title(f"{task}: {curves.get_title()}")
        losses.set(title=f"{task}: held-out loss", ylabel="nats a token")
        accuracies.set(title=f"{task}: accuracy", ylabel="share of rows")
    legend_below(figure, rows[0][1])
    figure.savefig(path, dpi=110)


def _plot_curves(axes: Axes, runs: list[Run], drawn_as: Looks) -> None:
    """Draw the rewards of a comparison that has any, else the losses."""
    of_rewards = any(run.get("reward_curve") for run in runs)
    name = "reward_curve" if of_rewards else "loss_curve"
    for method, own in _by_method(runs):
        curves = [run.get(name, []) for run in own]
        steps = [step for step, _ in curves[0]]
        means = [statistics.mean(curve[i][1] for curve in curves) for i in range(len(steps))]
        axes.plot(steps, means, **{**drawn_as[method], "marker": ""})
    axes.set_xlabel("step")
    if of_rewards:
        axes.set(title="reward in training", ylabel="mean reward")
    else:
        axes.set(title="training loss, distillation included", ylabel="nats a token", yscale="log")


def _plot_sizes(axes: Axes, runs: list[Run], metric: str, drawn_as: Looks) -> None:
    """Draw by trained parameters or, where these are about the same, side by side."""
    sizes = {method: own[0]["trainable_parameters"] for method, own in _by_method(runs)}
    alike = max(sizes.values()) < 1.2 * min(sizes.values())
    for place, (method, own) in enumerate(_by_method(runs)):
        values = [run[metric] for run in own]
        axes.errorbar(
            place if alike else sizes[method],
            statistics.mean(values),
            yerr=statistics.stdev(values) if len(values) > 1 else 0.0,
            capsize=3,
            alpha=0.7,
            label=method,
            **{**drawn_as[method], "linestyle": ""},
        )
    if alike:
        axes.set(xlabel="methods", xticks=[])
    else:
        _scale_by_size(axes)


def _scale_by_size(axes: Axes) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    axes.set(xlabel="trained parameters", xscale="log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _plot_reliability(axes: Axes, runs: list[Run], drawn_as: Looks) -> None:
    found = {}
    for method, own in _by_method(runs):
        sums = [Reliability.from_dict(run["reliability"]) for run in own if "reliability" in run]
        if sums:
            found[method] = sum(sums[1:], sums[0])
    draw_reliability(axes, found, drawn_as)
    axes.set(title="reliability of the likeliest tokens")


def _by_method(runs: list[Run]) -> Iterable[tuple[str, list[Run]]]:
    for method in dict.fromkeys(run["method"] for run in runs):
        yield method, [run for run in runs if run["method"] == method]


def _tasks(runs: list[Run]) -> Iterable[str]:
    return dict.fromkeys(run["task"] for run in runs)


def _seeds(runs: list[Run], task: str) -> str:
    seeds = sorted({run["seed"] for run in runs if run["task"] == task})
    return f"seeds {', '.join(map(str, seeds))}"


def _interval(
    differences: list[dict[str, Any]], task: str, method: str, metric: str, form: str
) -> str:
    for row in differences:
        if (row["task"], row["method"], row["metric"]) == (task, method, metric):
            mean, low, high = (form.format(row[name]) for name in ("mean", "low", "high"))
            return f"{mean} [{low}, {high}]"
    return ""


def _means(runs: list[Run], name: str) -> list[float]:
    return [statistics.mean(values) for values in zip(*(run[name] for run in runs), strict=True)]


def _listed(values: list[float], form: str) -> str:
    return ", ".join(form.format(value) for value in values)


def _markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = list(header)
    lines: list[Iterable[str]] = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
