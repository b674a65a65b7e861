"""Loading a checkpoint into a trainer: what does not fit is one clear error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from depthmix.errors import ConfigError


class _Began(TrainerCallback):
    """Tells loading from training; logs, saves and evaluates when this run asks for it."""

    yet = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look at what was loaded."""
        optimizer = kwargs["optimizer"]
        for group in optimizer.param_groups:
            missing = sorted(set(optimizer.defaults) - set(group))
            if missing:
                raise KeyError(f"another optimiser, its groups have no {', '.join(missing)}")
        self.yet = True
        state.compute_steps(args, state.max_steps)  # those of the checkpoint were loaded


@contextmanager
def loading(checkpoint: str | None, trainer: Trainer) -> Iterator[None]:
    """Say in one line that a checkpoint does not fit, whatever the libraries make of it.

    Raises:
        ConfigError: it does not.
    """
    began = _Began()
    trainer.add_callback(began)
    try:
        yield
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        if checkpoint is None or began.yet:
            raise
        raise ConfigError(
            f"{checkpoint} does not fit this run, its weights or its optimiser's parameter groups "
            f"are others: {type(error).__name__}: {error}"
        ) from error
    finally:
        trainer.remove_callback(began)
