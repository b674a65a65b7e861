"""What training says while it runs: a bar at a terminal, and a readable line a logging step."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

_WIDEST = 4  # significant digits


def say_progress(trainer: Trainer) -> None:
    """Replace what transformers prints: dictionaries, and bars wherever standard error goes."""
    for kind in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(kind)
    bar = sys.stderr.isatty() and not trainer.args.disable_tqdm
    trainer.add_callback(BarAndLines() if bar else Lines())


class Lines(TrainerCallback):
    """Prints a line a logging step, with the time that is left."""

    def __init__(self) -> None:
        super().__init__()
        self._began = 0.0
        self._first = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._began, self._first = time.monotonic(), state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print what is logged."""
        if state.is_world_process_zero and logs:
            self.write(self._line(state, logs))

    def write(self, line: str) -> None:
        """Print one line at once, so that a file can be followed."""
        print(line, flush=True)

    def _line(self, state: TrainerState, logs: Mapping[str, Any]) -> str:
        done = state.global_step - self._first
        if "train_runtime" in logs:
            before = f", from step {self._first} on" if self._first else ""
            return f"trained {done} steps in {_clock(logs['train_runtime'])}{before}"
        parts = [f"step {state.global_step}/{state.max_steps}", *_figures(logs)]
        if "loss" in logs and done:
            left = (time.monotonic() - self._began) / done * (state.max_steps - state.global_step)
            parts.append(f"ETA {_clock(left)}")
        return "  ".join(parts)


class BarAndLines(ProgressCallback, Lines):
    """The same lines above transformers' bar."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock and the bar."""
        Lines.on_train_begin(self, args, state, control, **kwargs)
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Print what is logged above the bar."""
        Lines.on_log(self, args, state, control, logs, **kwargs)

    def write(self, line: str) -> None:
        """Print above the bar, if it is there."""
        bar: Any = self.training_bar
        if bar is None:
            super().write(line)
        else:
            bar.write(line)


def _figures(logs: Mapping[str, Any]) -> Iterator[str]:
    """Yield the figures by their short names; the router's weights as one list."""
    for name, short in _SHORT.items():
        if logs.get(name) is not None:  # TRL logs None where no reward applied
            error = logs.get(f"{name}_se")
            spread = "" if error is None else f" ± {error:.2g}"
            yield f"{short} {logs[name]:.{_WIDEST}g}{spread}"
    weights = [value for name, value in logs.items() if name.startswith("router_weight/")]
    if weights:
        yield f"router {' '.join(f'{weight:.2f}' for weight in weights)}"


_SHORT = {
    "loss": "loss",
    "reward": "reward",
    "completions/mean_length": "answer length",
    "rewards/accuracies": "pairs right",
    "rewards/margins": "margin",
    "kl": "KL",
    "eval_loss": "eval loss",
    "eval_reward": "eval reward",
    "eval_completions/mean_length": "answer length",
    "eval_rewards/accuracies": "pairs right",
    "eval_rewards/margins": "margin",
    "eval_kl": "KL",
    "eval_accuracy": "eval accuracy",
    "mean_token_accuracy": "tokens right",
    "eval_mean_token_accuracy": "tokens right",
    "learning_rate": "lr",
    "grad_norm": "gradient",
    "router_entropy": "router entropy",
}


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
