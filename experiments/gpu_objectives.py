"""Divergences, and rewards with MoDE and without: the experiment files of that name, on one GPU."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from gpu_evidence import compared, error_of_mean
from gpu_options import Options

Row = dict[str, Any]
FILES = ("divergences.yaml", "grpo.yaml")
_SMALL = {"num_train_epochs": 1, "k": 2}
_SMALL_ROWS = {"train_rows": 4, "validation_rows": 1, "test_rows": 2}


def objectives(options: Options, ends: float) -> list[Row]:
    """Return one row a task and method of both files.

    They are one comparison, so that a seed that is whole has all of them.

    Args:
        options: of the command line.
        ends: by `time.perf_counter`; the comparison is stopped then.
    """
    return list(_rows(compared(options, ends, partial(_experiment, options))))


def _experiment(options: Options, folder: str, seeds: int) -> Row:
    """Return both files as one experiment, on the tasks of the second."""
    supervised, rewarded = (
        yaml.safe_load((Path(__file__).parent / name).read_text("utf-8")) for name in FILES
    )
    methods = {
        name: {**file["defaults"], **method, **(_small(method) if options.small else {})}
        for file in (supervised, rewarded)
        for name, method in file["methods"].items()
    }
    tasks = rewarded["tasks"]
    if options.small:
        tasks = {"sums": {**tasks["sums"], **_SMALL_ROWS}}
    return {
        **rewarded,
        "model_name_or_path": options.model,
        "output_dir": folder,
        "seeds": list(range(1, seeds + 1)),
        "defaults": {},
        "methods": methods,
        "tasks": tasks,
    }


def _small(method: Row) -> Row:
    """Return what makes a method run on a model of two layers, in a moment."""
    if "after" not in method:
        return _SMALL
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    return {"max_steps": 1, "k": 2, **sizes}


def _rows(runs: list[Row]) -> list[Row]:
    rows = []
    for task, method in dict.fromkeys((run["task"], run["method"]) for run in runs):
        own = [run for run in runs if (run["task"], run["method"]) == (task, method)]
        accuracies = [run["accuracy"] for run in own]
        rows.append(
            {
                "task": task,
                "method": method,
                "seeds": len(own),
                "loss": statistics.mean(run["loss"] for run in own),
                "accuracy": statistics.mean(accuracies),
                "± of the mean": error_of_mean(accuracies),
                "seconds": statistics.mean(run["seconds"] for run in own),
            }
        )
    return rows
