"""`cached_depth`: in training, frozen layers answer with what they gave for the same row before.

The model's own forward runs. Where every row of a batch is known, the first layer of the prefix
answers with the stored states and the others pass them on, so that no architecture needs code of
its own; otherwise the layers run, and what the last of them gives is stored.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.utils import logging

from depthmix.cache.prefix import Prefix, frozen_prefix
from depthmix.cache.store import DIGEST_BYTES, StateStore
from depthmix.errors import ConfigError
from depthmix.model.anatomy import first_tensor
from depthmix.model.probing import run_probe

logger = logging.get_logger(__name__)


def default_folder() -> Path:
    """Return where caches go: $DEPTHMIX_CACHE, or the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DEPTHMIX_CACHE") or Path(home) / "depthmix")


@contextmanager
def cached_depth(
    model: nn.Module, k: int, tokens: int, folder: Path | None = None
) -> Iterator[CachedDepth]:
    """Train `model` in this block with its frozen layers read from disk where they are known.

    Exact: the states are those that the layers gave, in their dtype. The first epoch fills the
    cache; a later run with the same model and k uses it. In evaluation mode nothing is cached.

    Example::

        with cached_depth(model, k=3, tokens=total_training_tokens):
            trainer.train()

    Args:
        model: with nothing trainable below its k late layers (`late_layers_only`, or MoDE alone).
        k: late layers.
        tokens: tokens of all training rows: what may be added to the cache.
        folder: of all caches; default: `default_folder()`.

    Raises:
        ConfigError: what the layers give is not the same in every epoch, or the disk is full.
    """
    cache = CachedDepth(model, frozen_prefix(model, k), tokens, folder or default_folder())
    try:
        with cache.attached():
            yield cache
    finally:
        cache.close()


