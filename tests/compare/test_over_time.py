"""Quality against time: means over seeds, and when an accuracy is reached."""

from io import BytesIO

import pytest
from matplotlib.image import imread

from depthmix.compare.over_time import (
    has_curves,
    plot_over_time,
    points_over_time,
    reached,
    seconds_to,
)


def run(method, seed, *points):
    names = ("epoch", "seconds", "loss", "accuracy")
    curve = [dict(zip(names, point, strict=True)) for point in points]
    last = curve[-1]
    return {"task": "sums", "method": method, "seed": seed, "curve": curve, **last}


RUNS = [
    run("lora", 1, (1, 10.0, 1.0, 0.1), (2, 20.0, 0.5, 0.5)),
    run("lora", 2, (1, 14.0, 2.0, 0.3), (2, 24.0, 0.7, 0.9)),
]


def test_points_are_means_over_seeds():
    assert points_over_time(RUNS, "loss") == [(12.0, 1.5, 1.0, 2.0), (22.0, 0.6, 0.5, 0.7)]
    assert points_over_time(RUNS, "accuracy")[1] == pytest.approx((22.0, 0.7, 0.5, 0.9))


@pytest.mark.parametrize(
    ("accuracy", "seconds"), [(0.2, 12.0), (0.1, 12.0), (0.45, 17.0), (0.7, 22.0), (0.71, None)]
)
def test_time_to_an_accuracy(accuracy, seconds):
    found = seconds_to(points_over_time(RUNS, "accuracy"), accuracy)
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_times_to_shares_of_the_baselines_best():
    other = run("light", 1, (1, 3.0, 1.0, 0.5), (2, 5.0, 0.9, 0.68))
    results = {"runs": [*RUNS, other], "experiment": {"baseline": "lora"}}
    assert reached(results, "sums") == [("lora", "21", "22"), ("light", "5", "-")]
    assert reached({**results, "experiment": {"baseline": "other"}}, "sums") == []


def test_a_picture(tmp_path):
    results = {"runs": RUNS, "experiment": {"baseline": "lora"}}
    plot_over_time(results, tmp_path / "time.png")
    assert (tmp_path / "time.png").stat().st_size > 5000
    assert has_curves(results)
    before = (tmp_path / "time.png").read_bytes()
    runs = [{**run, "curve": [{**point, "ece": 0.1} for point in run["curve"]]} for run in RUNS]
    plot_over_time({**results, "runs": runs}, tmp_path / "time.png")
    assert imread(tmp_path / "time.png").shape[1] > imread(BytesIO(before)).shape[1]  # a chart more
    assert not has_curves({"runs": [run("lora", 1, (1, 1.0, 1.0, 0.0))]})
