"""Write down what came of a run's options, beside `depthmix.yaml`; see `carry/run_record.py`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmix.carry.run_record import RECORD_NAME, RunRecord
from depthmix.errors import ConfigError
from depthmix.files import write_text
from depthmix.provenance import versions
from depthmix.train.arguments import TrainArguments
from depthmix.train.objectives.options import rates_of_mode
from depthmix.train.objectives.start import base_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer

_SECRETS = ("hub_token", "push_to_hub_token")


def write_record(folder: Path, arguments: TrainArguments, trainer: Trainer) -> None:
    """Write options with every default filled in, the base model, the data and the versions."""
    facts = {
        "command": shlex.join([_program(), *sys.argv[1:]]),
        "versions": versions("accelerate", "datasets"),
        "base": _base(arguments, trainer),
        "data": {
            name: None if rows is None else {"rows": len(rows), "digest": digest_of(rows)}
            for name, rows in _data(trainer).items()
        },
        "options": effective_options(arguments),
    }
    if arguments.probed:
        facts["probe"] = arguments.probed
    write_text(folder / RECORD_NAME, json.dumps(facts, indent=1, default=_plain))


def require_same_rows(folder: Path, trainer: Trainer) -> None:
    """Refuse to go on with a run on other rows than those that its record tells of.

    Raises:
        ConfigError: the data has changed, though its name may not have.
    """
    recorded = RunRecord.read(folder).facts.get("data") or {}
    before, rows = recorded.get("train"), _data(trainer)["train"]
    if before is not None and before["digest"] != digest_of(rows):
        raise ConfigError(
            f"--resume: dataset: its rows are others than those of the run in {folder} "
            f"({len(rows)} now, {before['rows']} then): give the data as it was, or start another "
            "run"
        )


def effective_options(arguments: TrainArguments) -> dict[str, Any]:
    """Return every option of a run with the value that it has, tokens of the hub left out."""
    groups = (arguments.model, arguments.training, arguments.run)
    fields = {f.name: getattr(group, f.name) for group in groups for f in dataclasses.fields(group)}
    rates = {}
    if arguments.run.mode:
        router, norm = rates_of_mode(arguments.run)
        rates = {"router_learning_rate": router, "norm_learning_rate": norm}
    options = {**fields, **arguments.mode.to_dict(), **rates}
    return {name: value for name, value in options.items() if name not in _SECRETS}


def digest_of(rows: Dataset) -> str:
    """Return a digest of rows, whatever file or memory they lie in."""
    import pyarrow as pa  # type: ignore[import-untyped]

    table = rows.flatten_indices().data.table if rows._indices is not None else rows.data.table
    sha = hashlib.sha256()
    # As one batch, so that equal rows have equal bytes however they were read.
    whole = table.replace_schema_metadata(None).combine_chunks()
    with pa.ipc.new_stream(pa.PythonFile(_Hashing(sha), mode="w"), whole.schema) as stream:
        stream.write_table(whole)
    return sha.hexdigest()


def _program() -> str:
    """Return the name of what was run; `python -m depthmix` has none of its own."""
    name = Path(sys.argv[0]).name
    return "depthmix" if name == "__main__.py" else name


class _Hashing:
    """A file that keeps nothing but the hash of what is written."""

    closed = False

    def __init__(self, sha: Any) -> None:
        self._sha = sha

    def write(self, data: Any) -> int:
        self._sha.update(data)
        return len(data)

    def flush(self) -> None:
        """There is nothing to flush."""

    def close(self) -> None:
        """There is nothing to close."""


def _data(trainer: Trainer) -> dict[str, Any]:
    """Return the rows as the model gets them: tokenised, cut, and packed if they are."""
    return {"train": trainer.train_dataset, "eval": trainer.eval_dataset}


def _base(arguments: TrainArguments, trainer: Trainer) -> dict[str, Any]:
    """Return what is needed to load the base model once more as it was."""
    from trl.trainer.utils import get_quantization_config

    model: Any = trainer.model
    config, options = model.config, arguments.model
    name = base_of(arguments)
    local = Path(name).is_dir()
    quantization = get_quantization_config(options)
    return {
        "name": name,
        "local": local,
        "revision": None if local else config._commit_hash or options.model_revision,
        "trust_remote_code": bool(arguments.training.trust_remote_code),
        "dtype": str(config.dtype).removeprefix("torch.") if config.dtype else None,
        "quantization": None if quantization is None else quantization.to_dict(),
    }


def _plain(value: Any) -> Any:
    """Return what JSON can hold of an option's value."""
    return value.value if isinstance(value, Enum) else str(value)
