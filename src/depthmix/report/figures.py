"""What a figure of a report is: a chart of Vega-Lite, and the table of what it shows.

One definition is the interactive chart of the page, its PNG and its JSON.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import altair as alt


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
