"""What a training run writes down of itself, and what using its model takes from there.

`depthmix.yaml` holds the options, and is what `depthmix train` reads to do the run again;
`depthmix_run.json` beside it holds what came of them: see `train/record.py`, which writes it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from depthmix.errors import CheckpointError

CONFIG_NAME = "depthmix.yaml"
RECORD_NAME = "depthmix_run.json"
CALIBRATION_NAME = "depthmix_calibration.json"  # what `depthmix calibrate` fitted to the weights

_FORMAT = "dataset_format"


@dataclass(frozen=True)
class RunRecord:
    """The two files of a run; empty where there are none.

    Attributes:
        options: `depthmix.yaml`.
        facts: `depthmix_run.json`.
    """

    options: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> RunRecord:
        """Read the record in a folder.

        Raises:
            CheckpointError: a file is not whole; names it.
        """
        path, facts = folder / CONFIG_NAME, folder / RECORD_NAME
        options = _read_yaml(path) if path.exists() else {}
        if options and not isinstance(options.get(_FORMAT), str):
            raise CheckpointError(f"{path}: not whole: {_FORMAT} is missing")
        return cls(options, read_json(facts) if facts.exists() else {})

    @property
    def row_format(self) -> str | None:
        """The format of the rows that the model was tuned on (`depthmix.data.formats`)."""
        return self.options.get(_FORMAT)

    @property
    def template(self) -> str | None:
        """The template of their prompts, where it was not the format's own."""
        return self.options.get("dataset_template")

    @property
    def base(self) -> dict[str, Any]:
        """How the base model was loaded: name, revision, trust_remote_code, dtype, quantization."""
        base = self.facts.get("base", {})
        return base if isinstance(base, dict) else {}


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a JSON file.

    Raises:
        CheckpointError: it holds none; names the file.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:  # of JSON or of UTF-8
        raise CheckpointError(f"{path}: not a whole JSON file ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold an object")
    return values


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        raise CheckpointError(f"{path}: not valid YAML ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: must hold `key: value` lines")
    return values
