"""A temperature on a model's predictions: the state that enters the head is divided by it.

With a linear head without bias that divides its output, whatever computes it. Order is kept, so
that the likeliest token stays the likeliest, up to the rounding of the model's dtype. What a model
does to the head's output (a scale, a soft cap) comes after.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from depthmix.errors import DepthmixError
from depthmix.model.active import host_of

_NAME = "depthmix_temperature"  # attribute of the model that holds the hook


class _Temperature:
    """The hooks; an object, so that the model can be copied and pickled."""

    def __init__(self, host: Any, value: float) -> None:
        self.value = value
        self._host = host
        self._head: nn.Module | None = None
        self._on_head: Any = None
        self._on_host = host.register_forward_pre_hook(self.follow)
        self.follow(host)

    def follow(self, host: Any, _args: Any = None) -> None:
        """Move to what is the head now: PEFT wraps heads, and unwraps them where it merges."""
        head = host.get_output_embeddings()
        if head is not self._head:
            if self._on_head is not None:
                self._on_head.remove()
            self._head, self._on_head = head, head.register_forward_pre_hook(self.divide)

    def divide(self, _head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Divide in inference; in training the model is left alone."""
        return None if self._host.training else (args[0] / self.value, *args[1:])

    def remove(self) -> None:
        """Take the hooks off."""
        self._on_host.remove()
        self._on_head.remove()


def set_temperature(model: nn.Module, temperature: float) -> None:
    """Divide what enters the head by a temperature, in inference, in place of an earlier one.

    Args:
        model: a model of transformers with a linear head without bias, PEFT-wrapped or not.
        temperature: above 0; 1 takes it off.

    Raises:
        DepthmixError: the head has a bias, by which the likeliest token could become another.
    """
    host: Any = host_of(model)
    before = vars(host).pop(_NAME, None)
    if before is not None:
        before.remove()
    if temperature != 1.0:
        require_no_bias(host)
        vars(host)[_NAME] = _Temperature(host, temperature)


def temperature_of(model: nn.Module) -> float:
    """Return the temperature that `set_temperature` has set, 1 if none."""
    found = vars(host_of(model)).get(_NAME)
    return 1.0 if found is None else float(found.value)


def require_no_bias(host: Any) -> None:
    """Raise `DepthmixError` for a head whose output a division of its input does not divide."""
    names = [name.rpartition(".")[2] for name, _ in host.get_output_embeddings().named_parameters()]
    if "bias" in names:
        raise DepthmixError(bias_refused(host))


def bias_refused(host: Any) -> str:
    """Return why a model with a bias behind its head gets no temperature."""
    return (
        f"{type(host).__name__} has a bias behind its head, which a temperature in front of the "
        "head leaves as it is, so that the likeliest token could change: it cannot be calibrated"
    )
