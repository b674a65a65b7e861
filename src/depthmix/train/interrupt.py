"""Ctrl-C in training: finish the step, save a checkpoint, stop. A second one stops at once."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopOnRequest(TrainerCallback):
    """Ends training after the current step, with a checkpoint, once `requested` is set."""

    def __init__(self) -> None:
        self.requested = False

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Ask for a checkpoint and for the end."""
        if self.requested:
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Keep the end of the loop from saving a second time, and from evaluating."""
        if self.requested:
            control.should_save = False
            control.should_evaluate = False


@contextmanager
def stopping_on_interrupt(trainer: Trainer) -> Iterator[None]:
    """Within the block, let the first SIGINT end training gracefully."""
    callback = StopOnRequest()
    trainer.add_callback(callback)

    def handle(_signal: int, _frame: FrameType | None) -> None:
        callback.requested = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print(
            "\ndepthmix: finishing this step and saving; Ctrl-C again stops at once",
            file=sys.stderr,
        )

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        trainer.remove_callback(callback)
