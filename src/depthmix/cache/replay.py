"""`CachedDepth`: the hooks that make frozen layers answer with what they gave before.

before_forward   the rows of the batch, and what they are known by     (keys.py)
answer           the first layer looks them up, inside autocast        (store.py)
after_prefix     the states that the last frozen layer gave
after_forward    a first batch is checked; unknown rows are stored     (check.py)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor, nn
from transformers.utils import logging

from depthmix.cache.check import FirstRun, RandomState, check, undisturbed
from depthmix.cache.keys import Batch, read_batch
from depthmix.cache.prefix import Prefix
from depthmix.cache.store import StateStore
from depthmix.errors import ConfigError
from depthmix.model.anatomy import first_tensor

logger = logging.get_logger(__name__)


class _Stopped(Exception):
    """The prefix has run, and what comes after it is not wanted."""


@dataclass
class _Pass:
    """One forward of the model; the second and third if it is to be checked at its end."""

    batch: Batch
    arguments: Mapping[str, Any] | None  # before hooks change them
    random: RandomState | None
    keys: list[bytes] | None = None  # of the rows, once the first layer runs
    eps: float = 0.0


class CachedDepth:
    """The cache of one model; see `cached_depth`.

    Attributes:
        hits: forwards that were read from disk.
        misses: forwards in which the prefix ran.
        folder: of this cache.
        store: what is in it.
    """

    def __init__(
        self,
        prefix: Prefix,
        tokens: int | None,
        folder: Path,
        dtype: torch.dtype | None = None,
        required: bool = True,
    ) -> None:
        self.hits = self.misses = 0
        self._prefix, self._required = prefix, required
        self._names = list(inspect.signature(type(prefix.host).forward).parameters)[1:]
        self._pass: _Pass | None = None
        self._replayed: Tensor | None = None
        self._states: Tensor | None = None
        self._checking = self._stops = self._ended = self._full = False
        self._checked: set[tuple[Any, ...]] = set()
        self._context = b""
        output = prefix.probe()
        self._gives_tensor = isinstance(output, Tensor)
        state = first_tensor(output)
        assert state is not None
        self._device, self._dtype, self._shape = state.device, state.dtype, state.shape[2:]
        self.folder = folder / prefix.digest(dtype or self._dtype, self._device)
        self.store = StateStore(self.folder, self._shape.numel(), dtype or self._dtype, tokens)

    def close(self) -> None:
        """Let later runs have what was added; a full disk costs the cache, not the training."""
        try:
            self.store.close()
        except OSError as error:
            logger.warning(f"cache: not kept: {error}")

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Put the hooks on for the block."""
        host, last = self._prefix.host, self._prefix.layers[-1]
        handles = [
            host.register_forward_pre_hook(self._before_forward, with_kwargs=True, prepend=True),
            host.register_forward_hook(self._after_forward, with_kwargs=True, always_call=True),
            last.register_forward_hook(self._after_prefix),
        ]
        with self._prefix.answering(self._answer):
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def read_ahead(self, arguments: Mapping[str, Any]) -> None:
        """Have the system read the rows of a coming training batch from the disk."""
        batch = read_batch(arguments, self._prefix.host.config, training=True)
        if batch is not None and not self._ended:
            self.store.read_ahead(_keys(batch, self._context))

    # Hooks, in the order in which they run

    def _before_forward(
        self, host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._checking:
            return
        self._pass = self._replayed = self._states = None
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        labelled = any(arguments.get(name) is not None for name in ("labels", "shift_labels"))
        if self._ended or not (host.training or labelled):
            return
        if any(isinstance(v, Tensor) and v.requires_grad for v in arguments.values()):
            self._end("an argument of the model is trained, which all layers see")
            return
        batch = read_batch(arguments, self._prefix.host.config, host.training)
        if batch is not None:
            checked = batch.form in self._checked
            self._pass = _Pass(batch, *(None, None) if checked else (arguments, RandomState(host)))

    def _answer(self, place: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Replay, or run the layer without a graph, since nothing here is trained."""
        given = first_tensor((*args, *kwargs.values()))
        if place == 0 and self._pass is not None:
            self._look_up(self._pass)
        if self._replayed is None:
            with torch.no_grad():
                output = original(*args, **kwargs)
        else:
            replayed = self._replayed.detach()  # each layer's own, to ask for a gradient below
            output = replayed if self._gives_tensor else (replayed,)
        if given is not None and given.requires_grad:
            # Reentrant checkpointing of the late layers needs an input that asks for a gradient.
            state = first_tensor(output)
            assert state is not None
            state.requires_grad_()
        return output

    def _look_up(self, current: _Pass) -> None:
        arithmetic = _autocast(self._device)
        self._context = str(arithmetic).encode()
        current.keys = _keys(current.batch, self._context)
        current.eps = max(torch.finfo(d).eps for d in (self._dtype, arithmetic) if d is not None)
        if self.store.knows(current.keys) and current.random is None:
            self._replayed = self._gather(current.batch, current.keys)
            self.hits += 1
        else:
            self.misses += 1

    def _after_prefix(self, _layer: nn.Module, _args: Any, output: Any) -> None:
        state = first_tensor(output)
        if state is not None and (self._pass is not None or self._checking):
            self._states = state.detach()
        if self._stops:
            raise _Stopped

    def _after_forward(
        self, _host: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._checking:
            return
        current, states, replayed = self._pass, self._states, self._replayed
        self._pass = self._replayed = self._states = None
        if current is None or states is None or replayed is not None or output is None:
            return  # there is no output where the forward raised
        if current.random is not None:
            self._check(current, states)
        if not self._ended:
            self._keep(current, states)

    # The check of a first batch

    def _check(self, current: _Pass, states: Tensor) -> None:
        assert current.arguments is not None
        assert current.random is not None
        run = FirstRun(current.batch, current.arguments, current.random, states, current.eps)
        self._checking = True
        try:
            with undisturbed(self._prefix.host):
                check(run, self._prefix_states, self._whole)
        except ConfigError as error:
            self._end(str(error))
        finally:
            self._checking = False
        self._checked.add(current.batch.form)

    def _prefix_states(self, arguments: Mapping[str, Any]) -> Tensor:
        """Run the prefix alone."""
        self._stops = True
        try:
            self._prefix.host(**arguments)
        except _Stopped:
            pass
        finally:
            self._stops, states, self._states = False, self._states, None
        assert states is not None
        return states

    def _whole(self, arguments: Mapping[str, Any], states: Tensor | None) -> tuple[Any, Tensor]:
        """Run the model, from given states if there are any; return the states as well."""
        self._replayed = states
        try:
            output, found = self._prefix.host(**arguments), self._states
        finally:
            self._replayed = self._states = None
        assert found is not None
        return output, found

    def _end(self, reason: str) -> None:
        """End the caching, nothing having been replayed.

        Raises:
            ConfigError: it is required.
        """
        self._ended = True
        if self._required:
            raise ConfigError(f"cache: {reason}")
        logger.warning(f"no cache: {reason}")

    # The store

    def _keep(self, current: _Pass, states: Tensor) -> None:
        assert current.keys is not None
        if states.dtype != self._dtype:
            self._end(f"the frozen layers give {states.dtype} here and {self._dtype} by themselves")
            return
        for row, key in zip(current.batch.rows, current.keys, strict=True):
            if key not in self.store and not self._full:
                self._add(key, states[row.place, row.positions.to(states.device)].flatten(1))

    def _add(self, key: bytes, states: Tensor) -> None:
        try:
            self.store.add(key, states)
        except OSError as error:
            self._full = True
            logger.warning(f"cache: {self.folder}: {error.strerror}; no more rows are kept")

    def _gather(self, batch: Batch, keys: list[bytes]) -> Tensor:
        """Return the stored states of a batch, with zeros at padding."""
        width, on_gpu = self._shape.numel(), self._device.type == "cuda"
        states = torch.zeros(*batch.shape, width, dtype=self.store.dtype, pin_memory=on_gpu)
        for row, key in zip(batch.rows, keys, strict=True):
            states[row.place, row.positions] = self.store.get(key)
        states = states.to(self._device, non_blocking=True).to(self._dtype)
        return states.view(*batch.shape, *self._shape)


def _keys(batch: Batch, context: bytes) -> list[bytes]:
    """Return the keys of rows: their digests, and what else was decided when the layers ran."""
    return [xxhash.xxh3_128(row.digest + context).digest() for row in batch.rows]


def _autocast(device: torch.device) -> torch.dtype | None:
    """Return the autocast dtype: the same row gives other states under it."""
    if not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
