"""`depthmix train`: tune a model with MoDE on a PEFT method, by TRL's trainers as they are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from depthmix.commands.train_help import print_all_options, print_help
from depthmix.errors import DataError
from depthmix.files import write_errors
from depthmix.train import output
from depthmix.train.arguments import TrainArguments, parse
from depthmix.train.fit import fit
from depthmix.train.preview import preview

if TYPE_CHECKING:
    from transformers import Trainer


def run(argv: Sequence[str]) -> int:
    """Run the command."""
    if "--help-all" in argv:
        print_all_options()
        return 0
    if not argv or "-h" in argv or "--help" in argv:
        print_help()
        return 0 if argv else 2
    arguments = parse(argv)
    if arguments.run.preview is not None:
        preview(arguments)
        return 0
    return train(arguments)


def train(arguments: TrainArguments) -> int:
    """Train, save and say where the result is."""
    from depthmix.analysis.training_log import TrainingLog, router_summary
    from depthmix.probe.settle import settled

    folder = Path(str(arguments.training.output_dir))
    trainer = fit(settled(arguments))
    with write_errors():
        output.save(folder, trainer)
    if arguments.run.calibrate:
        print(_calibrated(trainer, arguments))
    if trainer.is_world_process_zero():
        print(_summary(trainer, folder))
        for line in router_summary(TrainingLog.of(trainer.state.log_history), folder):
            print(line)
        address = output.send(folder, trainer)
        if address:
            print(f"sent to {address}")
    return 0


def _calibrated(trainer: Trainer, arguments: TrainArguments) -> str:
    """Fit a temperature to what was saved; return what came of it."""
    from depthmix.train.calibrate import calibrate_trained, told

    try:
        return told(calibrate_trained(trainer.model, arguments))
    except DataError as error:  # the run is there all the same
        return f"note: not calibrated: {error}"


def _summary(trainer: Trainer, folder: Path) -> str:
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    losses = losses or [entry["train_loss"] for entry in history if "train_loss" in entry]
    rewards = [entry["reward"] for entry in history if entry.get("reward") is not None]
    evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    parts = [f"saved in {folder}"]
    if rewards:  # whose loss says nothing
        parts.append(_course("reward", rewards))
    elif losses:
        parts.append(_course("loss", losses))
    if evaluations:
        parts.append(f"eval loss {evaluations[-1]:.4g}")
    return f'{"; ".join(parts)}; try it: depthmix generate {folder} --prompt "..."'


def _course(name: str, values: list[float]) -> str:
    first = f"{values[0]:.4g} -> " if len(values) > 1 else ""
    return f"{name} {first}{values[-1]:.4g}"
