"""The two ways of the late states to the head.

NormPath     one module lies between, the final norm, or none: the states pass it one by one,
and their mixture is what it gives
StackedPath  more lies between (dense layers, a pooler): all k states pass it as one batch of
k x b rows, and are mixed in front of the head
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from transformers.utils.generic import ModelOutput

from depthmix.errors import DepthmixError, TrainingError
from depthmix.model.anatomy import Between, first_tensor, with_first_tensor
from depthmix.model.forward import Forward

if TYPE_CHECKING:
    from depthmix.model.runtime import Runtime

MIXTURE_LABEL = "depthmix: mixture"  # what a profiler shows


class Path(Protocol):
    """What a path of the late states offers.

    Attributes:
        within_trunk: whether the trunk, the model without its head, makes the mixture.
    """

    within_trunk: bool

    def install(self) -> list[Any]:
        """Put its hooks on; return their handles."""
        ...

    def on_head(self, head: nn.Module, args: tuple[Tensor, ...]) -> Tensor | None:
        """Forward pre-hook of the head."""
        ...


class NormPath:
    """The late states pass the final norm one by one; a hook on it returns their mixture."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        place = runtime.anatomy.norm_path or runtime.anatomy.layers_path
        self.within_trunk = place.startswith(f"{runtime.host.base_model_prefix}.")

    def install(self) -> list[Any]:
        """Put the hook on the final norm, or on the last layer where there is none."""
        anatomy = self.runtime.anatomy
        place = self.runtime.host.get_submodule(anatomy.norm_path or anatomy.layer_paths[-1])
        return [place.register_forward_hook(self.on_norm, with_kwargs=True)]

    def on_head(self, _head: nn.Module, _args: tuple[Tensor, ...]) -> None:
        """Leave the head alone: it gets the mixture."""

    def on_norm(
        self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return the mixture in place of the last layer's normed state."""
        forward = self.runtime.current()
        if forward is None or forward.within_norm:
            return None
        states = forward.take()
        if states[-1] is None and (not norm.training or not any(s is not None for s in states)):
            # The norm of something else, or an early exit (`assistant_early_exit`) for a draft.
            return None
        *late, _ = checked(forward, states)  # what the norm got is the last layer's state
        whole = first_tensor(output)
        assert whole is not None
        with record_function(MIXTURE_LABEL):
            last = whole if forward.keep is None else whole[:, forward.keep]
            late = [state[:, -last.shape[1] :].to(last.device) for state in late]
            task = self.runtime.task
            normed = [
                self._normed(forward, norm, task.select(forward, s), args, kwargs) for s in late
            ]
            mixed = task.combine(
                forward, torch.stack([*normed, task.select(forward, last)], dim=-2)
            )
        if mixed is None:
            return None
        mixed = mixed.to(last.dtype)  # of a stream in fp32, which the model casts for its norm
        return with_first_tensor(
            output, mixed if forward.keep is None else _put(whole, forward.keep, mixed)
        )

    def _normed(
        self,
        forward: Forward,
        norm: nn.Module,
        state: Tensor,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Tensor:
        """Apply the final norm, if there is one, to another state."""
        if self.runtime.anatomy.between is Between.NOTHING:
            return state
        # As a module, since the hooks of others may bring its weight.
        forward.within_norm = True
        try:
            if args:
                return norm(state, *args[1:], **kwargs)  # type: ignore[no-any-return]
            name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
            return norm(**{**kwargs, name: state})  # type: ignore[no-any-return]
        finally:
            forward.within_norm = False


class StackedPath:
    """The late states pass what lies between as one batch; hooks stack them and mix them."""

    within_trunk = False

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def install(self) -> list[Any]:
        """Put the hook on the last layer; that of the head follows the head."""
        last_layer = self.runtime.host.get_submodule(self.runtime.anatomy.layer_paths[-1])
        return [last_layer.register_forward_hook(self.on_last_layer)]

    def on_last_layer(self, _layer: nn.Module, _args: Any, output: Any) -> Any:
        """Return the states of all late layers as one batch, the last layer last."""
        forward = self.runtime.current()
        # The trunk alone gives the last layer's state: the mixture is made in front of the head.
        if forward is None or not forward.whole:
            return None
        states = checked(forward, forward.take())
        forward.stacked = True
        stacked = torch.cat([state.to(states[-1].device) for state in states])
        return with_first_tensor(output, stacked)

    def on_head(self, _head: nn.Module, args: tuple[Tensor, ...]) -> Tensor | None:
        """Return the mixture in place of the stacked states."""
        forward = self.runtime.current()
        if forward is None or not forward.stacked:
            return None
        forward.stacked = False  # a copy of the head within a wrapper has this hook, too
        task = self.runtime.task
        with record_function(MIXTURE_LABEL):
            normed = args[0].unflatten(0, (forward.mixture.config.k, -1)).movedim(0, -2)
            mixed = task.combine(forward, task.select(forward, normed))
        return normed[:, :1, -1] if mixed is None else mixed


def checked(forward: Forward, states: list[Tensor | None]) -> list[Tensor]:
    """Return the states.

    Raises:
        DepthmixError: a late layer did not run.
        TrainingError: a late layer ran without a graph in a forward that has one.
    """
    paths = forward.runtime.anatomy.layer_paths
    missing = [path for path, state in zip(paths, states, strict=True) if state is None]
    if missing:
        raise DepthmixError(f"layers that did not run before the final norm: {missing}")
    if torch.is_grad_enabled() and not all(forward.with_grad):
        raise TrainingError(
            "gradient checkpointing runs the late layers without gradients, which would "
            "leave them untrained: set gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    return [state for state in states if state is not None]


def without_stack(forward: Forward, output: Any) -> Any:
    """Leave the last layer's own rows alone in the hidden states, where all k were stacked."""
    states = output.get("hidden_states") if isinstance(output, ModelOutput) else None
    if not states or len(states[-1]) == len(states[0]):
        return output
    last = states[-1][-len(states[0]) :]
    return type(output)(**{**output, "hidden_states": (*states[:-1], last)})


def _put(whole: Tensor, keep: slice | Tensor, mixed: Tensor) -> Tensor:
    """Return what the norm gave, with the mixture at the positions that are kept."""
    if isinstance(keep, Tensor):
        # Of any integer type, negative or a mask: what a model indexes its states with.
        positions = torch.arange(whole.shape[1], device=whole.device)[keep]
        return whole.index_copy(1, positions, mixed)
    others = whole.shape[1] - mixed.shape[1]
    return torch.cat([whole[:, :others], mixed], dim=1) if others else mixed
