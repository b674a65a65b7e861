"""Tune a small language model with LoRA + MoDE on arithmetic, and compare it with its base.

    python examples/demo.py                                  # offline, two CPU cores
    python examples/demo.py --model Qwen/Qwen3-0.6B --train-examples 4000    # hub and GPU

Everything goes to --output: the data, the configuration, the adapter, every reply, results.json
and routing.png. Tuning is `depthmix train CONFIG.yaml`; scoring runs in fresh processes.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

import depthmix
from demo_plot import plot_routing
from demo_task import TASKS, make_rows, write_rows

Row = dict[str, Any]

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "peft", "trl", "reasoning-gym")
TITLES = {"base": "base", "lora": "LoRA", "mode": "LoRA + MoDE"}
console = Console()


def main() -> None:
    """Run all steps."""
    options = parse()
    options.output.mkdir(parents=True, exist_ok=True)
    step("Model")
    options.model = options.model or embedded_folder()
    console.print(options.model)
    step("Data")
    write_data(options)
    step("Score the base model")
    results = {"base": score("base", options)}
    for name in ("lora", "mode") if options.with_lora else ("mode",):
        step(f"Tune {TITLES[name]}")
        tuning = tune(name, options)
        step(f"Score {TITLES[name]}")
        results[name] = {**score(name, options), **tuning}
    step("Result")
    report(results, options)


def embedded_folder() -> str:
    """Unpack the model that needs no network."""
    from embedded_model import embedded_model

    return str(embedded_model())


def write_data(options: argparse.Namespace) -> None:
    """Write train.jsonl and test.jsonl; no test question stands among the training questions."""
    training, testing = make_rows(
        TASKS[options.task], options.train_examples, options.test_examples, options.seed
    )
    # The trainer gets prompt and completion alone.
    pairs = [{"prompt": row["prompt"], "completion": row["completion"]} for row in training]
    write_rows(pairs, options.output / "train.jsonl")
    write_rows(testing, options.output / "test.jsonl")
    console.print(f"{len(training)} training and {len(testing)} test questions, such as:")
    console.print(f"{testing[0]['prompt']}{testing[0]['completion']}", style="cyan", markup=False)


def tune(name: str, options: argparse.Namespace) -> Row:
    """Tune with `depthmix train`; return the seconds and the number of trained parameters."""
    folder = options.output / name
    config = {
        "model_name_or_path": options.model,
        "dataset": [str(options.output / "train.jsonl")],
        "output_dir": str(folder),
        "overwrite": True,
        "mode": name == "mode",
        "k": options.k,
        "method": "lora",
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.05,
        "seed": options.seed,
        "logging_steps": 10,
        "save_strategy": "no",
        "report_to": "none",
    }
    path = options.output / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), "utf-8")
    begin = time.perf_counter()
    call("-m", "depthmix", "train", path)
    seconds = time.perf_counter() - begin
    return {"tuning_seconds": seconds, "parameters": parameters(folder)}


def parameters(folder: Path) -> int:
    """Count the numbers in an adapter's file, less MoDE's description of itself."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
        tensors = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118, no mapping
    return sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())


def score(name: str, options: argparse.Namespace) -> Row:
    """Score the base model or an adapter in a fresh process."""
    result = options.output / f"{name}-scores.json"
    arguments: list[object] = ["--model", options.model, "--task", options.task]
    arguments += ["--data", options.output / "test.jsonl", "--output", result]
    if name != "base":
        arguments += ["--adapter", options.output / name]
    if name == "lora":
        arguments += ["--no-mode"]
    call(HERE / "demo_score.py", *arguments)
    scores: Row = json.loads(result.read_text("utf-8"))
    console.print(f"accuracy {scores['accuracy']:.1%}, held-out loss {scores['loss']:.3f}")
    return scores


def report(results: dict[str, Row], options: argparse.Namespace) -> None:
    """Print the table; write results.json and routing.png."""
    console.print(table(results))
    plot_routing(results["mode"], options.output / "routing.png")
    figures = {
        name: {key: value for key, value in row.items() if key not in ("replies", "pictured")}
        for name, row in results.items()
    }
    made_by = {
        "command": " ".join(["python", "examples/demo.py", *sys.argv[1:]]),
        "options": {key: str(value) for key, value in vars(options).items()},
        "python": platform.python_version(),
        "versions": {"depthmix": depthmix.__version__} | {name: version(name) for name in PACKAGES},
    }
    written = json.dumps({"results": figures, "made_by": made_by}, indent=1)
    (options.output / "results.json").write_text(written, "utf-8")
    folder = options.output
    console.print(f"Figures: {folder}/results.json; routing: {folder}/routing.png")
    console.print(f'Try it: depthmix generate {folder}/mode --prompt "..."', markup=False)


def table(results: dict[str, Row]) -> Table:
    """Return one row a figure, one column a model."""
    out = Table(title=f"{results['base']['questions']} test questions, greedy answers")
    out.add_column("")
    for name in results:
        out.add_column(TITLES[name], justify="right")
    rows = {
        "accuracy": [f"{r['accuracy']:.1%} ± {r['standard_error']:.1%}" for r in results.values()],
        "held-out loss": [f"{r['loss']:.3f}" for r in results.values()],
        "trained parameters": [f"{r.get('parameters', 0):,}" for r in results.values()],
        "seconds to tune": [f"{r.get('tuning_seconds', 0):.0f}" for r in results.values()],
        "seconds to score": [f"{r['seconds']:.0f}" for r in results.values()],
    }
    for i, layer in enumerate(results["mode"]["layers"]):
        gates = [row.get("gate") for row in results.values()]
        rows[f"mean weight, layer {layer + 1}"] = [
            f"{gate[i]:.3f}" if gate else "" for gate in gates
        ]
    for title, cells in rows.items():
        out.add_row(title, *cells)
    return out


def call(*arguments: object) -> None:
    """Run Python in a new process; stop the demo where it fails."""
    done = subprocess.run([sys.executable, *map(str, arguments)], check=False)
    if done.returncode:
        sys.exit(done.returncode)


def step(title: str) -> None:
    """Print the heading of a step."""
    console.rule(title)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Tune a model with LoRA + MoDE and compare it with its base.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="folder or hub name; None: the embedded SmolLM2-135M-Instruct")
    add("--output", type=Path, default=Path("demo-output"), help="folder for all that is made")
    add("--task", choices=TASKS, default="sums", help="kind of the questions")
    add("--train-examples", type=int, default=1000, help="questions to train on")
    add("--test-examples", type=int, default=200, help="questions to score on")
    add("--epochs", type=float, default=1.0, help="passes over the training questions")
    add("--batch-size", type=int, default=8, help="training questions a step")
    add("--learning-rate", type=float, default=5e-4, help="of LoRA; MoDE's parts have their own")
    add("--k", type=int, default=3, help="late layers in the ensemble")
    add("--seed", type=int, default=1, help="of data and training")
    add("--with-lora", action="store_true", help="also tune LoRA alone, for comparison")
    return parser.parse_args()


if __name__ == "__main__":
    main()
