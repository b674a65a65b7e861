"""Whether the prefix of a model may be replayed: found by running a batch again, in other ways.

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
        """Go to another one."""
        self.restore()
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


def check(
    run: FirstRun,
    prefix: Callable[[Mapping[str, Any]], Tensor],
    whole: Callable[[Mapping[str, Any], Tensor | None], Any],
) -> None:
    """Find out whether rows like those of a first run can be replayed.

    Args:
        run: the first run.
        prefix: gives the prefix's states for other arguments.
        whole: gives the model's output for the arguments, from given states if there are any.

    Raises:
        ConfigError: they cannot; says why.
    """
    try:
        run.random.depart()
        again = prefix(run.arguments)
        if not torch.equal(again, run.states):
            raise ConfigError(
                "the frozen layers give other states for the same rows when they run again "
                "(dropout, NEFTune noise), so that no epoch is like the one before"
            )
        # Without gradients the loss may be another one: not held against that of the first run.
        run.random.restore()
        output = whole(run.arguments, None)
        run.random.restore()
        _require_same(output, whole(run.arguments, run.states))
        if run.batch.padded:
            run.random.restore()
            _require_close(run, output, whole(run.arguments, unpadded(run.states, run.batch)))
        if len(run.batch.rows) > 1 and run.batch.apart:
            _require_independent(run, prefix)
    except _FAILURES as error:
        if isinstance(error, (ConfigError, torch.OutOfMemoryError)):
            raise
        raise ConfigError(f"the model does not run from stored states: {error}") from error


def unpadded(states: Tensor, batch: Batch) -> Tensor:
    """Return the states with zeros where no row is."""
    kept = torch.zeros_like(states)
    for row in batch.rows:
        kept[row.place, row.positions] = states[row.place, row.positions]
    return kept


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


def _require_close(run: FirstRun, output: Any, replayed: Any) -> None:
    """What stands at padding must not matter, but to rounding."""
    found = dict(_tensors(replayed))
    kept = torch.zeros(run.batch.shape, dtype=torch.bool)
    for row in run.batch.rows:
        kept[row.place, row.positions] = True
    for name, tensor in _tensors(output):
        by_token = tuple(tensor.shape[:2]) == run.batch.shape
        mask = kept.to(tensor.device) if by_token else ...
        rounding = run.eps**0.5
        if tensor.is_floating_point() and _distance(tensor[mask], found[name][mask]) > rounding:
            raise ConfigError(f"{name} of the model's output depends on padding")


def _require_independent(run: FirstRun, prefix: Callable[[Mapping[str, Any]], Tensor]) -> None:
    """A row that runs alone must give the states that it gave among others."""
    behind = [row for row in run.batch.rows[1:] if len(row.positions) > 1]
    if not behind:
        return
    row = max(behind, key=lambda row: len(row.positions))
    states = prefix(_alone(run, row))
    positions = torch.arange(len(row.positions)) if run.batch.packed else row.positions
    found = states[0, positions][:_FIRST_TOKENS]
    expected = run.states[row.place, row.positions][:_FIRST_TOKENS]
    if _distance(expected, found) > run.eps**0.5:
        raise ConfigError(
            "rows that share a batch change each other's states"
            + (" (packed rows need an attention that keeps them apart)" * run.batch.packed)
        )


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
