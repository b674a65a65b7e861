"""`Runtime`: the hooks that feed the mixture of an attached model.

Two ways lead to what each late layer gives the head:

    a final norm        the late states pass it one by one, and the mixture is its output
      layer taps, on_norm
    anything else       (dense layers, a pooler) all k states pass as one batch of k x b rows, and
      on_last_layer     are mixed in front of the head
      on_head

Everything lives in one plain object, not a module, bound by methods: the model can be copied and
pickled, and the state dict does not change.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import PreTrainedModel

from depthmix.adapters import ActiveMixture, host_of
from depthmix.discovery import Anatomy, first_tensor, with_first_tensor
from depthmix.errors import DepthmixError, TrainingError
from depthmix.mixture import DepthMixture
from depthmix.statistics import TrainingStatistics

RUNTIME_NAME = "depthmix_runtime"  # attribute of the model that carries MoDE
# What a profiler shows of depthmix.
MIXTURE_LABEL, LOSS_LABEL = "depthmix: mixture", "depthmix: loss"

TrainerKind = Literal["sft", "other"]


class LayerTap:
    """A forward hook that keeps what a layer gives."""

    def __init__(self) -> None:
        self.state: Tensor | None = None
        self.with_grad = False

    def __call__(self, _layer: nn.Module, _args: Any, output: Any) -> None:
        """Keep the state, and whether it was made with a graph."""
        self.state = first_tensor(output)
        self.with_grad = torch.is_grad_enabled()

    def take(self) -> Tensor | None:
        """Return the state and let go of it."""
        state, self.state = self.state, None
        return state


class Runtime(ABC):
    """Hooks of one attached model.

    Args:
        host: the model that carries MoDE, `depthmix` already set on it.
        anatomy: where its parts are.
    """

    def __init__(self, host: PreTrainedModel, anatomy: Anatomy) -> None:
        self.host = host
        self.anatomy = anatomy
        self.mixture = ActiveMixture(host)
        self.taps = [LayerTap() for _ in anatomy.layer_indices]
        self.records: list[list[Tensor]] = []
        self.statistics = TrainingStatistics(anatomy.layer_indices)
        self.hold_router = False
        self._within_norm = False
        self.trainer: TrainerKind | None = None
        self.forward_names = list(inspect.signature(type(host).forward).parameters)[1:]
        layers = [host.get_submodule(path) for path in anatomy.layer_paths]
        self._handles = [
            *(
                layer.register_forward_hook(tap)
                for layer, tap in zip(layers, self.taps, strict=True)
            ),
            *self._ways(),
            host.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            host.register_forward_hook(self.after_forward, with_kwargs=True, always_call=True),
        ]

    def _ways(self) -> list[Any]:
        find = self.host.get_submodule
        if not self.anatomy.stacked:
            norm = find(self.anatomy.norm_path)
            return [norm.register_forward_hook(self.on_norm, with_kwargs=True)]
        return [
            find(self.anatomy.layer_paths[-1]).register_forward_hook(self.on_last_layer),
            find(self.anatomy.head_path).register_forward_pre_hook(self.on_head),
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        """Copy with the model; a copy of one of its modules alone, as PEFT makes, shares this."""
        if id(self.host) not in memo:
            return self
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def mixture_at_work(self) -> DepthMixture | None:
        """Return the mixture that applies now, or None where the base model alone answers."""
        mixture = self.mixture()
        return None if mixture is None or mixture.config.k == 1 else mixture

    @abstractmethod
    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """Forward pre-hook of the model."""

    @abstractmethod
    def after_forward(
        self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Forward hook of the model; its output is None if it raised."""

    @abstractmethod
    def select(self, states: Tensor) -> Tensor:
        """Return those rows of the states, (b, t, ...), that are wanted in this forward."""

    @abstractmethod
    def receive(
        self, mixture: DepthMixture, normed: Float[Tensor, "*b k d"]
    ) -> Float[Tensor, "*b d"] | None:
        """Take the selected states; return their mixture, or None if the model needs none."""

    def mix(self, mixture: DepthMixture, normed: Float[Tensor, "*b k d"]) -> Float[Tensor, "*b d"]:
        """Return the mixture, and record the gate."""
        mixed, gate = mixture(normed, self.hold_router)
        for gates in self.records:
            gates.append(gate.detach())
        return mixed  # type: ignore[no-any-return]

    def on_norm(
        self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return the mixture in place of the last layer's normed state."""
        if self._within_norm:
            return None
        states = [tap.take() for tap in self.taps]
        mixture = self.mixture_at_work()
        if mixture is None:
            return None
        if states[-1] is None and (not norm.training or not any(s is not None for s in states)):
            # The norm of something else, or an early exit (`assistant_early_exit`) for a draft.
            return None
        # What the norm gets is the last layer's state.
        *late, _ = self._checked(states)
        last = first_tensor(output)
        assert last is not None
        with record_function(MIXTURE_LABEL):
            late = [state[:, -last.shape[1] :].to(last.device) for state in late]
            normed = [self._normed(norm, self.select(state), args, kwargs) for state in late]
            mixed = self.receive(mixture, torch.stack([*normed, self.select(last)], dim=-2))
        return None if mixed is None else with_first_tensor(output, mixed)

    def on_last_layer(self, _layer: nn.Module, _args: Any, output: Any) -> Any:
        """Return the states of all late layers as one batch, the last layer last."""
        if self.mixture_at_work() is None:
            return None
        # Not taken: gradient checkpointing runs this once more in the backward pass.
        states = self._checked([tap.state for tap in self.taps])
        stacked = torch.cat([state.to(states[-1].device) for state in states])
        return with_first_tensor(output, stacked)

    def on_head(self, _head: nn.Module, args: tuple[Tensor, ...]) -> Tensor | None:
        """Return the mixture in place of the stacked states."""
        mixture = self.mixture_at_work()
        if mixture is None:
            return None
        with record_function(MIXTURE_LABEL):
            normed = args[0].unflatten(0, (mixture.config.k, -1)).movedim(0, -2)
            mixed = self.receive(mixture, self.select(normed))
        return normed[:, :1, -1] if mixed is None else mixed

    def _normed(
        self, norm: nn.Module, state: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Apply the final norm, if there is one, to another state."""
        if not self.anatomy.has_norm:
            return state
        # As a module, since the hooks of others may bring its weight.
        self._within_norm = True
        try:
            if args:
                return norm(state, *args[1:], **kwargs)  # type: ignore[no-any-return]
            name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
            return norm(**{**kwargs, name: state})  # type: ignore[no-any-return]
        finally:
            self._within_norm = False

    def _checked(self, states: list[Tensor | None]) -> list[Tensor]:
        missing = [
            path
            for path, state in zip(self.anatomy.layer_paths, states, strict=True)
            if state is None
        ]
        if missing:
            raise DepthmixError(f"layers that did not run before the final norm: {missing}")
        if torch.is_grad_enabled() and not all(tap.with_grad for tap in self.taps):
            raise TrainingError(
                "gradient checkpointing runs the late layers without gradients, which would "
                "leave them untrained: set gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        return [state for state in states if state is not None]


def runtime_of(model: nn.Module) -> Runtime:
    """Return the runtime of an attached model, PEFT-wrapped or not.

    Raises:
        DepthmixError: no MoDE is attached.
    """
    runtime = vars(host_of(model)).get(RUNTIME_NAME)
    if runtime is None:
        raise DepthmixError(f"no MoDE is attached to this {type(model).__name__}")
    return runtime  # type: ignore[no-any-return]


def require_trainable(host: nn.Module, mixture: DepthMixture) -> None:
    """Refuse to train beside a frozen MoDE: it would be left out of the checkpoint too.

    Raises:
        TrainingError: something is trained, and MoDE is not.
    """
    if any(p.requires_grad for p in mixture.parameters()):
        return
    if any(p.requires_grad for p in host.parameters()):
        raise TrainingError(
            "MoDE is attached but frozen, so it would be neither trained nor saved: put "
            "'depthmix' into modules_to_save of the PEFT configuration, or pass that "
            "configuration to depthmix.attach(model, config, peft_config)"
        )
