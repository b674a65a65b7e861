"""What charts of many methods share."""

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from depthmix.calibration.reliability import Reliability, reliability_figure
from depthmix.charts import legend_below, looks
from depthmix.compare.report import _plot_reliability, _plot_sizes

SUMS = {"counts": [1.0] * 15, "confidence": [0.5] * 15, "right": [0.4] * 15}


def test_no_two_methods_look_alike():
    drawn_as = looks(map(str, range(56))).values()
    assert len({(look["color"], look["marker"]) for look in drawn_as}) == 56
    lines = looks(map(str, range(28))).values()
    assert len({(look["color"], look["linestyle"]) for look in lines}) == 28


def test_a_method_has_one_colour_in_all_charts():
    """Also where others, which were run before there was calibration, have no such figures."""
    run = {"loss": 1.0, "trainable_parameters": 3}
    runs = [{**run, "method": "old"}, {**run, "method": "new", "reliability": SUMS}]
    drawn_as = looks(["old", "new"])
    sizes, reliability = Figure().subplots(1, 2)
    _plot_sizes(sizes, runs, "loss", drawn_as)
    _plot_reliability(reliability, runs, drawn_as)
    _, line = reliability.lines  # the ideal first
    assert line.get_label() == f"new: {Reliability.from_dict(SUMS).error:.3f}"
    assert to_hex(line.get_color()) == to_hex(sizes.lines[-1].get_color()) == "#e69f00"


@pytest.mark.parametrize(("sizes", "places"), [((100, 300), [100, 300]), ((100, 103), [0, 1])])
def test_methods_of_one_size_stand_side_by_side(sizes, places):
    axes = Figure().subplots()
    runs = [
        {"method": name, "loss": 1.0, "trainable_parameters": size}
        for name, size in zip("ab", sizes, strict=True)
    ]
    _plot_sizes(axes, runs, "loss", looks("ab"))
    found = [line.get_xdata()[0] for line in axes.lines if line.get_marker() in "os"]
    assert found == places


def test_a_legend_makes_room_for_itself():
    figure = Figure(figsize=(17, 3.6))
    axes = figure.subplots()
    for name in map(str, range(21)):
        axes.plot([0], [0], label=name)
    legend_below(figure, axes)
    assert figure.get_size_inches().tolist() == [17, 3.6 + 6 * 0.25 + 0.2]


def test_a_diagram_of_nothing_has_no_legend():
    """Of tasks none of which has confidences; matplotlib would warn."""
    (axes,) = reliability_figure({}, "answers").axes
    assert axes.get_legend() is None
