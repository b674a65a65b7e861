"""What the router does with groups of tokens, and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from depthmix.analysis.observations import Observations
from depthmix.analysis.routing import Difference, Grouping
from depthmix.charts import colour, sized
from depthmix.report.figures import Figure, layer_name

_ENTROPY_BINS = 30


def routing_figures(
    seen: Observations, groups: Sequence[Grouping], table: Sequence[Difference]
) -> list[Figure]:
    """Return the routing of each grouping, and how the gate's entropy is spread."""
    return [*(_grouping(seen, g, table) for g in groups), _entropy(seen)]


def _grouping(seen: Observations, g: Grouping, table: Sequence[Difference]) -> Figure:
    import altair as alt

    lines = [line for line in table if line.grouping == g.name]
    values = [
        {
            "group": line.group,
            "layer": layer_name(seen.late[line.layer]),
            "difference": line.difference,
            "weight": line.weight,
            "tokens": line.tokens,
            "p": None if np.isnan(line.p) else line.p,
            "beyond chance": "yes" if line.is_real else "no",
        }
        for line in lines
        if not np.isnan(line.difference)
    ]
    names = [layer_name(layer) for layer in seen.late]
    picked = alt.selection_point(fields=["layer"], bind="legend")
    base = alt.Chart(alt.Data(values=values)).encode(
        y=alt.Y("group:N", sort=list(g.order), title=None),
        yOffset=alt.YOffset("layer:N", sort=names),
    )
    other = "other rows" if g.of_rows else "the row's other tokens"
    points = base.mark_point(size=80, filled=True).encode(
        x=alt.X(
            "difference:Q", title="weight, less that of the others", scale=alt.Scale(padding=14)
        ),
        stroke=colour("layer", names, alt.Stroke),
        fill=colour("layer", names, alt.Fill),
        shape=alt.Shape("layer:N", sort=names, legend=None),
        fillOpacity=alt.condition("datum['beyond chance'] == 'yes'", alt.value(1), alt.value(0)),
        opacity=alt.condition(picked, alt.value(1.0), alt.value(0.12)),
        tooltip=[
            *("group:N", "layer:N", alt.Tooltip("weight:Q", format=".4f")),
            *(alt.Tooltip("difference:Q", format="+.4f"), "tokens:Q"),
            *(alt.Tooltip("p:Q", format=".4f"), "beyond chance:N"),
        ],
    )
    zero = alt.Chart(alt.Data(values=[{"x": 0}])).mark_rule(color="#888888").encode(x="x:Q")
    groups = len({v["group"] for v in values})
    rows = [
        [
            *(line.group, layer_name(seen.late[line.layer]), str(line.tokens)),
            *(f"{line.weight:.4f}", f"{line.difference:+.4f}", str(line.rows)),
            "too few rows" if np.isnan(line.p) else f"{line.p:.4f}",
        ]
        for line in lines
    ]
    return Figure(
        f"routing-{g.name.replace(' ', '-')}",
        f"Routing by {g.name}",
        f"How much more weight a layer has than over {other}. Filled: beyond chance (p < 0.05, "
        "corrected for the number of tests); empty: not told from chance.",
        sized(alt.layer(zero, points.add_params(picked)), 30 + 16 * len(names) * groups),
        ["group", "layer", "tokens", "mean weight", "difference", "rows", "p"],
        rows,
    )


def _entropy(seen: Observations) -> Figure:
    import altair as alt

    most = float(np.log(len(seen.late)))
    edges = np.linspace(0.0, most, _ENTROPY_BINS + 1)
    parts = {"completion": seen.supervised, "prompt": ~seen.supervised}
    values = [
        {"low": low, "high": high, "part": part, "share": count / max(chosen.sum(), 1)}
        for part, chosen in parts.items()
        for low, high, count in zip(
            edges[:-1].tolist(),
            edges[1:].tolist(),
            np.histogram(seen.entropy[chosen], edges)[0].tolist(),
            strict=True,
        )
    ]
    chart = (
        alt.Chart(alt.Data(values=values))
        .mark_bar(opacity=0.6)
        .encode(
            x=alt.X("low:Q", bin="binned", title="entropy of the gate, nats"),
            x2="high:Q",
            y=alt.Y("share:Q", title="share of tokens", stack=None, axis=alt.Axis(format="%")),
            color=colour("part", list(parts)),
            tooltip=["part:N", "low:Q", "high:Q", alt.Tooltip("share:Q", format=".1%")],
        )
    )
    rows = [
        [part, f"{seen.entropy[chosen].mean():.3f}", f"{seen.entropy[chosen].std():.3f}"]
        for part, chosen in parts.items()
        if chosen.any()
    ]
    return Figure(
        "entropy",
        "Entropy of the gate",
        f"0: one layer has all the weight; {most:.2f}: all have the same.",
        sized(chart),
        ["part", "mean", "standard deviation"],
        rows,
    )
