"""The rows of a task: fixed rows to score on, and a seed's own training rows."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass
from typing import Any

from depthmix.compare.experiment import Split, Task
from depthmix.errors import ConfigError

Row = dict[str, str]


@dataclass(frozen=True)
class TaskRows:
    """Rows of prompt and completion."""

    validation: list[Row]
    test: list[Row]
    pool: list[Row]

    def scored(self, split: Split) -> list[Row]:
        """Return the rows to score on."""
        return self.test if split == "test" else self.validation

    def training(self, count: int, seed: int) -> list[Row]:
        """Return the training rows of a seed, in their order."""
        return random.Random(seed).sample(self.pool, count)


def load_rows(name: str, task: Task) -> TaskRows:
    """Load a task's rows; rows with a prompt that stood before are left out.

    Raises:
        DataError: a source is missing or a row is broken.
        ConfigError: there are fewer rows than the task asks for.
    """
    from depthmix.data.load import load_data

    data, kind = load_data(task.dataset, format=task.dataset_format, template=task.dataset_template)
    if "completion" not in data.column_names or kind == "chat_completion":
        raise ConfigError(f"task {name}: rows of format {kind} have no prompt and completion")
    unique: dict[str, Row] = {}
    for row in data:
        if task.most_characters is None or _length(row) <= task.most_characters:
            unique.setdefault(row["prompt"], row)
    rows = list(unique.values())
    random.Random(0).shuffle(rows)
    held_out = task.test_rows + task.validation_rows
    if len(rows) < held_out + task.train_rows:
        raise ConfigError(
            f"task {name}: {len(rows)} different rows, but {held_out} to score on and "
            f"{task.train_rows} to train on are asked for"
        )
    return TaskRows(rows[task.test_rows : held_out], rows[: task.test_rows], rows[held_out:])


def digest(value: Any) -> str:
    """Return a short digest of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def _length(row: Row) -> int:
    return len(row["prompt"]) + len(row["completion"])
