"""`Forward`: what one forward of an attached model needs, gone when that forward ends.

The keyword arguments of the call own it, and everything else refers to it weakly: when the call's
frame is left, by whatever way, the forward and its tensors are no more. Hooks find it through a
context variable, so that every thread, replica and nested call has its own.
"""

from __future__ import annotations

import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from depthmix.method.mixture import DepthMixture

if TYPE_CHECKING:
    from depthmix.model.runtime import Runtime

_FORWARDS: ContextVar[tuple[weakref.ref[Forward], ...]] = ContextVar("forwards", default=())


class Forward:
    """One forward.

    Attributes:
        runtime: the wiring of the model.
        host: the model that was called (a replica of it, under DataParallel); the attached model
            itself where only its trunk was called.
        mixture: the mixture that applies.
        whole: whether the model was called, head and all, or its trunk alone.
        keep: the positions whose logits are asked for, None for all.
        states: of the late layers, the last layer last.
        with_grad: whether each was made with a graph.
        autocast: dtype of the autocast region around the head's input, None outside of one.
        within_norm: whether the final norm runs on a state of ours.
        stacked: whether the states of all late layers are on their way to the head.
        task: what the task keeps for the end of the forward.
    """

    runtime: Runtime
    host: PreTrainedModel
    mixture: DepthMixture
    whole: bool
    states: list[Tensor | None]
    with_grad: list[bool]
    keep: slice | Tensor | None = None
    autocast: torch.dtype | None = None
    within_norm = False
    stacked = False
    task: Any = None

    def take(self) -> list[Tensor | None]:
        """Return the states and let go of them."""
        states, self.states = self.states, [None] * len(self.states)
        return states

    def note_autocast(self, device_type: str) -> None:
        """Remember the autocast region: the loss is computed outside of it."""
        if torch.is_autocast_enabled(device_type):
            self.autocast = torch.get_autocast_dtype(device_type)


class Arguments(dict[str, Any]):
    """Keyword arguments of a call, which own the forward that the call is."""

    forward: Forward


def begin(runtime: Runtime, host: PreTrainedModel, mixture: DepthMixture, whole: bool) -> Forward:
    """Return a new forward, in which nothing has run yet."""
    forward = Forward()
    forward.runtime, forward.host, forward.mixture, forward.whole = runtime, host, mixture, whole
    forward.states, forward.with_grad = [None] * mixture.config.k, [False] * mixture.config.k
    return forward


def enter(forward: Forward, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Make `forward` the current one of its model; return the arguments that own it."""
    if torch.compiler.is_compiling():  # which knows no context variables, and runs no hook later
        forward.runtime.traced = forward
        return kwargs
    forward.runtime.traced = None
    owner = Arguments(kwargs)
    owner.forward = forward
    alive = tuple(reference for reference in _FORWARDS.get() if reference() is not None)
    _FORWARDS.set((*alive, weakref.ref(forward)))
    return owner


def current(runtime: Runtime) -> Forward | None:
    """Return the forward of a model that is running in this context, the innermost one."""
    if not torch.compiler.is_compiling():
        for reference in reversed(_FORWARDS.get()):
            forward = reference()
            if forward is not None and forward.runtime is runtime:
                return forward
    return runtime.traced


def leave(runtime: Runtime, kwargs: dict[str, Any]) -> Forward | None:
    """Return the forward whose call has these arguments, at its end; None if there is none."""
    traced, runtime.traced = runtime.traced, None
    return kwargs.forward if isinstance(kwargs, Arguments) else traced
