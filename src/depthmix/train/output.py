"""The folder of a training run: what it may hold before, and how the result gets into it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from depthmix.carry import run_record
from depthmix.carry.saved_run import ADAPTER_CONFIG, MODEL_CONFIG, STATE_NAME, SavedRun
from depthmix.errors import ConfigError
from depthmix.files import write_text
from depthmix.provenance import versions
from depthmix.train.arguments import TrainArguments
from depthmix.train.resume import require_same_run, require_state

if TYPE_CHECKING:
    from transformers import Trainer

CONFIG_NAME = run_record.CONFIG_NAME

# The last files to appear in a finished run, and the sign of one.
_MODEL_CONFIGS = (ADAPTER_CONFIG, MODEL_CONFIG)
_OF_A_RUN = (
    *(CONFIG_NAME, run_record.RECORD_NAME, run_record.CALIBRATION_NAME, STATE_NAME),
    *_MODEL_CONFIGS,
)


def prepare(folder: Path, arguments: TrainArguments) -> str | None:
    """Look at the folder of a run and return the checkpoint to go on from, if any.

    Raises:
        ConfigError: the folder holds something that was not asked to be continued or replaced.
    """
    named = arguments.training.resume_from_checkpoint
    if named or arguments.run.resume:
        return str(_resumable(Path(named) if named else None, folder, arguments))
    _require_room(folder, arguments)
    return None


@contextmanager
def no_empty_folder(folder: Path) -> Iterator[None]:
    """Take away the folder that the Trainer makes, where a run fails before it begins."""
    was_there = folder.exists()
    try:
        yield
    except BaseException:
        if not was_there:
            with suppress(OSError):  # it holds something, or is not there
                folder.rmdir()
        raise


def begin(folder: Path, arguments: TrainArguments, row_format: str) -> None:
    """Take the folder over from the run before, if that is asked for, and say what is run."""
    if arguments.run.overwrite:
        _remove_run(folder)
    write_config(folder, arguments, row_format)


def write_config(folder: Path, arguments: TrainArguments, row_format: str) -> None:
    """Write the configuration that reproduces the run; never half of it."""
    header = "# " + ", ".join(f"{name} {version}" for name, version in versions().items())
    values = {**arguments.resolved(), "dataset_format": row_format}
    write_text(folder / CONFIG_NAME, f"{header}\n{yaml.safe_dump(values, sort_keys=False)}")


def save(folder: Path, trainer: Trainer) -> None:
    """Save the model and the tokenizer beside the run, then move them in, the sign last.

    The run's model card stays: it tells more than the one that PEFT saves. The logs stay in the
    trainer's state, as in a checkpoint.
    """
    from depthmix.train.card import fill_card

    staging = folder / ".saving"
    trainer.save_model(str(staging))
    if trainer.is_world_process_zero():
        if (folder / "README.md").exists():
            (staging / "README.md").unlink(missing_ok=True)
        fill_card(folder, str(trainer.model.config.name_or_path))  # type: ignore[union-attr]
        for path in sorted(staging.iterdir(), key=lambda path: path.name in _MODEL_CONFIGS):
            path.replace(folder / path.name)
        staging.rmdir()
        trainer.state.save_to_json(str(folder / STATE_NAME))


def send(folder: Path, trainer: Trainer) -> str | None:
    """Send a saved run to the hub, if that is asked for, and return its address there.

    Raises:
        DepthmixError: it could not be sent.
    """
    from depthmix.train.hub import Hub

    hub = trainer.pop_callback(Hub)
    return hub.finish(folder) if isinstance(hub, Hub) else None


def _require_room(folder: Path, arguments: TrainArguments) -> None:
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
    named = [folder / name for name in _OF_A_RUN]
    for path in (*named, *folder.glob("*.safetensors")):
        path.unlink(missing_ok=True)


def _resumable(named: Path | None, folder: Path, arguments: TrainArguments) -> Path:
    """Return the checkpoint to go on from, if it belongs to a run like this one."""
    if named and not (named / STATE_NAME).exists():
        raise ConfigError(f"resume_from_checkpoint {named}: there is no whole checkpoint")
    whole = [named] if named else SavedRun(str(folder), folder).whole_checkpoints
    if not whole:
        raise ConfigError(f"--resume: no checkpoint in {folder}; leave out --resume to start anew")
    checkpoint = whole[-1]
    require_state(checkpoint)
    record = checkpoint.parent / CONFIG_NAME
    if record.exists():
        require_same_run(record, checkpoint, arguments)
    elif named is None:
        raise ConfigError(
            f"--resume: {record} is missing; name the checkpoint with --resume_from_checkpoint"
        )
    return checkpoint
