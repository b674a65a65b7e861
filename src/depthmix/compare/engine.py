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
from depthmix.compare.experiment import AFTER, Experiment
from depthmix.compare.rows import Row, TaskRows, digest, load_rows
from depthmix.compare.spread import LOG
from depthmix.errors import ConfigError
from depthmix.files import write_text
from depthmix.pretrained import require_no_adapter
from depthmix.train.arguments import TrainArguments, resolve
from depthmix.train.checks import require_possible
from depthmix.train.given import Given
from depthmix.train.run_options import Objective, RunOptions

RESULT, TRAIN, TRAIN_ROWS, SCORED_ROWS = "result.json", "train.yaml", "train.jsonl", "score.jsonl"
CALIBRATION_ROWS = "calibrate.jsonl"
TUNED = "tuned"


@dataclass(frozen=True)
class Cell:
    """One run: a task, a method, a seed, and the folder that it lives in.

    Attributes:
        start: the run whose adapter this one begins with; None to begin at the base model.
    """

    task: str
    method: str
    seed: int
    folder: Path
    start: Cell | None = None

    @property
    def name(self) -> str:
        """What the cell is called in messages."""
        return f"{self.task}, {self.method}, seed {self.seed}"

    def result(self) -> dict[str, Any] | None:
        """Return what the run wrote, or None if it is not done."""
        path = self.folder / RESULT
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    @property
    def ready(self) -> bool:
        """Whether there is what the run begins with."""
        return self.start is None or self.start.result() is not None


def prepare(experiment: Experiment) -> list[Cell]:
    """Write the data and the configuration of every run, and return the runs.

    A run that was prepared before, with the same options, rows and weights of the model, has the
    same folder.

    Raises:
        ConfigError: a method has an option that cannot be; rows are too few.
        DataError: a source is missing or a row is broken.
    """
    runs = {name: _checked(experiment, name).run for name in experiment.methods}
    rows = {name: load_rows(name, task) for name, task in experiment.tasks.items()}
    return list(_cells(experiment, rows, runs))


# What a comparison decides for every run.
_OURS = (
    *("model_name_or_path", "dataset", "dataset_format", "output_dir", "seed"),
    *("resume", "resume_from_checkpoint", "overwrite", "push_to_hub"),
)


def _checked(experiment: Experiment, method: str) -> TrainArguments:
    """Return the options of a method; refuse as `depthmix train` would, before the first run."""
    given = experiment.given_of(method)
    for name in _OURS:
        if name in given:
            raise ConfigError(f"{given[name].place}: decided by the comparison, not by a method")
    fixed = {
        "model_name_or_path": experiment.model_name_or_path,
        "dataset": [TRAIN_ROWS],
        "output_dir": experiment.output_dir,
        **(_evaluating([CALIBRATION_ROWS]) if "calibrate" in given else {}),
    }
    place = f"method {method}"
    try:
        arguments = resolve({**given, **{n: Given(v, place) for n, v in fixed.items()}})
        require_possible(arguments)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
    objective = arguments.run.objective
    if objective not in _FORMATS:
        raise ConfigError(f"{place}: objective {objective} needs pairs, which no task has")
    if experiment.start_of(method) and objective == "sft":
        after = experiment.methods[method][AFTER]
        raise ConfigError(f"{after.place}: objective sft begins at the base model, grpo may")
    return arguments


def _evaluating(dataset: list[str]) -> dict[str, Any]:
    """Return the options of a run that has evaluation rows for its temperature alone."""
    return {"eval_dataset": dataset, "eval_strategy": "no"}


