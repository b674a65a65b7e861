"""Draw what each depth and rank keeps of LoRA's gain against its parameters.

    depthmix compare experiments/depths_and_ranks.yaml --report docs/results/depths-and-ranks.md
    python experiments/depths_picture.py docs/results/depths-and-ranks.json picture.png

Shares are of the gain in loss over the untuned model, the method `base` of the experiment.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from depthmix.charts import legend_below, looks

Run = dict[str, Any]
METHOD = re.compile(r"depth (?P<depth>\d+), (?P<line>rank .+)")  # `rank 4`, `rank 4 + MoDE`
LABELLED = "rank 1"  # whose points are labelled by their depth


def main() -> None:
    """Read, and draw a line a rank."""
    parser = argparse.ArgumentParser(description="Draw depths and ranks.")
    parser.add_argument("results", type=Path, help="results.json of depths_and_ranks.yaml")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    options = parser.parse_args()
    results = json.loads(options.results.read_text("utf-8"))
    picture(results["runs"], results["experiment"]["baseline"]).savefig(options.picture, dpi=110)


def picture(runs: list[Run], baseline: str) -> Figure:
    """Return shares of the baseline's gain, and accuracies, by depth and rank."""
    figure = Figure(figsize=(10.4, 3.6), layout="constrained")
    shares, accuracies = figure.subplots(1, 2)
    found = lines(runs)
    kept = kept_of(runs, baseline)
    drawn_as = looks(found)
    for line, own in found.items():
        sizes = [run["trainable_parameters"] for run in own.values()]
        right = [100 * run["accuracy"] for run in own.values()]
        shares.plot(sizes, [kept(run) for run in own.values()], label=line, **drawn_as[line])
        accuracies.plot(sizes, right, label=line, **drawn_as[line])
    for depth, run in found[LABELLED].items():
        place = (run["trainable_parameters"], kept(run))
        shares.annotate(f"{depth} layers", place, (-6, 4), textcoords="offset points", ha="right")
    shares.set_ylabel("share of LoRA's gain in loss, %")
    accuracies.set_ylabel("rows right, %")
    for axes in (shares, accuracies):
        axes.set(xlabel="trained parameters", xscale="log")
        axes.set_xlim(left=min(map(smallest, found.values())) / 3)  # room for the labels
        axes.grid(alpha=0.3)
    legend_below(figure, shares)
    return figure


def kept_of(runs: list[Run], baseline: str) -> Callable[[Run], float]:
    """Return what gives the share, in percent, that a run keeps of the baseline's gain in loss."""
    loss = {run["method"]: run["loss"] for run in runs}
    return lambda run: 100 * (loss["base"] - run["loss"]) / (loss["base"] - loss[baseline])


def smallest(runs: dict[int, Run]) -> int:
    """Return the least number of parameters of a line."""
    return int(min(run["trainable_parameters"] for run in runs.values()))


def lines(runs: list[Run]) -> dict[str, dict[int, Run]]:
    """Return the runs of each line of the picture by depth."""
    found: dict[str, dict[int, Run]] = {}
    for run in runs:
        if match := METHOD.fullmatch(run["method"]):
            found.setdefault(match["line"], {})[int(match["depth"])] = run
    return found


if __name__ == "__main__":
    main()
