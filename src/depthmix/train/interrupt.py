"""Ctrl-C and SIGTERM in training: finish the step, save a checkpoint, stop.

A second Ctrl-C stops at once. SIGTERM, which schedulers send ahead of SIGKILL, may come again: it
changes nothing, and neither does the Ctrl-C that a launcher passes on to its processes.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate.utils import gather
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# A launcher passes Ctrl-C on to processes that have it from the terminal already.
_SAME_KEY = 1.0  # seconds


class StopOnRequest(TrainerCallback):
    """Ends training after the current step, with a checkpoint, once a signal has come.

    Processes agree at the end of every step, so that all stop at the same one.

    Attributes:
        received: the number of the signal, 0 before one has come.
    """

    def __init__(self) -> None:
        self.received = 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint, whole enough to go on from, and for the end."""
        self.received = _most_anywhere(self.received, args)
        if self.received:
            args.save_only_model = False
            control.should_save = True
            control.should_evaluate = False
            control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the end of the loop from saving a second time, and from evaluating."""
        if self.received:
            control.should_save = False
            control.should_evaluate = False


@contextmanager
def stopping_on_signals(trainer: Trainer) -> Iterator[StopOnRequest]:
    """Within the block, let SIGINT and SIGTERM end training gracefully."""
    callback = StopOnRequest()
    trainer.add_callback(callback)
    pressed = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal pressed
        if number == signal.SIGINT and pressed and time.monotonic() - pressed > _SAME_KEY:
            signal.default_int_handler(number, frame)
        if not callback.received and trainer.is_world_process_zero():
            print(
                "\ndepthmix: finishing this step and saving; Ctrl-C again stops at once",
                file=sys.stderr,
            )
        pressed = pressed or time.monotonic()
        callback.received = callback.received or number

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield callback
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        trainer.remove_callback(callback)


def _most_anywhere(number: int, args: TrainingArguments) -> int:
    """Return the greatest of the numbers that the processes have."""
    if args.world_size == 1:
        return number
    return int(gather(torch.tensor([number], device=args.device)).max())
