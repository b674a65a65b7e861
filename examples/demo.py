"""The demo: what LoRA reaches on every layer, and what the light budget reaches in the same time.

    python examples/demo.py                                  # offline, two CPU cores
    python examples/demo.py --model Qwen/Qwen3-0.6B          # hub and GPU

It is one experiment for `depthmix compare`, on sums that reasoning-gym makes. Everything goes to
--output: the experiment, the adapters, results.json, accuracy.png and routing.png.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import logging

from demo_routing import plot_routing
from depthmix.compare.over_time import plot_over_time
from depthmix.tables import print_figures
from embedded_model import embedded_model

Run = dict[str, Any]

# Rates as chosen on validation rows (docs/experiments.md), for a model of 135M parameters; larger
# models want lower ones.
METHODS: dict[str, dict[str, Any]] = {
    "base": {"mode": False, "learning_rate": 0.0, "max_steps": 1},
    "lora": {"mode": False, "learning_rate": 1e-3},
    "light": {"mode": False, "budget": "light", "learning_rate": 4e-3},
    "light+mode": {"budget": "light", "learning_rate": 4e-3, "adaptation": "norm"},
}
SUMS = "reasoning_gym:chain_sum?size=3000&seed=1&min_terms=2&max_terms=2&min_digits=2&max_digits=2"


def main() -> None:
    """Compare, then show."""
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment(options), sort_keys=False), "utf-8")
    done = subprocess.run([sys.executable, "-m", "depthmix", "compare", str(path)], check=False)
    if done.returncode:
        sys.exit(done.returncode)
    results = json.loads((options.output / "results.json").read_text("utf-8"))
    runs = {run["method"]: run for run in results["runs"]}
    results["runs"] = [run for run in results["runs"] if run["method"] != "base"]
    plot_over_time(results, options.output / "accuracy.png", ("accuracy",))
    logging.disable_progress_bar()
    # PEFT asks for a property of transformers by its old name, at every model.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    tuned = Path(runs["light+mode"]["folder"])
    plot_routing(tuned, options.model, options.output / "routing.png")
    show(runs, options.test_rows)
    print(f"pictures: {options.output}/accuracy.png, {options.output}/routing.png")
    print(f'try it: depthmix generate {tuned}/tuned --prompt "..."')


def experiment(options: argparse.Namespace) -> dict[str, Any]:
    """Return the experiment file: one seed, every method as long as its epochs take."""
    return {
        "model_name_or_path": options.model,
        "output_dir": str(options.output),
        "baseline": "lora",
        "split": "test",
        "seeds": [options.seed],
        "defaults": {
            "num_train_epochs": options.epochs,
            "per_device_train_batch_size": 8,
            "lora_dropout": 0.0,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.1,
        },
        "methods": METHODS,
        "tasks": {
            "sums": {
                "dataset": [SUMS],
                "train_rows": options.train_rows,
                "validation_rows": 1,
                "test_rows": options.test_rows,
            }
        },
    }


def show(runs: dict[str, Run], rows: int) -> None:
    """Print one row a figure, one column a method."""
    print_figures(
        f"{rows} test rows, answered whole and exactly",
        ["", *runs],
        [[title, *map(figure, runs.values())] for title, figure in figures(rows).items()],
    )


def tuned_only(text: str, run: Run) -> str:
    """Return the text, or nothing for the base model."""
    return "" if run["method"] == "base" else text


def figures(rows: int) -> dict[str, Callable[[Run], str]]:
    """Return how each figure of a run is shown; accuracies with their standard errors."""
    return {
        "accuracy": lambda run: (
            f"{run['accuracy']:.1%} ± "
            f"{math.sqrt(run['accuracy'] * (1 - run['accuracy']) / rows):.1%}"
        ),
        "held-out loss": lambda run: f"{run['loss']:.3f}",
        "seconds to tune": lambda run: tuned_only(f"{run['seconds']:.0f}", run),
        "GiB of memory": lambda run: tuned_only(f"{run['peak_bytes'] / 2**30:.2f}", run),
        "trained parameters": lambda run: tuned_only(f"{run['trainable_parameters']:,}", run),
        "MB of the adapter": lambda run: tuned_only(f"{adapter_bytes(run) / 1e6:.1f}", run),
        "weights of layers": lambda run: " ".join(f"{g:.2f}" for g in run["gate"]),
    }


def adapter_bytes(run: Run) -> int:
    """Return the size of what was saved."""
    return (Path(run["folder"]) / "tuned" / "adapter_model.safetensors").stat().st_size


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Tune a small model by LoRA and by the light budget, and compare.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="folder or hub name; None: the embedded SmolLM2-135M-Instruct")
    add("--output", type=Path, default=Path("demo-output"), help="folder for all that is made")
    add("--train-rows", type=int, default=320, help="sums to train on")
    add("--test-rows", type=int, default=200, help="sums to score on")
    add("--epochs", type=float, default=4, help="passes over the training rows")
    add("--seed", type=int, default=1, help="of data and training")
    options = parser.parse_args()
    options.model = options.model or str(embedded_model())
    return options


if __name__ == "__main__":
    main()
