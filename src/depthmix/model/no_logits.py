"""`NoLogits`: stands where a training forward has made no logits, and says so when it is read."""

from __future__ import annotations

from typing import Any, NoReturn

from depthmix.errors import TrainingError


class NoLogits:
    """In place of the logits of a training forward with labels.

    Raises:
        TrainingError: at any use.
    """

    def _refuse(self, *_: Any) -> NoReturn:
        raise TrainingError(
            "a training forward with labels makes no logits, since MoDE computes its loss without "
            "them. For a loss of your own take `labels` out of the inputs: the logits are then the "
            "ensemble's, and no distillation is added"
        )

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):  # what copy, pickle and inspection look for
            raise AttributeError(name)
        self._refuse()

    __getitem__ = __len__ = __iter__ = _refuse
    __add__ = __sub__ = __mul__ = __truediv__ = __matmul__ = __neg__ = _refuse
