"""The demo's picture: how the router weighs the late layers, on average and token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, Any]


def plot_routing(score: Row, path: Path) -> None:
    """Write a picture of the routing in a score of `demo_score`: mean gate, and a few replies."""
    examples = score["pictured"]
    figure = Figure(figsize=(11, 1 + 1.1 * len(examples)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 3))  # type: ignore[misc]
    names = [f"layer {layer + 1}" for layer in score["layers"]]
    colours = [mpl.colormaps["viridis"](0.15 + 0.7 * i / len(names)) for i in range(len(names))]
    _plot_mean(left.subplots(), score["gate"], names, colours)
    longest = max(len(example["tokens"]) for example in examples)
    for axes, example in zip(right.subplots(len(examples), squeeze=False), examples, strict=True):
        _plot_reply(axes[0], example, colours)
        axes[0].set_xlim(-0.6, longest - 0.4)
    figure.savefig(path, dpi=120)


def _plot_mean(axes: Axes, gate: list[float], names: list[str], colours: list[Any]) -> None:
    bars = axes.bar(names, gate, color=colours)
    axes.bar_label(bars, fmt="%.2f")
    axes.set(title="Mean weight\n(test answers)", ylim=(0, 1.08))
    axes.tick_params(axis="x", rotation=30)


def _plot_reply(axes: Axes, example: Row, colours: list[Any]) -> None:
    """One bar a token of the reply, cut by the weights of the layers that predicted it."""
    places = range(len(example["tokens"]))
    bottom = [0.0] * len(places)
    for layer, colour in enumerate(colours):
        weights = [gate[layer] for gate in example["gates"]]
        axes.bar(places, weights, bottom=bottom, color=colour, width=0.94)
        bottom = [b + w for b, w in zip(bottom, weights, strict=True)]
    question = example["prompt"].split("\nAnswer:")[0].replace("\n", " ")
    axes.set_title(_visible(question[-90:], blank=" "), fontsize=8, loc="left")
    labels = [_visible(token) for token in example["tokens"]]
    axes.set_xticks(places, labels, fontsize=8)
    axes.set(ylim=(0, 1), yticks=[0, 1])


def _visible(text: str, blank: str = "\N{OPEN BOX}") -> str:
    """Show blanks and line breaks; a dollar sign would begin a formula."""
    return repr(text)[1:-1].replace(" ", blank).replace("$", r"\$")