class CachedDepth:
    """The cache of one model; see `cached_depth`.

    Attributes:
        hits: forwards that were read from disk.
        misses: forwards in which the prefix ran.
    """

    def __init__(self, model: nn.Module, prefix: Prefix, tokens: int, folder: Path) -> None:
        self.hits = self.misses = 0
        self._prefix = prefix
        self._replayed: Tensor | None = None
        self._recording: list[bytes] | None = None
        self._mask: Tensor | None = None
        self._full = False
        dtype = self._checked_dtype()
        self.folder = folder / prefix.digest(dtype)
        self.store = StateStore(self.folder, prefix.width, dtype, tokens)
        _require_space(self.folder, (tokens - self.store.tokens) * self.store.bytes_a_token)

    def close(self) -> None:
        """Let later runs have what was added; a full disk costs the cache, not the training."""
        try:
            self.store.close()
        except OSError as error:
            logger.warning(f"cache: not kept: {error}")

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Put the hooks on for the block."""
        layers, host = self._prefix.layers, self._prefix.host
        handles = [
            host.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            layers[-1].register_forward_hook(self._after_prefix),
        ]
        with self._short_circuit():
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    @contextmanager
    def _short_circuit(self) -> Iterator[None]:
        """Let the prefix layers' forwards answer with the state to replay, if there is one."""
        layers = self._prefix.layers
        originals = [layer.forward for layer in layers]
        try:
            for layer, original in zip(layers, originals, strict=True):
                layer.forward = partial(self._answer, original)
            yield
        finally:
            for layer in layers:
                del layer.forward

    def _answer(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Replay, or run the layer without a graph, since nothing here is trained."""
        given = first_tensor((*args, *kwargs.values()))
        if self._replayed is None:
            with torch.no_grad():
                output = original(*args, **kwargs)
        else:
            output = self._replayed if self._gives_tensor else (self._replayed,)
        if given is not None and given.requires_grad:
            # Reentrant checkpointing of the late layers needs an input that asks for a gradient.
            state = first_tensor(output)
            assert state is not None
            state.requires_grad_()
        return output

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look the rows of a training forward up."""
        self._replayed, self._recording = None, None
        ids = kwargs.get("input_ids", args[0] if args else None)
        if not module.training or ids is None:
            return
        mask = kwargs.get("attention_mask")
        self._mask = torch.ones_like(ids) if mask is None or mask.ndim != 2 else mask
        digests = row_digests(ids, self._mask, kwargs.get("position_ids"), _arithmetic(ids.device))
        if all(digest in self.store for digest in digests):
            self._replayed = self._gather(digests, ids)
            self.hits += 1
        else:
            self._recording = digests
            self.misses += 1

    def _after_prefix(self, _layer: nn.Module, _args: Any, output: Any) -> None:
        digests, self._recording = self._recording, None
        if digests is None or self._mask is None:
            return
        state = first_tensor(output)
        if state is None or state.dtype != self.store.dtype:
            return
        for row, mask, digest in zip(state.detach(), self._mask.bool(), digests, strict=True):
            if digest not in self.store and not self._full:
                self._add(digest, row[mask])

    def _add(self, digest: bytes, states: Tensor) -> None:
        try:
            self.store.add(digest, states)
        except OSError as error:
            self._full = True
            logger.warning(
                f"cache: no room in {self.folder} ({error.strerror}); training goes on without it"
            )

    def _gather(self, digests: list[bytes], ids: Tensor) -> Float[Tensor, "b t d"]:
        assert self._mask is not None
        mask = self._mask.bool().cpu()
        rows = torch.zeros(*ids.shape, self._prefix.width, dtype=self.store.dtype)
        for row, kept, digest in zip(rows, mask, digests, strict=True):
            row[kept] = self.store.get(digest)
        return rows.to(ids.device, non_blocking=True)

    def _checked_dtype(self) -> torch.dtype:
        """Run a probe with the prefix and one that replays its output: both must give the same.

        Returns the dtype of the prefix's output.

        Raises:
            ConfigError: the late layers read more of the prefix than its last hidden state.
        """
        host, layers = self._prefix.host, self._prefix.layers
        outputs: list[Any] = []
        handle = layers[-1].register_forward_hook(lambda _m, _a, output: outputs.append(output))
        training = [module for module in host.modules() if module.training]
        host.eval()
        try:
            with torch.no_grad():
                expected = run_probe(host)
                self._gives_tensor = isinstance(outputs[0], Tensor)
                self._replayed = first_tensor(outputs[0])
                with self._short_circuit():
                    found = run_probe(host)
        except (RuntimeError, AttributeError, TypeError, KeyError, IndexError) as error:
            raise ConfigError(f"the late layers do not run from a hidden state: {error}") from error
        finally:
            handle.remove()
            for module in training:
                module.training = True
            replayed, self._replayed = self._replayed, None
        assert replayed is not None
        if not torch.equal(expected, found):
            raise ConfigError("the late layers read more of the layers below than a hidden state")
        return replayed.dtype


def row_digests(
    ids: Int[Tensor, "b t"], mask: Tensor, positions: Tensor | None, arithmetic: str = ""
) -> list[bytes]:
    """Return a digest a row: of its tokens without padding, where they stand, and `arithmetic`."""
    places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if positions is not None:
        places = positions.expand_as(ids)
    packed = torch.stack([ids, places], dim=-1).cpu()
    return [
        hashlib.blake2b(
            arithmetic.encode() + row[kept].numpy().tobytes(), digest_size=DIGEST_BYTES
        ).digest()
        for row, kept in zip(packed, mask.bool().cpu(), strict=True)
    ]


def _arithmetic(device: torch.device) -> str:
    """Name the autocast dtype: the same row gives other states under it."""
    if not torch.is_autocast_enabled(device.type):
        return ""
    return str(torch.get_autocast_dtype(device.type))


def _size(count: int) -> str:
    gibibytes = count / 2**30
    return f"{gibibytes:,.1f} GiB" if gibibytes >= 1 else f"{count / 2**20:.1f} MiB"


def _require_space(folder: Path, needed: int) -> None:
    existing = next(parent for parent in [folder, *folder.parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise ConfigError(
            f"the states take {_size(needed)}, but {existing} has {_size(free)} free; choose "
            "another folder with cache_dir"
        )
