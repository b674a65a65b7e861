"""Whether the router means anything: token classes, tasks and seeds of runs with MoDE, done before.

    python experiments/routing.py experiments/confirm_budgets*.yaml \\
        --method lora+mode --output docs/results/routing.json --picture docs/results/routing.png

Of each run, the router's weights on the rows that the comparison scored are compared between groups
of tokens, with permutation tests (depthmix.analysis.routing). What counts is what is more than
chance in every seed, with one sign: each seed starts and is trained afresh, on rows of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from comparison_runs import finished, scored_rows, tuned
from depthmix.analysis.layers import encode
from depthmix.analysis.observations import Observations, ObservedRow
from depthmix.analysis.observe import observe
from depthmix.analysis.predictors import gain_over_last
from depthmix.analysis.routing import Difference, differences, groupings
from depthmix.compare.engine import Cell
from depthmix.files import write_text
from depthmix.pretrained import ignore_renamed_properties

Run = dict[str, Any]
GAIN = "gain over the last layer"


def main() -> None:
    """Look at every run, print what the seeds have in common, draw it."""
    parser = argparse.ArgumentParser(description="Compare routing over tasks and seeds.")
    parser.add_argument("experiments", type=Path, nargs="+", help="as of depthmix compare, done")
    parser.add_argument("--method", default="lora+mode", help="whose runs are looked at")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--picture", type=Path, help="PNG file to write")
    options = parser.parse_args()
    ignore_renamed_properties()
    runs = [
        looked_at(cell)
        for path in options.experiments
        for cell in finished(path)
        if cell.method == options.method
    ]
    write_text(options.output, json.dumps(runs, indent=1))
    show(runs)
    if options.picture:
        draw(runs, options.picture)


def looked_at(cell: Cell) -> Run:
    """Return what the router of one run does on the rows that were scored."""
    model, tokenizer = tuned(cell)
    rows = [_row(*encode(row, tokenizer)) for row in scored_rows(cell)]
    seen = observe(model, rows)
    groups = groupings(seen, rows, tokenizer)
    gain, error = gain_over_last(seen)
    return {
        "task": cell.task,
        "seed": cell.seed,
        "layers": list(seen.late),
        "weights": _learned(seen).gate.mean(axis=0).tolist(),
        "entropy": float(_learned(seen).entropy.mean()),
        GAIN: [gain, error],
        "differences": [vars(line) for line in differences(seen.gate, seen.row, groups)],
    }


def _row(ids: list[int], prompt: int) -> ObservedRow:
    return ObservedRow(ids, [place >= prompt for place in range(len(ids))])


def _learned(seen: Observations) -> Observations:
    return seen.where(seen.supervised)


def common(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return for each group and layer of one task what its seeds found.

    `agree`: it is there and more than chance in all of them, with one sign.
    """
    by_seed = [{_key(line): line for line in run["differences"]} for run in runs]
    found = []
    for key in by_seed[0]:
        lines = [Difference(**seed[key]) for seed in by_seed if key in seed]
        signs = {np.sign(line.difference) for line in lines}
        found.append(
            {
                "grouping": key[0],
                "group": key[1],
                "layer": runs[0]["layers"][key[2]],
                "tokens": lines[0].tokens,
                "weights": [line.weight for line in lines],
                "differences": [line.difference for line in lines],
                "real": sum(line.is_real for line in lines),
                "agree": all(line.is_real for line in lines)
                and len(lines) == len(runs)
                and len(signs) == 1,
            }
        )
    return found


def _key(line: dict[str, Any]) -> tuple[str, str, int]:
    return line["grouping"], line["group"], line["layer"]


def by_task(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Return the runs of each task."""
    tasks: dict[str, list[Run]] = {}
    for run in runs:
        tasks.setdefault(run["task"], []).append(run)
    return tasks


def show(runs: Sequence[Run]) -> None:
    """Print a table of tasks and groupings, and what of it all seeds agree on."""
    table = Table("task", "grouping", "tests", "real in one seed", "in all, one sign", "largest")
    told = []
    for task, own in by_task(runs).items():
        lines = common(own)
        for grouping in dict.fromkeys(line["grouping"] for line in lines):
            some = [line for line in lines if line["grouping"] == grouping]
            agreed = [line for line in some if line["agree"]]
            sizes = [abs(float(np.mean(line["differences"]))) for line in agreed]
            table.add_row(
                task,
                grouping,
                str(len(some)),
                str(sum(line["real"] > 0 for line in some)),
                str(len(agreed)),
                f"{max(sizes):.3f}" if sizes else "",
            )
        for line in lines:
            if line["agree"] and line["layer"] == own[0]["layers"][-1]:
                listed = ", ".join(f"{size:+.4f}" for size in line["differences"])
                told.append(f"{task}, {line['grouping']}, {line['group']}: last layer {listed}")
    console = Console()
    console.print(table)
    console.print("\n".join(told))
    for run in runs:
        weights = ", ".join(f"{weight:.3f}" for weight in run["weights"])
        name = f"{run['task']}, seed {run['seed']}"
        console.print(f"{name}: weights {weights}, entropy {run['entropy']:.3f}")
        if GAIN in run:
            gain, error = run[GAIN]
            console.print(f"  better than the last layer by {gain:+.4f} ± {error:.4f} nats")


def draw(runs: Sequence[Run], path: Path) -> None:
    """Draw the last layer's weight by token class, one panel a task and one mark a seed.

    A mark is filled where the difference is more than chance.
    """
    from matplotlib.figure import Figure

    from depthmix.charts import PALETTE

    tasks = by_task(runs)
    figure = Figure(figsize=(4.4 * len(tasks), 3.6), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for axes, (task, own) in zip(panels, tasks.items(), strict=True):
        last = own[0]["layers"][-1]
        lines = [
            line
            for line in common(own)
            if line["grouping"].startswith("token class") and line["layer"] == last
        ]
        names = [_label(line) for line in lines]
        seeds = []
        for seed in range(len(own)):
            colour = PALETTE[seed]
            (mark,) = axes.plot([], [], "o", color=colour, label=f"seed {own[seed]['seed']}")
            seeds.append(mark)
            for place, line in enumerate(lines):
                real = Difference(**_of(own[seed], line)).is_real
                face = colour if real else "none"
                axes.plot(line["differences"][seed], place, "o", color=colour, markerfacecolor=face)
        axes.axvline(0, color="0.6", linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_title(task)
    figure.supxlabel(f"weight of layer {last}, less that of the row's other tokens", fontsize=10)
    figure.legend(handles=seeds, loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def _label(line: dict[str, Any]) -> str:
    return str(line["group"]) + (" (prompt)" if line["grouping"].endswith("prompts") else "")


def _of(run: Run, line: dict[str, Any]) -> dict[str, Any]:
    place = run["layers"].index(line["layer"])
    key = (line["grouping"], line["group"], place)
    found: dict[str, Any] = next(d for d in run["differences"] if _key(d) == key)
    return found


if __name__ == "__main__":
    main()
