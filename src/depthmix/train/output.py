"""The folder of a training run: what it may hold before, and how the result gets into it."""

from __future__ import annotations

import dataclasses
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

import depthmix
from depthmix.carry import run_record
from depthmix.carry.saved_run import ADAPTER_CONFIG, MODEL_CONFIG, SavedRun
from depthmix.config import MoDEConfig
from depthmix.errors import ConfigError
from depthmix.files import write_text
from depthmix.train.arguments import TrainArguments
from depthmix.train.card import name_base

if TYPE_CHECKING:
    from transformers import Trainer

CONFIG_NAME = run_record.CONFIG_NAME

# The last files to appear in a finished run, and the sign of one.
_MODEL_CONFIGS = (ADAPTER_CONFIG, MODEL_CONFIG)

# What a run that goes on must have in common with its checkpoint.
_LASTING = (
    "model_name_or_path",
    "dataset",
    "method",
    "mode",
    "late_layers_only",
    "num_virtual_tokens",
    "vera_r",
    "lora_r",
    "lora_target_modules",
    "use_dora",
    *(field.name for field in dataclasses.fields(MoDEConfig)),
)


def prepare(folder: Path, arguments: TrainArguments) -> str | None:
    """Make the folder ready for a run and return the checkpoint to go on from, if any.

    Raises:
        ConfigError: the folder holds something that was not asked to be continued or replaced.
    """
    named = arguments.training.resume_from_checkpoint
    if named and not (Path(named) / "trainer_state.json").exists():
        raise ConfigError(f"resume_from_checkpoint {named}: there is no whole checkpoint")
    if named or arguments.run.resume:
        return named or _resumable(folder, arguments)
    if arguments.training.process_index == 0:  # the first process alone changes the folder
        _make_room(folder, arguments)
    return None


def write_config(folder: Path, arguments: TrainArguments, row_format: str) -> None:
    """Write the configuration that reproduces the run; never half of it."""
    others = (f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl"))
    header = f"# depthmix {depthmix.__version__}, {', '.join(others)}"
    values = {**arguments.resolved(), "dataset_format": row_format}
    write_text(folder / CONFIG_NAME, f"{header}\n{yaml.safe_dump(values, sort_keys=False)}")


def save(folder: Path, trainer: Trainer) -> None:
    """Save the model and the tokenizer beside the run, then move them in, the sign last.

    The run's model card stays: it tells more than the one that PEFT saves.
    """
    staging = folder / ".saving"
    trainer.save_model(str(staging))
    if trainer.is_world_process_zero():
        if (folder / "README.md").exists():
            (staging / "README.md").unlink(missing_ok=True)
        name_base(folder, str(trainer.model.config.name_or_path))  # type: ignore[union-attr]
        for path in sorted(staging.iterdir(), key=lambda path: path.name in _MODEL_CONFIGS):
            path.replace(folder / path.name)
        staging.rmdir()


def _make_room(folder: Path, arguments: TrainArguments) -> None:
    if folder.resolve() == Path(str(arguments.model.model_name_or_path)).resolve():
        raise ConfigError(f"output_dir {folder} is the folder of the base model")
    held = _held(folder)
    if held and not (folder / CONFIG_NAME).exists():
        raise ConfigError(f"output_dir {folder} holds a model that depthmix did not train")
    if held and not arguments.run.overwrite:
        raise ConfigError(
            f"output_dir {folder} holds {held}: go on with it (--resume), replace it (--overwrite) "
            "or choose another"
        )
    if held:
        _remove_run(folder)


def _held(folder: Path) -> str | None:
    """Say what a folder holds."""
    saved = SavedRun(str(folder), folder)
    if saved.is_finished:
        return "a finished run"
    return "an unfinished run" if saved.checkpoints else None


def _remove_run(folder: Path) -> None:
    """Remove what a run leaves: its checkpoints, its configuration and its weights."""
    for checkpoint in SavedRun(str(folder), folder).checkpoints:
        shutil.rmtree(checkpoint)
    named = [folder / name for name in (CONFIG_NAME, run_record.RECORD_NAME, *_MODEL_CONFIGS)]
    for path in (*named, *folder.glob("*.safetensors")):
        path.unlink(missing_ok=True)


def _resumable(folder: Path, arguments: TrainArguments) -> str:
    """Return the last checkpoint that is whole, if it belongs to a run like this one."""
    whole = SavedRun(str(folder), folder).whole_checkpoints
    if not whole:
        raise ConfigError(f"--resume: no checkpoint in {folder}; leave out --resume to start anew")
    _require_same_run(folder / CONFIG_NAME, arguments)
    return str(whole[-1])


def _require_same_run(stored: Path, arguments: TrainArguments) -> None:
    if not stored.exists():
        raise ConfigError(
            f"--resume: {stored} is missing; name the checkpoint with --resume_from_checkpoint"
        )
    before, now = yaml.safe_load(stored.read_text("utf-8")), arguments.resolved()
    for name in _LASTING:
        if before.get(name) != now.get(name):
            raise ConfigError(
                f"--resume: {name} was {before.get(name)!r} ({stored}) and is {now.get(name)!r} now"
            )
