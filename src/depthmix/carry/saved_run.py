"""What a folder, or a name on the hub, holds: the one answer that every command goes by."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

from depthmix.carry.run_record import CALIBRATION_NAME, CONFIG_NAME, RunRecord, read_json
from depthmix.errors import CheckpointError

ADAPTER_CONFIG, MODEL_CONFIG = "adapter_config.json", "config.json"
STATE_NAME = "trainer_state.json"  # the Trainer's, with its logs

# What is fetched from the hub to tell what a name holds, and to use it.
_DESCRIPTIONS = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", CONFIG_NAME]
_WEIGHTS = ["adapter_model.safetensors", "model.safetensors", "model-*.safetensors"]


class Holds(Enum):
    """What a folder holds, in the words of messages."""

    ADAPTER = "an adapter"
    MODEL = "a model"
    EXPORT = "an exported model"
    UNFINISHED = "an unfinished run"
    NOTHING = "nothing"


@dataclass(frozen=True)
class SavedRun:
    """A place where a model may lie.

    Attributes:
        name: what the user calls it.
        folder: where its files are.
        commit: of the hub's repository; None for a local folder.
    """

    name: str
    folder: Path
    commit: str | None = None

    @classmethod
    def find(cls, name: str, revision: str | None = None) -> SavedRun:
        """Find a model that can be used: a folder, or a name on the hub.

        Args:
            name: a folder, `NAME` or `NAME@REVISION`.
            revision: of the hub's repository, where the name has none.

        Raises:
            CheckpointError: there is nothing, or an unfinished run; says what there is.
        """
        folder = Path(name).expanduser()
        run = cls(name, folder) if folder.is_dir() else _from_hub(name, revision)
        run.require_model()
        return run

    @property
    def repository(self) -> str:
        """Its name on the hub, without a revision."""
        return self.name.partition("@")[0]

    @cached_property
    def holds(self) -> Holds:
        """What is there."""
        if (self.folder / ADAPTER_CONFIG).exists():
            return Holds.ADAPTER
        if (self.folder / MODEL_CONFIG).exists():
            return Holds.EXPORT if "depthmix" in self._read(MODEL_CONFIG) else Holds.MODEL
        if (self.folder / CONFIG_NAME).exists() or self.checkpoints:
            return Holds.UNFINISHED
        return Holds.NOTHING

    @property
    def is_finished(self) -> bool:
        """Whether there is a model."""
        return self.holds not in (Holds.UNFINISHED, Holds.NOTHING)

    @cached_property
    def has_mode(self) -> bool:
        """Whether there is a MoDE: going by the tensors, or by what an adapter says of itself.

        Raises:
            CheckpointError: a file of weights is not whole.
        """
        from depthmix.carry.adapters import DESCRIPTION_KEY
        from depthmix.carry.checkpoint import Checkpoint

        if self.weight_files and Checkpoint(self.fetched()).read_mode():
            return True
        return self.holds is Holds.ADAPTER and DESCRIPTION_KEY in self._read(ADAPTER_CONFIG)

    @property
    def base(self) -> str:
        """The base model that an adapter names; the name itself of a whole model.

        Raises:
            CheckpointError: the adapter names none.
        """
        if self.holds is not Holds.ADAPTER:
            return self.name
        base = self._read(ADAPTER_CONFIG).get("base_model_name_or_path")
        if not base:
            raise CheckpointError(
                f"{self.name}: the adapter names no base model; give it with --model"
            )
        return str(base)

    @cached_property
    def record(self) -> RunRecord:
        """What training wrote down; that of its run for a checkpoint.

        Raises:
            CheckpointError: a file of the record is broken.
        """
        home = self.folder
        if not (home / CONFIG_NAME).exists() and _is_checkpoint(home.resolve()):
            home = home.resolve().parent
        return RunRecord.read(home)

    @cached_property
    def temperature(self) -> float:
        """The temperature that was fitted to these weights, 1 if none was.

        Raises:
            CheckpointError: it was fitted to other weights, or its file is broken.
        """
        path = self.folder / CALIBRATION_NAME
        if not path.exists():
            return 1.0
        found = read_json(path)
        temperature = found.get("temperature")
        if not isinstance(temperature, float) or not 0 < temperature < math.inf:
            raise CheckpointError(f"{path}: not whole: temperature is missing")
        if found.get("weights") != self.weights_digest():
            raise CheckpointError(
                f"{path}: fitted to other weights than those beside it: calibrate again "
                f"(depthmix calibrate {self.name} DATA), or remove the file"
            )
        return temperature

    def weights_digest(self) -> str:
        """Return a digest of the weight files, without those of an adapter's base."""
        return _digest_of(self.weight_files).hexdigest()

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints within a run, the first step first."""
        found = filter(_is_checkpoint, self.folder.glob("checkpoint-*"))
        return sorted(found, key=lambda path: int(path.name.split("-")[1]))

    @property
    def whole_checkpoints(self) -> list[Path]:
        """Those that were written to the end: the Trainer writes its state last."""
        return [path for path in self.checkpoints if (path / STATE_NAME).exists()]

    @property
    def weight_files(self) -> list[Path]:
        """The safetensors files of an adapter or a model."""
        folder = self.fetched()
        return sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))

    def fetched(self) -> Path:
        """Return the folder, with the weights in it if they come from the hub."""
        return _snapshot(self.repository, self.commit, _WEIGHTS) if self.commit else self.folder

    def require_model(self) -> None:
        """Raise `CheckpointError` unless there is a model, with what there is instead."""
        if self.holds is Holds.NOTHING:
            raise CheckpointError(
                f"{self.name}: holds no model: neither {ADAPTER_CONFIG} nor {MODEL_CONFIG} is there"
            )
        if self.holds is Holds.UNFINISHED:
            whole = self.whole_checkpoints
            there = f"use its last checkpoint, {whole[-1]}" if whole else "it has no checkpoint yet"
            go_on = f"depthmix train {self.folder / CONFIG_NAME} --resume"
            raise CheckpointError(f"{self.name}: an unfinished run; {there}, or go on: {go_on}")

    def digest(self, base: str | None = None, revision: str | None = None) -> str:
        """Return a digest of everything that a prediction depends on, wherever it lies.

        Of an adapter's weights and of its base model's; of a model on the hub, its commit. Files
        are read whole: a large local model takes seconds.

        Args:
            base: the base model, where it is not the one that the adapter names.
            revision: of the base model on the hub, where it is not the recorded one.
        """
        if self.commit:
            sha = hashlib.sha256(f"{self.repository}@{self.commit}".encode())
        else:
            names = (ADAPTER_CONFIG, MODEL_CONFIG, CALIBRATION_NAME)
            configs = [self.folder / name for name in names]
            sha = _digest_of([*filter(Path.exists, configs), *_weights_in(self.folder)])
        if self.holds is Holds.ADAPTER:
            at = revision or (None if base else self.record.base.get("revision"))
            sha.update(SavedRun.find(base or self.base, at).digest().encode())
        return sha.hexdigest()

    def _read(self, name: str) -> dict[str, Any]:
        return read_json(self.folder / name)


def _is_checkpoint(path: Path) -> bool:
    return re.fullmatch(r"checkpoint-\d+", path.name) is not None


def _digest_of(files: list[Path]) -> hashlib._Hash:
    """Return a digest of files, names and content."""
    sha = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            sha.update(path.name.encode())
            sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha


def _weights_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pt"))


def _from_hub(name: str, revision: str | None) -> SavedRun:
    """Fetch what tells what a repository holds."""
    if Path(name).exists():
        raise CheckpointError(f"{name}: a file, not the folder of a model")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"model {name}: there is no such folder")
    repository, _, named = name.partition("@")
    folder = _snapshot(repository, named or revision, _DESCRIPTIONS)
    return SavedRun(name, folder, commit=folder.name)


def _snapshot(repository: str, revision: str | None, patterns: list[str]) -> Path:
    """Return the folder of a repository in the cache of the hub, with these files in it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
    )

    at = f" at revision {revision}" if revision else ""
    try:
        return Path(
            snapshot_download(
                repository, revision=revision, allow_patterns=patterns, ignore_patterns="*/*"
            )
        )
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"model {repository}: there is no such folder, and no such model{at} in the cache of "
            "the hub, which cannot be reached"
        ) from error
    except (HfHubHTTPError, HFValidationError, IncompleteSnapshotError) as error:
        raise CheckpointError(
            f"model {repository}: there is no such folder, and no such model{at} on the hub "
            f"({error})"
        ) from error
