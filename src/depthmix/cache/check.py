"""Whether the prefix of a model may be replayed: found by running a row again, in other ways.

Classes of modules do not tell: dropout can be a function, NEFTune is a hook, and an auxiliary loss
reads routers of frozen layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from depthmix.cache.keys import BORDERS, Batch, Row
from depthmix.errors import ConfigError
from depthmix.model.runtime import RUNTIME_NAME, runtime_of

_FIRST_TOKENS = 4  # of a row: what leaks from the one before is strongest there
_FAILURES = (RuntimeError, AttributeError, TypeError, KeyError, IndexError, ValueError)


class RandomState:
    """The state of all random number generators that a model draws from, as it is now."""

    def __init__(self, model: nn.Module) -> None:
        devices = {p.device for p in model.parameters() if p.device.type not in ("cpu", "meta")}
        self._cpu = torch.get_rng_state()
        self._devices = [(torch.get_device_module(d), d) for d in devices]
        self._states = [module.get_rng_state(device) for module, device in self._devices]

    def restore(self) -> None:
        """Go back to it."""
        torch.set_rng_state(self._cpu)
        for (module, device), state in zip(self._devices, self._states, strict=True):
            module.set_rng_state(state, device)

    def depart(self) -> None:
        """Go to another one than the generators have now."""
        torch.rand(1)
        for _, device in self._devices:
            torch.rand(1, device=device)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run the block without gradients, and without a trace in random numbers and MoDE's figures."""
    before = RandomState(model)
    attached = RUNTIME_NAME in vars(model)
    try:
        with (
            torch.no_grad(),
            runtime_of(model).uncounted() if attached else nullcontext(),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")  # checkpointing wants gradients
            yield
    finally:
        before.restore()


@dataclass(frozen=True)
class FirstRun:
    """A forward as it ran, to be held against others of the same batch.

    Attributes:
        batch: its rows.
        arguments: by name.
        random: the state of the generators when it began.
        states: that the prefix gave, (b, t, ...).
        eps: of the coarsest arithmetic in it.
    """

    batch: Batch
    arguments: Mapping[str, Any]
    random: RandomState
    states: Tensor
    eps: float


@dataclass(frozen=True)
class _Part:
    """What of a batch is run again.

    Attributes:
        arguments: of the forward.
        kept: which of its positions belong to a row, (b, t).
        row: the one row that it is; None if it is the whole batch.
    """

    arguments: Mapping[str, Any]
    kept: Tensor
    row: Row | None


def check(
    run: FirstRun,
    prefix: Callable[[Mapping[str, Any]], Tensor],
    whole: Callable[[Mapping[str, Any], Tensor | None], tuple[Any, Tensor]],
) -> None:
    """Find out whether rows like those of a first run can be replayed.

    Args:
        run: the first run.
        prefix: gives the prefix's states for other arguments.
        whole: gives the model's output and those states, which it takes if there are any.

    Raises:
        ConfigError: they cannot; says why.
    """
    part = _part(run)
    try:
        # Without gradients the loss may be another one: not held against that of the first run.
        run.random.restore()
        output, states = whole(part.arguments, None)
        for _ in range(2):
            run.random.depart()
            _require_constant(states, prefix(part.arguments))
        if part.row is not None:
            _require_independent(run, part.row, states[part.kept.to(states.device)])
        run.random.restore()
        _require_same(output, whole(part.arguments, states)[0])
        if not part.kept.all():
            run.random.restore()
            zeros = torch.zeros_like(states)
            kept = part.kept.to(states.device)
            zeros[kept] = states[kept]
            _require_close(output, whole(part.arguments, zeros)[0], part.kept, run.eps**0.5)
    except _FAILURES as error:
        if isinstance(error, (ConfigError, torch.OutOfMemoryError)):
            raise
        raise ConfigError(f"the model does not run from stored states: {error}") from error


def _part(run: FirstRun) -> _Part:
    """Choose what is run again: one row of several, with padding if there is any."""
    batch = run.batch
    kept = torch.zeros(batch.shape, dtype=torch.bool)
    for row in batch.rows:
        kept[row.place, row.positions] = True
    if len(batch.rows) == 1 or not batch.apart:
        return _Part(run.arguments, kept, None)
    labels = run.arguments.get("labels", run.arguments.get("shift_labels"))
    by_token = isinstance(labels, Tensor) and tuple(labels.shape) == batch.shape

    def fitness(row: Row) -> tuple[bool, bool, int]:
        supervised = not by_token or bool((labels[row.place].cpu()[row.positions] >= 0).any())
        return supervised, not kept[row.place].all(), len(row.positions)

    # Of packed rows, one that others stand before.
    row = max((r for r in batch.rows if not batch.packed or r.positions[0] > 0), key=fitness)
    alone = kept.new_ones(1, len(row.positions)) if batch.packed else kept[row.place][None]
    return _Part(_alone(run, row), alone, row)


def _alone(run: FirstRun, row: Row) -> dict[str, Any]:
    """Return the arguments of a forward with one row alone."""
    rows, tokens = run.batch.shape

    def taken(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        of_row = value[row.place][None] if len(value) == rows else value
        if run.batch.packed and of_row.shape[:2] == (1, tokens):
            return of_row[:, row.positions.to(value.device)]
        return of_row

    borders = BORDERS if run.batch.packed else frozenset[str]()
    return {name: taken(value) for name, value in run.arguments.items() if name not in borders}


def _require_constant(states: Tensor, again: Tensor) -> None:
    """Other random numbers must give the same states: equal bits."""
    if not torch.equal(states, again):
        raise ConfigError(
            "the frozen layers give other states for the same rows when they run again "
            "(dropout, NEFTune noise), so that no epoch is like the one before"
        )


def _require_independent(run: FirstRun, row: Row, alone: Tensor) -> None:
    """A row that runs alone must give the states that it gave among others, but for rounding."""
    expected = run.states[row.place, row.positions.to(run.states.device)]
    if _distance(expected[:_FIRST_TOKENS], alone[:_FIRST_TOKENS]) > run.eps**0.5:
        raise ConfigError(
            "rows that share a batch change each other's states"
            + (" (packed rows need an attention that keeps them apart)" * run.batch.packed)
        )


def _require_same(output: Any, replayed: Any) -> None:
    """The model must read nothing of the prefix but its states: equal bits."""
    found = dict(_tensors(replayed))
    for name, tensor in _tensors(output):
        if name not in found or not torch.equal(tensor, found[name]):
            raise ConfigError(
                f"{name} of the model's output is not that of the stored states: the model reads "
                "more of its frozen layers than that (an auxiliary loss of their routers, "
                "all hidden states)"
            )


def _require_close(output: Any, replayed: Any, kept: Tensor, rounding: float) -> None:
    """What stands at padding must not matter, but for rounding."""
    found = dict(_tensors(replayed))
    for name, tensor in _tensors(output):
        by_token = tensor.shape[:2] == kept.shape
        mask = kept.to(tensor.device) if by_token else ...
        if tensor.is_floating_point() and _distance(tensor[mask], found[name][mask]) > rounding:
            raise ConfigError(f"{name} of the model's output depends on padding")


def _distance(expected: Tensor, found: Tensor) -> float:
    """Return how far one tensor lies from another, as a share of its length."""
    expected, found = expected.double(), found.double()
    return float((expected - found).norm() / expected.norm().clamp_min(1e-12))


def _tensors(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(part, str(key))
    elif isinstance(value, (tuple, list)):
        for place, part in enumerate(value):
            yield from _tensors(part, f"{name} {place}")
