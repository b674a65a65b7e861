"""How good a run is after every epoch, so that quality can be set against time."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from depthmix.analysis.layers import LayerScores, Row, score_rows


class Curve(TrainerCallback):
    """Scores rows after every epoch but the last one, off the clock.

    Args:
        rows: of prompt and completion.

    Attributes:
        points: a mapping an epoch: `epoch`, `seconds` of training so far, `loss`, `accuracy`,
            `ece`.
        seconds: of training, without the scoring.
        peak_bytes: the most memory that training had taken before anything was scored.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.points: list[dict[str, float]] = []
        self.seconds = 0.0
        self.peak_bytes: int | None = None
        self._rows = rows
        self._began = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock, score, and start it again."""
        if state.global_step >= state.max_steps or control.should_training_stop:
            return
        self._stop()
        model = kwargs["model"]
        self.add(float(state.epoch or 0), score_rows(model, kwargs["processing_class"], self._rows))
        model.train()
        self._began = time.perf_counter()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock."""
        self._stop()

    def add(self, epoch: float, scores: LayerScores) -> None:
        """Add a point: what the model scores now."""
        self.points.append(
            {
                "epoch": epoch,
                "seconds": self.seconds,
                "loss": scores.mean_loss,
                "accuracy": scores.accuracy,
                "ece": scores.reliability.error,
            }
        )

    def _stop(self) -> None:
        self.seconds += time.perf_counter() - self._began
        if self.peak_bytes is None:
            self.peak_bytes = _peak_bytes()


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
