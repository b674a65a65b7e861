"""What each layer predicts by itself: loss, calibration, agreement."""

from __future__ import annotations

from typing import Any

from depthmix.analysis.observations import Observations
from depthmix.analysis.predictors import agreement, names_of, reliability, score_predictors
from depthmix.charts import HEIGHT, PALETTE, colour, sized
from depthmix.report.figures import Figure


def layer_figures(seen: Observations) -> list[Figure]:
    """Return loss, accuracy, calibration and agreement of all predictors."""
    return [_losses(seen), _reliability(seen), _agreement(seen)]


def _losses(seen: Observations) -> Figure:
    import altair as alt

    scores = score_predictors(seen)
    values = [
        {
            "name": s.name,
            "loss": s.loss,
            "low": s.loss - 1.96 * s.loss_error,
            "high": s.loss + 1.96 * s.loss_error,
            "accuracy": s.accuracy,
        }
        for s in scores
    ]
    names = [s.name for s in scores]
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("name:N", title=None, sort=names, axis=alt.Axis(labelAngle=-40)),
        tooltip=[
            "name:N",
            alt.Tooltip("loss:Q", format=".3f"),
            alt.Tooltip("accuracy:Q", format=".1%"),
        ],
    )
    bars = base.mark_rule(strokeWidth=2, color=PALETTE[0]).encode(y="low:Q", y2="high:Q")
    points = base.mark_point(size=80, filled=True, color=PALETTE[0]).encode(
        y=alt.Y("loss:Q", title="loss, nats a token", scale=alt.Scale(zero=False))
    )
    rows = [
        [
            s.name,
            f"{s.loss:.4f} ± {s.loss_error:.4f}",
            f"{s.accuracy:.1%}",
            f"{s.confidence:.1%}",
            f"{s.calibration_error:.3f}",
        ]
        for s in scores
    ]
    return Figure(
        "layers",
        "Loss of each layer alone",
        "Over the tokens that are learned; bars are 95 % intervals, rows being what is drawn. "
        "A late layer predicts through its own norm, any other through the model's.",
        sized(alt.layer(bars, points)),
        ["predictor", "loss ± standard error", "accuracy", "mean confidence", "calibration error"],
        rows,
    )


def _reliability(seen: Observations) -> Figure:
    import altair as alt

    late = names_of(seen)[-1 - max(len(seen.late), 1) :]
    points = [point for point in reliability(seen) if point.name in late]
    values = [vars(point) for point in points]
    picked = alt.selection_point(fields=["name"], bind="legend")
    diagonal = (
        alt.Chart(alt.Data(values=[{"x": 0, "y": 0}, {"x": 1, "y": 1}]))
        .mark_line(strokeDash=[4, 4], color="#888888")
        .encode(x="x:Q", y="y:Q")
    )
    share = alt.Scale(domain=[0, 1])
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("confidence:Q", title="confidence", scale=share),
        y=alt.Y("accuracy:Q", title="accuracy", scale=share),
        color=colour("name", late),
        opacity=alt.condition(picked, alt.value(1.0), alt.value(0.15)),
        tooltip=["name:N", "confidence:Q", "accuracy:Q", "tokens:Q"],
    )
    marks = base.mark_point(filled=True).encode(
        size=alt.Size("tokens:Q", legend=None), shape=alt.Shape("name:N", legend=None)
    )
    chart = alt.layer(diagonal, base.mark_line(), marks.add_params(picked))
    rows = [[p.name, f"{p.confidence:.1%}", f"{p.accuracy:.1%}", str(p.tokens)] for p in points]
    return Figure(
        "calibration",
        "Calibration",
        "Tokens are put together by how sure a predictor is of its likeliest token. On the dashed "
        "line it is right as often as it says; below, it is too sure.",
        sized(chart),
        ["predictor", "confidence", "accuracy", "tokens"],
        rows,
    )


def _agreement(seen: Observations) -> Figure:
    import altair as alt

    names, shares = names_of(seen), agreement(seen)
    values = [
        {"a": a, "b": b, "share": float(shares[i, j])}
        for i, a in enumerate(names)
        for j, b in enumerate(names)
    ]
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("a:N", sort=names, title=None, axis=alt.Axis(labelAngle=-40)),
        y=alt.Y("b:N", sort=names, title=None),
        tooltip=["a:N", "b:N", alt.Tooltip("share:Q", format=".1%")],
    )
    written = len(names) <= 6  # more figures would not fit
    legend = None if written else alt.Legend(format=".0%", title="same token")
    scale = alt.Scale(scheme="blues", domain=[0, 1])
    chart: Any = base.mark_rect().encode(color=alt.Color("share:Q", scale=scale, legend=legend))
    if written:
        white = alt.condition("datum.share > 0.55", alt.value("white"), alt.value("black"))
        chart = chart + base.mark_text().encode(text=alt.Text("share:Q", format=".0%"), color=white)
    rows = [[a, *(f"{share:.1%}" for share in line)] for a, line in zip(names, shares, strict=True)]
    return Figure(
        "agreement",
        "Agreement",
        "How often two predictors have the same likeliest token.",
        sized(chart, max(28 * 5, min(28 * len(names), 2 * HEIGHT))),
        ["predictor", *names],
        rows,
    )
