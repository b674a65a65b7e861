"""The runs of a comparison that is done, for what looks at them once more without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from depthmix.carry.saved_run import SavedRun
from depthmix.compare.engine import SCORED_ROWS, Cell, prepare
from depthmix.compare.experiment import read_experiment
from depthmix.compare.rows import Row
from depthmix.pretrained import Loading, load_saved, load_tokenizer


def finished(path: Path) -> list[Cell]:
    """Return the runs of an experiment file that have a result."""
    return [cell for cell in prepare(read_experiment(path)) if cell.result()]


def tuned(cell: Cell) -> tuple[Any, Any]:
    """Return the model of a run, and its tokenizer."""
    folder = str(cell.folder / "tuned")
    model = load_saved(SavedRun.find(folder), None, Loading(), is_trainable=False)
    return model, load_tokenizer(folder)


def scored_rows(cell: Cell) -> list[Row]:
    """Return the rows that the comparison scored."""
    lines = (cell.folder / SCORED_ROWS).read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]
