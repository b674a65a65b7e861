"""The curves of a run by step: losses, router weights and entropy, rates."""

from __future__ import annotations

from depthmix.analysis.training_log import TrainingLog
from depthmix.charts import colour, sized
from depthmix.report.figures import Figure, layer_name


def training_figures(log: TrainingLog) -> list[Figure]:
    """Return the curves of a run: losses, router weights and entropy, rates."""
    weights = {f"router_weight/layer_{layer}": layer_name(layer) for layer in log.layers}
    losses = {"loss": "loss", "ce_loss": "cross-entropy of the ensemble"}
    distilled = {"distill_loss": "divergence of the late layers from the last"}
    entropy = {"router_entropy": "entropy of the gate"}
    made = [
        _curves(log, "loss", "Loss by step", "nats a token", losses),
        _curves(log, "distillation", "Late layers against the last", "nats a token", distilled),
        _curves(log, "router-weights", "Router weights by step", "mean weight", weights),
        _curves(log, "router-entropy", "Router entropy by step", "nats", entropy),
        _curves(log, "gradient", "Gradient norm", "norm", {"grad_norm": "gradient norm"}),
        _curves(log, "rate", "Learning rate", "rate", {"learning_rate": "learning rate"}),
    ]
    return [figure for figure in made if figure is not None]


def _curves(
    log: TrainingLog, name: str, title: str, unit: str, shown: dict[str, str]
) -> Figure | None:
    """Return curves by step: lines of training, with points of evaluations."""
    import altair as alt

    values = [
        {
            "step": point.step,
            "value": point.value,
            "of": shown[point.name],
            "rows": "held out" if point.evaluation else "training",
        }
        for point in log.points
        if point.name in shown
    ]
    if not values:
        return None
    names = [label for label in shown.values() if any(v["of"] == label for v in values)]
    picked = alt.selection_point(fields=["of"], bind="legend")
    base = alt.Chart(alt.Data(values=values)).encode(
        x=alt.X("step:Q", title="step"),
        y=alt.Y("value:Q", title=unit, scale=alt.Scale(zero=False)),
        color=colour("of", names),
        opacity=alt.condition(picked, alt.value(1.0), alt.value(0.15)),
        tooltip=["of:N", "rows:N", "step:Q", alt.Tooltip("value:Q", format=".4g")],
    )
    marks = {"training": base.mark_line(), "held out": base.mark_point(size=70, filled=True)}
    layers = [
        mark.transform_filter(alt.datum.rows == rows)
        for rows, mark in marks.items()
        if any(v["rows"] == rows for v in values)
    ]
    chart = alt.layer(*layers).add_params(picked)
    rows = [[str(v["step"]), str(v["of"]), str(v["rows"]), f"{v['value']:.4g}"] for v in values]
    return Figure(
        name,
        title,
        "Lines are of training, points of evaluations on held-out rows.",
        sized(chart),
        ["step", "figure", "rows", "value"],
        rows,
    )
