"""What all charts share: colours and sizes.

The colours are those of Okabe and Ito, which colour-blind people tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from depthmix.errors import ConfigError

if TYPE_CHECKING:
    import altair as alt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Looks = dict[str, dict[str, Any]]  # of names; keywords of matplotlib

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B8A900")
HEIGHT = 220
_LEGEND_COLUMNS = 4
_MARKERS, _LINES = "osD^vPX*", ("-", "--", ":", "-.")


def require_charts(what: str) -> None:
    """Raise `ConfigError` unless charts can be made."""
    if find_spec("altair") is None or find_spec("vl_convert") is None:
        raise ConfigError(f"{what} needs altair: pip install 'depthmix[report]'")


def looks(names: Iterable[str]) -> Looks:
    """Return for each name how matplotlib draws it: up to 28 lines and 56 points, no two alike."""
    return {
        name: {
            "color": PALETTE[i % len(PALETTE)],
            "marker": _MARKERS[i % len(_MARKERS)],
            "linestyle": _LINES[i // len(PALETTE) % len(_LINES)],
        }
        for i, name in enumerate(dict.fromkeys(names))
    }


def legend_below(figure: Figure, axes: Axes) -> None:
    """Put the legend of one of a figure's charts below all of them, and make room for it."""
    handles, labels = axes.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + 0.25 * math.ceil(len(labels) / _LEGEND_COLUMNS) + 0.2)
    figure.legend(handles, labels, loc="outside lower center", ncols=_LEGEND_COLUMNS)


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
