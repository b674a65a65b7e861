"""The picture of depths and ranks."""

import importlib
import json
import sys
from pathlib import Path

import pytest


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "experiments")
    return importlib.import_module("depths_picture")


def run(method, loss=1.0, size=3):
    return {"method": method, "loss": loss, "accuracy": 0.5, "trainable_parameters": size}


RUNS = [
    run("base", 2.0),
    *(run(f"depth {d}, rank 1", 1 + 1 / d, 10 * d) for d in (3, 5)),
    run("depth 3, rank 4 + MoDE", 1.2, 90),
    run("depth 5, rank 16", 1.0, 800),
]


def test_a_line_a_rank(script):
    found = script.lines(RUNS)
    assert {line: list(own) for line, own in found.items()} == {
        "rank 1": [3, 5],
        "rank 4 + MoDE": [3],
        "rank 16": [5],
    }
    assert script.smallest(found["rank 1"]) == 30


def test_shares_of_the_gain(script):
    kept = script.kept_of(RUNS, "depth 5, rank 16")
    assert [kept(r) for r in (RUNS[0], RUNS[3], RUNS[4])] == pytest.approx([0, 80, 100])


def test_the_picture(script, tmp_path, monkeypatch):
    results = tmp_path / "results.json"
    experiment = {"baseline": "depth 5, rank 16"}
    results.write_text(json.dumps({"runs": RUNS, "experiment": experiment}))
    picture = tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", ["depths_picture.py", str(results), str(picture)])
    script.main()
    assert picture.stat().st_size > 5000
