"""Draw what the budgets reach against time, from accuracies and from epochs that were timed alone.

    depthmix compare experiments/confirm_budgets.yaml --report docs/results/budgets.md
    depthmix bench --model FOLDER --parts cache --longest 32 --json bench.json
    python experiments/budgets_over_time.py docs/results/budgets.json bench.json picture.png

The runs of a comparison may have shared the machine with others; the epochs of the benchmark have
not. Time is in epochs of LoRA.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from depthmix.bench import epoch
from depthmix.compare.over_time import METRICS, plot_over_time, points_over_time, seconds_to

Run = dict[str, Any]

# Methods of the comparison by the variant of the benchmark that takes the same products.
VARIANTS = {"lora": None, "half": "half", "light": "light"}


def main() -> None:
    """Read, draw, and say when 95 and 99 % of LoRA's best accuracy are reached."""
    parser = argparse.ArgumentParser(description="Draw quality against time.")
    parser.add_argument("results", type=Path, help="results.json of a comparison")
    parser.add_argument("bench", type=Path, help="JSON of depthmix bench --parts cache")
    parser.add_argument("picture", type=Path, help="PNG file to write")
    parser.add_argument(
        "--metrics", nargs="+", default=["accuracy"], choices=METRICS, help="default: accuracy"
    )
    options = parser.parse_args()
    results = json.loads(options.results.read_text("utf-8"))
    timed = json.loads(options.bench.read_text("utf-8"))["cache"]
    trained = [run for run in results["runs"] if len(run["curve"]) > 1]  # all but the base
    results["runs"] = [retimed(run, timed) for run in trained]
    plot_over_time(results, options.picture, options.metrics, unit="epochs of LoRA")
    for line in reached(results["runs"]):
        print(line)


def retimed(run: Run, timed: Run) -> Run:
    """Return a run whose curve counts epochs of LoRA instead of seconds."""
    variant = VARIANTS[run["method"].split(",")[0].split("+")[0]]
    first, later = 1.0, 1.0
    if variant is not None:
        lora = timed[epoch.LORA_EPOCH]["seconds"]
        first = timed[epoch.row(variant, epoch.FIRST)]["seconds"] / lora
        later = timed[epoch.row(variant, epoch.LATER)]["seconds"] / lora
    curve = [{**p, "seconds": first + later * (p["epoch"] - 1)} for p in run["curve"]]
    return {**run, "curve": curve, "seconds": curve[-1]["seconds"]}


def reached(runs: list[Run]) -> list[str]:
    """Return when each method has 95 and 99 % of LoRA's best mean accuracy, a line each."""
    lines = []
    for task in dict.fromkeys(run["task"] for run in runs):
        curves = {
            method: points_over_time(
                [run for run in runs if (run["task"], run["method"]) == (task, method)], "accuracy"
            )
            for method in dict.fromkeys(run["method"] for run in runs if run["task"] == task)
        }
        best = max(point[1] for point in curves["lora"])
        for method, points in curves.items():
            times = [seconds_to(points, share * best) for share in (0.95, 0.99)]
            said = ["not reached" if t is None else f"{t:.2f} epochs of LoRA" for t in times]
            lines.append(f"{task}, {method}: 95 %: {said[0]}; 99 %: {said[1]}")
    return lines


if __name__ == "__main__":
    main()
