"""What each budget keeps, against time, and what depth and rank do: one comparison of many runs."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from depthmix.compare.over_time import curves, seconds_to
from gpu_options import Options

Row = dict[str, Any]

# The budgets, and MoDE on each.
BUDGETS: dict[str, Row] = {
    "lora": {"mode": False, "budget": "full", "learning_rate": 1e-3},
    "lora+mode": {"budget": "full", "learning_rate": 1e-3},
    "half": {"mode": False, "budget": "half", "learning_rate": 2e-3},
    "light": {"mode": False, "budget": "light", "learning_rate": 8e-3},
    "light+mode": {"budget": "light", "learning_rate": 8e-3, "adaptation": "norm"},
}
# How deep, and of what rank; the rate that rank 1 wants is higher.
SHARES, RATES = (0.1, 0.25, 0.5, 0.75), {1: 8e-3, 4: 4e-3, 16: 2e-3}


def evidence(options: Options, ends: float) -> list[Row]:
    """Return one row a method: loss, accuracy, and when it is as good as 95 % of LoRA's best.

    Seeds come one after another, so that a comparison that runs out of time has whole ones.

    Args:
        options: of the command line.
        ends: by `time.perf_counter`; the comparison is stopped then.
    """
    return list(_rows(compared(options, ends, partial(_experiment, options))))


def compared(options: Options, ends: float, experiment: Callable[[str, int], Row]) -> list[Row]:
    """Run a comparison, one seed more at a time, and return the runs of whole seeds.

    Args:
        options: of the command line.
        ends: by `time.perf_counter`; the comparison is stopped then.
        experiment: output folder and number of seeds -> what an experiment file says.
    """
    runs: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for seeds in range(1, options.seeds + 1):
            path = Path(folder) / "experiment.yaml"
            path.write_text(yaml.safe_dump(experiment(folder, seeds), sort_keys=False), "utf-8")
            command = [sys.executable, "-m", "depthmix", "compare", str(path)]
            command += ["--workers", str(options.workers)]
            left = max(1.0, ends - time.perf_counter())
            try:
                subprocess.run(command, check=False, timeout=left, stdout=subprocess.DEVNULL)
            except subprocess.TimeoutExpired:
                break
            runs = json.loads((Path(folder) / "results.json").read_text("utf-8"))["runs"]
    return runs


def _experiment(options: Options, folder: str, seeds: int) -> Row:
    depths = {
        f"last {share:g}, rank {rank}": {
            "mode": False,
            "tuned_layers": str(share),
            "lora_r": rank,
            "lora_alpha": 2 * rank,
            "learning_rate": rate,
        }
        for share in SHARES
        for rank, rate in RATES.items()
    }
    rows = (6, 4) if options.small else (320, 200)
    return {
        "model_name_or_path": options.model,
        "output_dir": folder,
        "baseline": "lora",
        "split": "test",
        "seeds": list(range(1, seeds + 1)),
        "defaults": {
            "num_train_epochs": 2 if options.small else 4,
            "per_device_train_batch_size": 8,
            "lora_dropout": 0.0,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.1,
            "k": 2 if options.small else 3,
        },
        "methods": BUDGETS if options.small else {**BUDGETS, **depths},
        "tasks": {
            "rows": {
                "dataset": options.data,
                "train_rows": rows[0],
                "validation_rows": 1,
                "test_rows": rows[1],
            }
        },
    }


def _rows(runs: list[Row]) -> list[Row]:
    found = curves(runs, "accuracy")
    best = max((p[1] for p in found.get("lora", ())), default=0.0)
    rows = []
    for method, points in found.items():
        own = [run for run in runs if run["method"] == method]
        rows.append(
            {
                "method": method,
                "seeds": len(own),
                "parameters": own[0]["trainable_parameters"],
                "loss": statistics.mean(run["loss"] for run in own),
                "accuracy": statistics.mean(run["accuracy"] for run in own),
                "± of the mean": error_of_mean([run["accuracy"] for run in own]),
                "seconds": statistics.mean(run["seconds"] for run in own),
                "seconds to 95 %": seconds_to(points, 0.95 * best),
            }
        )
    return rows


def error_of_mean(values: list[float]) -> float | None:
    """Return the standard error of a mean; None of a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
