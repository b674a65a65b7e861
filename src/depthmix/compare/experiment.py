"""An experiment file: what is compared, on what, how often.

    model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct
    output_dir: comparison
    baseline: lora
    seeds: [1, 2, 3]
    split: validation              # or test, once, with the setting that was chosen
    defaults: {learning_rate: 1e-3, per_device_train_batch_size: 8}

Methods:
      lora: {mode: false}
      lora+mode: {k: 3}
    tasks:
      mawps: {dataset: [mawps_train_raw.json], train_rows: 320, test_rows: 200}

`defaults` and the entries of a method are options of `depthmix train`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml

from depthmix.errors import ConfigError

Split = Literal["validation", "test"]
T = TypeVar("T")


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
    dataset_format: str = "auto"
    dataset_template: str | None = None
    most_characters: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.dataset, list):
            raise ConfigError("dataset must be a list of sources")
        for name in ("train_rows", "validation_rows", "test_rows"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} must be an integer >= 1, not {value!r}")


@dataclass(frozen=True)
class Experiment:
    """What an experiment file says; see the module's text."""

    model_name_or_path: str
    output_dir: str
    baseline: str
    methods: dict[str, dict[str, Any]]
    tasks: dict[str, Task]
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    split: Split = "test"
    defaults: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.baseline not in self.methods:
            raise ConfigError(
                f"baseline {self.baseline!r} is none of the methods: {', '.join(self.methods)}"
            )
        if self.split not in get_args(Split):
            raise ConfigError(f"split must be one of {', '.join(get_args(Split))}")
        if not self.seeds or not all(isinstance(seed, int) for seed in self.seeds):
            raise ConfigError("seeds must be a list of integers")

    def options_of(self, method: str) -> dict[str, Any]:
        """Return the options of `depthmix train` for a method."""
        return {**self.defaults, **(self.methods[method] or {})}


def read_experiment(path: Path) -> Experiment:
    """Read an experiment file.

    Raises:
        ConfigError: the file is no YAML mapping, or a key is unknown or missing; names it.
    """
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    experiment = _mapping(values, str(path))
    tasks = _mapping(experiment.get("tasks"), f"{path}: tasks")
    built = {name: _build(Task, task, f"{path}: task {name}") for name, task in tasks.items()}
    methods = _mapping(experiment.get("methods"), f"{path}: methods")
    given = {**experiment, "tasks": built, "methods": methods}
    return _build(Experiment, given, str(path))


def _mapping(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise ConfigError(f"{place}: expected a mapping of names")
    return value


def _build(cls: type[T], values: Any, place: str) -> T:
    given = _mapping(values, place)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(given) - set(fields))
    if unknown:
        raise ConfigError(f"{place}: unknown {', '.join(unknown)}; known: {', '.join(fields)}")
    needed = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    missing = [name for name in needed if name not in given]
    if missing:
        raise ConfigError(f"{place}: {', '.join(missing)} missing")
    try:
        return cls(**given)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from None
