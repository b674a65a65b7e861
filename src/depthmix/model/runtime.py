"""`Runtime`: the wiring of an attached model, which lasts as long as the model.

    host            its call is a `Forward`                   (forward.py)
    late layers     their states are kept in it
    path            the states become a mixture               (paths.py)
    task            the mixture becomes a loss, in training   (language.py, classifier.py)

Everything is a plain object, not a module, and hooks are bound methods: the model can be copied
and pickled, and the state dict does not change. Nothing here belongs to one forward.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from depthmix.errors import DepthmixError
from depthmix.method.mixture import DepthMixture
from depthmix.model import forward as forwards
from depthmix.model.active import ActiveMixture, host_of
from depthmix.model.anatomy import Anatomy, Between, first_tensor, is_classifier
from depthmix.model.classifier import ClassifierTask
from depthmix.model.forward import Forward
from depthmix.model.language import LanguageTask
from depthmix.model.paths import NormPath, Path, StackedPath, without_stack
from depthmix.model.statistics import Statistics

RUNTIME_NAME = "depthmix_runtime"  # attribute of the model that carries MoDE

TrainerKind = Literal["sft", "plain", "other"]


class Task(Protocol):
    """What a model is for decides what becomes of the mixture."""

    def begin(self, forward: Forward, kwargs: dict[str, Any]) -> dict[str, Any]:
        """See what the forward is to give; return the arguments for the model's own forward."""
        ...

    def select(self, forward: Forward, states: Tensor) -> Tensor:
        """Return those rows of the states, (b, t, ...), that are wanted in this forward."""
        ...

    def combine(
        self, forward: Forward, normed: Float[Tensor, "*b k d"]
    ) -> Float[Tensor, "*b d"] | None:
        """Take the selected states; return their mixture, or None if the model needs none."""
        ...

    def on_scores(self, head: nn.Module, args: Any, scores: Tensor) -> None:
        """Forward hook of the head."""
        ...

    def finish(self, forward: Forward, output: Any) -> Any:
        """Return the output in place of the model's own, or None to leave it."""
        ...


