"""What a figure of a report is: a chart of Vega-Lite, and the table of what it shows.

One definition is the interactive chart of the page, its PNG and its JSON. Colours are those of
Okabe and Ito, which colour-blind people tell apart; shapes tell the layers apart as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import altair as alt

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A900")
HEIGHT = 220


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: of its files.
        title: what it shows.
        caption: how to read it.
        chart: the chart.
        header: of the table.
        rows: of the table, as they are shown.
    """

    name: str
    title: str
    caption: str
    chart: alt.TopLevelMixin
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def layer_name(layer: int) -> str:
    """Return what a layer is called; layers are counted from 0, as in `layers_path`."""
    return f"layer {layer}"


def colour(field: str, names: Sequence[str], channel: Any = None) -> Any:
    """Return a colour for each name, the palette's or, of more names, a scale's."""
    import altair as alt

    if len(names) <= len(PALETTE):
        scale = alt.Scale(domain=list(names), range=list(PALETTE[: len(names)]))
    else:
        scale = alt.Scale(domain=list(names), scheme="viridis")
    columns = 4 if max(map(len, names)) < 12 else 2  # what a telephone is wide enough for
    legend = alt.Legend(title=None, orient="top", columns=columns, labelLimit=300)
    return (channel or alt.Color)(f"{field}:N", scale=scale, legend=legend, sort=list(names))


def sized(chart: Any, height: int = HEIGHT) -> alt.TopLevelMixin:
    """Return a chart as wide as its place on the page."""
    made: alt.TopLevelMixin = chart.properties(width="container", height=height)
    return made
