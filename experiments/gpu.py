"""What one GPU shows in at most eight minutes: is it right, what does it cost, what does it keep.

    python experiments/gpu.py --model FOLDER --data mawps_train_raw.json --output gpu.json

No network is needed. On a CPU everything runs in small, which only shows that it runs. Parts that
are cut off by --minutes, or fail, are named in the JSON and lose none of the others.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from depthmix.files import write_text
from depthmix.provenance import command, versions
from gpu_correctness import correctness
from gpu_evidence import evidence
from gpu_losses import loss_alone
from gpu_objectives import objectives
from gpu_options import Options
from gpu_steps import decoding, steps

Row = dict[str, Any]
console = Console()

OBJECTIVES = 0.3  # of all minutes, for the last part

PARTS: dict[str, Callable[[Options, float], list[Row]]] = {
    "correctness": lambda options, _: correctness(options.model),
    "loss alone": lambda options, _: loss_alone(options.small),
    "steps": lambda options, _: steps(options.model, options.small),
    "decoding": lambda options, _: decoding(options.model, options.small),
    "evidence": lambda options, ends: evidence(options, ends - 60 * OBJECTIVES * options.minutes),
    "objectives": objectives,
}


def main() -> None:
    """Run all parts and write what they gave."""
    options = parse()
    ends = time.perf_counter() + 60 * options.minutes
    parts: dict[str, Row] = {}
    for name in PARTS:
        parts[name] = run(name, options, ends)
        show(name, parts[name])
        made_by = {"command": command(), "device": device_name(), "versions": versions()}
        write_text(options.output, json.dumps({"parts": parts, "made_by": made_by}, indent=1))
    console.print(f"figures: {options.output}")


def run(name: str, options: Options, ends: float) -> Row:
    """Run one part; what ends it is kept in place of its rows."""
    console.rule(name)
    if time.perf_counter() > ends:
        return {"rows": [], "error": "no time left"}
    began = time.perf_counter()
    try:
        rows, error = PARTS[name](options, ends), None
    except (RuntimeError, ValueError, OSError) as failure:  # a part that this machine cannot run
        rows, error = [], f"{type(failure).__name__}: {failure}"
    return {"rows": rows, "error": error, "seconds": time.perf_counter() - began}


def show(name: str, part: Row) -> None:
    """Print the rows of a part as a table."""
    if part["error"]:
        console.print(f"[red]{part['error']}", markup=True)
    if not part["rows"]:
        return
    columns = list(dict.fromkeys(key for row in part["rows"] for key in row))
    table = Table(title=name, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in part["rows"]:
        table.add_row(*(figure(row.get(column)) for column in columns))
    console.print(table)


def figure(value: Any) -> str:
    """Return a value as a table shows it."""
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def device_name() -> str:
    """Return the name of the GPU, or that there is none."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def parse() -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Check, time and compare on one GPU.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="folder of the model")
    add("--data", nargs="+", required=True, help="rows of prompt and completion")
    add("--output", type=Path, default=Path("gpu.json"), help="JSON file for all figures")
    add("--minutes", type=float, default=8.0, help="time for everything")
    add("--seeds", type=int, default=10, help="seeds of the comparisons")
    add("--workers", type=int, default=6, help="runs of a comparison at a time")
    given = parser.parse_args()
    return Options(**vars(given), small=not torch.cuda.is_available())


if __name__ == "__main__":
    main()