class Runtime:
    """Hooks of one attached model.

    Args:
        host: the model that carries MoDE, `depthmix` already set on it.
        anatomy: where its parts are.
    """

    def __init__(self, host: PreTrainedModel, anatomy: Anatomy) -> None:
        self.host = host
        self.anatomy = anatomy
        self.active = ActiveMixture()
        self.records: list[list[Tensor]] = []
        self.statistics = Statistics(anatomy.layer_indices)
        self.evaluation = Statistics(anatomy.layer_indices)
        self.hold_router = False
        self.trainer: TrainerKind | None = None
        self.temperature = 1.0  # of the logits in a trainer that samples
        self.traced: Forward | None = None  # the current forward while it is being compiled
        parameters = inspect.signature(type(host).forward).parameters
        self.forward_names = list(parameters)[1:]
        self.takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        self.path: Path = (StackedPath if anatomy.between is Between.MODULES else NormPath)(self)
        self.task: Task = (ClassifierTask if is_classifier(host) else LanguageTask)(self)
        self._handles = [*self._wire(), *self.path.install()]
        self._head: nn.Module | None = None
        self._head_handles: list[Any] = []
        self._follow_head()

    def _wire(self) -> list[Any]:
        find, anatomy = self.host.get_submodule, self.anatomy
        parts = anatomy.layers_path.split(".")
        trunks = [find(".".join(parts[:depth])) for depth in range(1, len(parts))]
        return [
            self.host.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            self.host.register_forward_hook(self.after_forward, with_kwargs=True),
            *(t.register_forward_pre_hook(self.before_trunk, with_kwargs=True) for t in trunks),
            *(
                find(path).register_forward_hook(partial(self.on_layer, place))
                for place, path in enumerate(anatomy.layer_paths)
            ),
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
        for handle in (*self._handles, *self._head_handles):
            handle.remove()

    def mixture(self, host: nn.Module | None = None) -> DepthMixture | None:
        """Return the mixture that is active in the model (or a replica of it), if there is one."""
        return self.active(host or self.host)

    def figures(self, training: bool) -> Statistics:
        """Return where the figures of a forward are added up."""
        return self.statistics if training else self.evaluation

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Keep the forwards of the block out of all figures and records."""
        records, self.records = self.records, []
        try:
            with self.statistics.unchanged(), self.evaluation.unchanged():
                yield
        finally:
            self.records = records

    def current(self) -> Forward | None:
        """Return the forward that is running in this context."""
        return forwards.current(self)

    def before_forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """Begin a forward of the model, head and all."""
        self._follow_head()
        forward = self._new(host, whole=True)
        if forward is None:
            self.active.require_carried(host)
            return None
        kwargs = {**dict(zip(self.forward_names, args, strict=False)), **kwargs}
        return (), forwards.enter(forward, self.task.begin(forward, kwargs))

    def before_trunk(
        self, trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Begin a forward where the trunk is called without the model (TRL, reward models)."""
        if self.current() is not None:
            return None
        if getattr(trunk, "_is_replica", False):
            raise DepthmixError("DataParallel around a part of the model: wrap the whole model")
        forward = self._new(self.host, whole=False)
        return None if forward is None else (args, forwards.enter(forward, kwargs))

    def _new(self, host: Any, whole: bool) -> Forward | None:
        mixture = self.mixture(host)
        if mixture is None or (mixture.config.k == 1 and not host.training):
            return None
        self._require_layers()
        return forwards.begin(self, host, mixture, whole)

    def _require_layers(self) -> None:
        """Raise where layers were added or taken away since the model was looked at."""
        layers: Any = self.host.get_submodule(self.anatomy.layers_path)
        if len(layers) != self.anatomy.layer_count:
            raise DepthmixError(
                f"{self.anatomy.layers_path} had {self.anatomy.layer_count} layers when MoDE was "
                f"attached, and has {len(layers)} now (layer_replication?): change the layers first"
            )

    def on_layer(self, place: int, _layer: nn.Module, _args: Any, output: Any) -> None:
        """Keep the state of a late layer, and whether it was made with a graph."""
        forward = self.current()
        if forward is None:
            return  # gradient checkpointing runs the layer once more, in the backward pass
        state = first_tensor(output)
        if forward.keep is not None and state is not None:
            kept = state[:, forward.keep]
            # The other positions, where there are any, need not be held.
            state = kept if kept.shape == state.shape else kept.clone()
        forward.states[place], forward.with_grad[place] = state, torch.is_grad_enabled()

    def after_forward(
        self, host: nn.Module, _args: Any, kwargs: dict[str, Any], output: Any
    ) -> Any:
        """End a forward of the model."""
        forward = forwards.leave(self, kwargs)
        if forward is not None:
            given = self.task.finish(forward, output)
            return without_stack(forward, output if given is None else given)
        # A hook of another library has replaced the arguments, and the forward ended with them. The
        # trunk has begun one of its own, which is all that inference needs of it.
        served_by_trunk = self.path.within_trunk and not host.training
        if torch.compiler.is_compiling() or served_by_trunk:
            return None
        if self._new(host, whole=True) is not None:
            raise DepthmixError(
                "a forward pre-hook of another library has replaced the model's arguments after "
                "MoDE's own: register it with prepend=True"
            )
        return None

    def mix(self, forward: Forward, normed: Float[Tensor, "*b k d"]) -> Float[Tensor, "*b d"]:
        """Return the mixture, and record the gate."""
        mixed, gate = forward.mixture(normed, self.hold_router)
        for gates in self.records:
            gates.append(gate.detach())
        return mixed  # type: ignore[no-any-return]

    def _follow_head(self) -> None:
        """Move the head's hooks to what stands at its place now: PEFT wraps heads."""
        head = self.host.get_submodule(self.anatomy.head_path)
        if head is self._head:
            return
        for handle in self._head_handles:
            handle.remove()
        self._head = head
        self._head_handles = [
            head.register_forward_pre_hook(self.path.on_head),
            head.register_forward_hook(self.task.on_scores),
        ]


def runtime_of(model: nn.Module) -> Runtime:
    """Return the runtime of an attached model, PEFT-wrapped or not.

    Raises:
        DepthmixError: no MoDE is attached.
    """
    runtime = find_runtime(model)
    if runtime is None:
        raise DepthmixError(f"no MoDE is attached to this {type(model).__name__}")
    return runtime


def find_runtime(model: nn.Module) -> Runtime | None:
    """Return the runtime of a model, or None if no MoDE is attached."""
    return vars(host_of(model)).get(RUNTIME_NAME)