def _cells(
    experiment: Experiment, rows: dict[str, TaskRows], runs: dict[str, RunOptions]
) -> Iterator[Cell]:
    version = depthmix.__version__
    revisions = {
        method: experiment.options_of(method).get("model_revision") for method in experiment.methods
    }
    models = {at: _weights(experiment.model_name_or_path, at) for at in set(revisions.values())}
    cells: dict[tuple[str, str | None, int], Cell] = {}
    for task in experiment.tasks:
        scored = rows[task].scored(experiment.split)
        for method in experiment.methods:
            for seed in experiment.seeds:
                start = cells.get((task, experiment.start_of(method), seed))
                training = rows[task].training(experiment.tasks[task].train_rows, seed)
                options = {
                    **_DEFAULTS,
                    **experiment.options_of(method),
                    "dataset_format": _FORMATS[runs[method].objective],
                    "seed": seed,
                }
                written = {TRAIN_ROWS: training, SCORED_ROWS: scored}
                if runs[method].calibrate:
                    written[CALIBRATION_ROWS] = rows[task].validation
                began = start.folder.name if start else models[revisions[method]]
                identity = digest([version, began, options, *written.values()])
                folder = Path(experiment.output_dir) / "runs" / f"{task}-{method}-{seed}-{identity}"
                begins = str(start.folder / TUNED) if start else experiment.model_name_or_path
                _write(folder, {"model_name_or_path": begins, **options}, written)
                cells[task, method, seed] = Cell(task, method, seed, folder, start)
                yield cells[task, method, seed]


def _weights(model: str, revision: str | None) -> str:
    """Return the digest of a base model's weights."""
    base = SavedRun.find(model, revision)
    require_no_adapter(base)
    return base.digest()


# How a row is read; a task has prompts and completions, and no pairs.
_FORMATS: dict[Objective, str] = {"sft": "prompt_completion", "grpo": "prompt"}

_DEFAULTS = {
    "num_train_epochs": 1,
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 5,
    "overwrite": True,
}


def _write(folder: Path, options: dict[str, Any], written: dict[str, list[Row]]) -> None:
    if (folder / RESULT).exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in written.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    paths: dict[str, Any] = {
        "dataset": [str(folder / TRAIN_ROWS)],
        "output_dir": str(folder / TUNED),
    }
    if CALIBRATION_ROWS in written:
        paths |= _evaluating([str(folder / CALIBRATION_ROWS)])
    # Last, since its presence says that the others are there.
    write_text(folder / TRAIN, yaml.safe_dump({**options, **paths}, sort_keys=False))


Outcomes = Iterator[tuple[Path, int]]


def run_all(cells: list[Cell], run: Callable[[list[Path]], Outcomes]) -> list[str]:
    """Run what is not done yet and return what failed, a line each.

    Runs that begin with another one's adapter come once all others are done. A run that fails is
    reported and loses none but those that begin with it. Ctrl-C stops all; what is done stays.

    Args:
        cells: what `prepare` returned.
        run: runs folders and yields each with its exit status; see `spread`.
    """
    waiting = {cell.folder: cell for cell in cells if cell.result() is None}
    failed: list[str] = []
    with tqdm(total=len(cells), initial=len(cells) - len(waiting), unit="run") as progress:
        while ready := [folder for folder, cell in waiting.items() if cell.ready]:
            for folder, status in run(ready):
                cell = waiting.pop(folder)
                progress.update()
                progress.write(_told(cell, status))
                if status in (130, 143):
                    raise KeyboardInterrupt
                if status != 0:
                    failed.append(_told(cell, status))
    return failed + [_not_run(cell) for cell in waiting.values()]


def _not_run(cell: Cell) -> str:
    assert cell.start is not None  # or the cell would have run
    return f"{cell.name}: not run, since {cell.start.name}, failed"


def _told(cell: Cell, status: int) -> str:
    """Return in a line how a run has ended."""
    result = cell.result()
    if result is None:
        said = (cell.folder / LOG).read_text("utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(said) if line.strip()), "no message")
        why = last.removeprefix("depthmix: error: ")
        return f"{cell.name}: exit status {status}: {why} (see {cell.folder / LOG})"
    figures = result["metrics"]
    return (
        f"{cell.name}: loss {figures['loss']:.3f}, accuracy {figures['accuracy']:.3f}, "
        f"{figures['seconds']:.0f} s"
    )


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
            "folder": str(cell.folder),
            **result["metrics"],
            "versions": result["versions"],
            "command": result["command"],
        }
        for cell, result in done
    ]
    rows = {(cell.task, cell.method, cell.seed): result["rows"] for cell, result in done}
    described = {
        **{name: value for name, value in vars(experiment).items() if name != "methods"},
        "methods": {
            method: {name: given.text for name, given in own.items()}
            for method, own in experiment.methods.items()
        },
        "tasks": {name: asdict(task) for name, task in experiment.tasks.items()},
    }
    return {
        "experiment": described,
        "runs": runs,
        "differences": differences(rows, experiment.baseline),
    }
