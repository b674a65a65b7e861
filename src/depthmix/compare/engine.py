"""Run an experiment: each run in a folder named by the digest of all that decides its outcome."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

import depthmix
from depthmix.carry.saved_run import SavedRun
from depthmix.compare.experiment import Experiment
from depthmix.compare.rows import TaskRows, digest, load_rows
from depthmix.compare.spread import LOG
from depthmix.files import write_text
from depthmix.pretrained import require_no_adapter

RESULT, TRAIN, TRAIN_ROWS, SCORED_ROWS = "result.json", "train.yaml", "train.jsonl", "score.jsonl"


@dataclass(frozen=True)
class Cell:
    """One run: a task, a method, a seed, and the folder that it lives in."""

    task: str
    method: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """What the cell is called in messages."""
        return f"{self.task}, {self.method}, seed {self.seed}"

    def result(self) -> dict[str, Any] | None:
        """Return what the run wrote, or None if it is not done."""
        path = self.folder / RESULT
        return json.loads(path.read_text("utf-8")) if path.exists() else None


def prepare(experiment: Experiment) -> list[Cell]:
    """Write the data and the configuration of every run, and return the runs.

    A run that was prepared before, with the same options, rows and model, has the same folder.
    """
    rows = {name: load_rows(name, task) for name, task in experiment.tasks.items()}
    return list(_cells(experiment, rows))


def _cells(experiment: Experiment, rows: dict[str, TaskRows]) -> Iterator[Cell]:
    version = depthmix.__version__
    base = SavedRun.find(experiment.model_name_or_path)
    require_no_adapter(base)
    model = base.digest()
    for task in experiment.tasks:
        scored = rows[task].scored(experiment.split)
        for method in experiment.methods:
            for seed in experiment.seeds:
                training = rows[task].training(experiment.tasks[task].train_rows, seed)
                options = {
                    **_DEFAULTS,
                    **experiment.options_of(method),
                    "dataset_format": "prompt_completion",
                    "seed": seed,
                }
                identity = digest([version, model, options, training, scored])
                folder = Path(experiment.output_dir) / "runs" / f"{task}-{method}-{seed}-{identity}"
                named = {"model_name_or_path": experiment.model_name_or_path, **options}
                _write(folder, named, training, scored)
                yield Cell(task, method, seed, folder)


_DEFAULTS = {
    "num_train_epochs": 1,
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 5,
    "overwrite": True,
}


def _write(folder: Path, options: dict[str, Any], training: Any, scored: Any) -> None:
    if (folder / TRAIN).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in ((TRAIN_ROWS, training), (SCORED_ROWS, scored)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    paths = {"dataset": [str(folder / TRAIN_ROWS)], "output_dir": str(folder / "tuned")}
    # Last, since its presence says that the others are there.
    write_text(folder / TRAIN, yaml.safe_dump({**options, **paths}, sort_keys=False))


Outcomes = Iterator[tuple[Path, int]]


def run_all(cells: list[Cell], run: Callable[[list[Path]], Outcomes]) -> list[str]:
    """Run what is not done yet and return what failed, a line each.

    A run that fails is reported and loses none of the others. Ctrl-C stops all; what is done stays.

    Args:
        cells: what `prepare` returned.
        run: runs folders and yields each with its exit status; see `spread`.
    """
    waiting = {cell.folder: cell for cell in cells if cell.result() is None}
    failed: list[str] = []
    with tqdm(total=len(cells), initial=len(cells) - len(waiting), unit="run") as progress:
        for folder, status in run(list(waiting)):
            progress.update()
            if status == 130:
                raise KeyboardInterrupt
            if status != 0:
                cell = waiting[folder]
                failed.append(f"{cell.name}: exit status {status}, see {folder / LOG}")
    return failed


def collect(experiment: Experiment, cells: list[Cell]) -> dict[str, Any]:
    """Return `runs` and `differences` of all that is done, and the experiment itself."""
    from depthmix.compare.bootstrap import differences

    done = [(cell, result) for cell in cells if (result := cell.result()) is not None]
    runs = [
        {
            "task": cell.task,
            "method": cell.method,
            "seed": cell.seed,
            "split": experiment.split,
            **result["metrics"],
            "versions": result["versions"],
            "command": result["command"],
        }
        for cell, result in done
    ]
    rows = {(cell.task, cell.method, cell.seed): result["rows"] for cell, result in done}
    return {
        "experiment": {**asdict(experiment)},
        "runs": runs,
        "differences": differences(rows, experiment.baseline),
    }
