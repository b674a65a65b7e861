"""An experiment file: what is compared, on what, how often.

    model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct
    output_dir: comparison
    baseline: lora
    seeds: [1, 2, 3]
    split: validation              # or test, once, with the setting that was chosen
    defaults: {learning_rate: 1e-3, per_device_train_batch_size: 8}
    methods: {lora: {mode: false}, lora+mode: {k: 3}}
    tasks: {mawps: {dataset: [mawps_train_raw.json], train_rows: 320, test_rows: 200}}

`defaults` and the entries of a method are options of `depthmix train`, and read as it reads them;
but for `after`, which names an earlier method: a run then begins with the adapter that this one has
given for the same task and seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from depthmix.data.formats import FORMAT_NAMES
from depthmix.data.template import TEMPLATES
from depthmix.errors import ConfigError
from depthmix.train.given import Given, read_nested
from depthmix.train.options import Option, options, require_known
from depthmix.train.typed import typed

Split = Literal["validation", "test"]
T = TypeVar("T")
AFTER = "after"


@dataclass(frozen=True)
class Task:
    """Rows to train and to score on.

    One shuffle of the rows, the same for all, puts test rows first, then validation rows; what is
    left is what a run's seed draws its training rows from.

    Attributes:
        dataset: sources of `depthmix train --dataset`.
        train_rows: training rows of a run.
        validation_rows: rows that settings are chosen on.
        test_rows: rows that a chosen setting is confirmed on.
        dataset_format: as in `depthmix train`.
        dataset_template: as in `depthmix train`.
        most_characters: longer rows (prompt and completion) are left out; None keeps all.
    """

    dataset: list[str]
    train_rows: int
    validation_rows: int = 200
    test_rows: int = 200
    dataset_format: str = field(default="auto", metadata={"choices": FORMAT_NAMES})
    dataset_template: str | None = field(default=None, metadata={"choices": tuple(TEMPLATES)})
    most_characters: int | None = None


@dataclass(frozen=True)
class Experiment:
    """What an experiment file says; see the module's text.

    Attributes:
        methods: options of `depthmix train`, and `after`, by name of the method, as they were
            written, the defaults included.
    """

    model_name_or_path: str
    output_dir: str
    baseline: str
    methods: dict[str, dict[str, Given]]
    tasks: dict[str, Task]
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    split: Split = "test"

    def given(self, flags: Mapping[str, Given]) -> Experiment:
        """Return the experiment with options of `depthmix train` for all methods; they win."""
        methods = {name: {**own, **flags} for name, own in self.methods.items()}
        return replace(self, methods=methods)

    def options_of(self, method: str) -> dict[str, Any]:
        """Return the options of `depthmix train` for a method, as they were written."""
        return {name: given.text for name, given in self.given_of(method).items()}

    def given_of(self, method: str) -> dict[str, Given]:
        """Return the same with their places."""
        return _without(self.methods[method], (AFTER,))

    def start_of(self, method: str) -> str | None:
        """Return the method whose adapters the runs of a method begin with, if there is one."""
        after = self.methods[method].get(AFTER)
        return None if after is None else str(after.text)


_PARTS = ("defaults", "methods", "tasks")


def read_experiment(path: Path) -> Experiment:
    """Read an experiment file.

    Raises:
        ConfigError: it is no YAML mapping, a key is unknown or missing, or a value does not fit;
            names the line.
    """
    file = read_nested(str(path), {"defaults": 1, "methods": 2, "tasks": 2})
    known = options(Experiment)
    require_known(file, [*known, "defaults"])
    defaults = file.get("defaults") or {}
    values = {
        **typed(_without(known, _PARTS), _without(file, _PARTS)),
        "methods": {n: {**defaults, **own} for n, own in (file.get("methods") or {}).items()},
        "tasks": {n: _task(path, n, given) for n, given in (file.get("tasks") or {}).items()},
    }
    _require(path, known, values)
    experiment = Experiment(**values)
    if experiment.baseline not in experiment.methods:
        raise ConfigError(
            f"{file['baseline'].place}: {experiment.baseline!r} is none of the methods: "
            f"{', '.join(experiment.methods)}"
        )
    _require_starts(experiment)
    return experiment


def _require_starts(experiment: Experiment) -> None:
    """Refuse a method that is to begin where none before it has ended."""
    earlier: list[str] = []
    for method, given in experiment.methods.items():
        start = experiment.start_of(method)
        if start is not None and start not in earlier:
            raise ConfigError(
                f"{given[AFTER].place}: {start!r} is none of the methods that stand before this "
                f"one: {', '.join(earlier) or 'there is none'}"
            )
        earlier.append(method)


def _task(path: Path, name: str, given: Mapping[str, Given]) -> Task:
    known = options(Task)
    require_known(given, known)
    values = typed(known, given)
    _require(f"{path}: task {name}", known, values)
    return Task(**values)


def _require(place: object, known: Mapping[str, Option], values: Mapping[str, Any]) -> None:
    """Raise for what has no default and no value, or an empty one."""
    missing = [name for name, option in known.items() if option.required and not values.get(name)]
    if missing:
        raise ConfigError(f"{place}: {', '.join(missing)} missing")


def _without(values: Mapping[str, T], names: tuple[str, ...]) -> dict[str, T]:
    return {name: value for name, value in values.items() if name not in names}
