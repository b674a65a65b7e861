"""What a temperature does for the runs of a comparison that is done, without training them again.

    python experiments/temperatures.py experiments/confirm_budgets*.yaml --output temperatures.json

Of each run, the temperature is fitted on the task's validation rows; loss and calibration error are
of the rows that the comparison scored, at 1 and at the temperature.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from comparison_runs import finished, scored_rows, tuned
from depthmix.analysis.layers import encode, score_rows, token_row
from depthmix.calibration.fit import fit_calibration
from depthmix.compare.engine import Cell
from depthmix.compare.experiment import read_experiment
from depthmix.compare.rows import Row, load_rows
from depthmix.files import write_text
from depthmix.model.temperature import set_temperature
from depthmix.pretrained import ignore_renamed_properties


def main() -> None:
    """Fit and score every run, and print means over the seeds."""
    parser = argparse.ArgumentParser(description="Fit a temperature to every run.")
    parser.add_argument(
        "experiments", type=Path, nargs="+", help="as of depthmix compare, whose runs are done"
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--methods", nargs="+", help="whose runs (default: all)")
    options = parser.parse_args()
    ignore_renamed_properties()
    chosen = list(runs(options.experiments, options.methods))
    found = [calibrated(cell, validation) for cell, validation in tqdm(chosen, unit="run")]
    write_text(options.output, json.dumps(found, indent=1))
    show(found)


def runs(experiments: list[Path], methods: list[str] | None) -> Iterator[tuple[Cell, list[Row]]]:
    """Give the finished runs, and the validation rows of their tasks."""
    for path in experiments:
        experiment = read_experiment(path)
        validation = {n: load_rows(n, task).validation for n, task in experiment.tasks.items()}
        for cell in finished(path):
            if methods is None or cell.method in methods:
                yield cell, validation[cell.task]


def calibrated(cell: Cell, validation: list[Row]) -> dict[str, Any]:
    """Return temperature, and loss and calibration error before and after, of one run."""
    model, tokenizer = tuned(cell)
    fitted = fit_calibration(model, [token_row(*encode(row, tokenizer)) for row in validation])
    rows = scored_rows(cell)
    figures: dict[str, Any] = {"task": cell.task, "method": cell.method, "seed": cell.seed}
    for name, temperature in (("before", 1.0), ("after", fitted.temperature)):
        set_temperature(model, temperature)
        scores = score_rows(model, tokenizer, rows)
        figures[name] = {"loss": scores.mean_loss, "ece": scores.reliability.error}
    return {**figures, "temperature": fitted.temperature}


def show(found: list[dict[str, Any]]) -> None:
    """Print means over the seeds."""
    table = Table("task", "method", "seeds", "T", "loss", "at T", "ECE", "at T ")
    for task, method in dict.fromkeys((run["task"], run["method"]) for run in found):
        own = [run for run in found if (run["task"], run["method"]) == (task, method)]
        cells = [statistics.mean(run["temperature"] for run in own)]
        for figure in ("loss", "ece"):
            cells += [statistics.mean(run[when][figure] for run in own) for when in WHEN]
        table.add_row(task, method, str(len(own)), *(f"{cell:.3f}" for cell in cells))
    Console().print(table)


WHEN = ("before", "after")

if __name__ == "__main__":
    main()
