"""Epochs from cached depth, half, light and late-layer, against an epoch of LoRA on all layers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from depthmix.bench.batch import make_batch
from depthmix.bench.training import HALF, LATE_LORA_MODE, LIGHT, LORA, Setting, prepared
from depthmix.cache.depth import cached_depth

LORA_EPOCH = "lora"
CACHED = (HALF, LIGHT, LATE_LORA_MODE)
UNCACHED, FIRST, LATER = "without the cache", "first epoch", "later epochs"


def row(variant: str, which: str) -> str:
    """Return the name under which an epoch of a variant is kept."""
    return f"{variant}: {which}"


def measure_epochs(setting: Setting, batch_rows: int, epochs: int) -> dict[str, dict[str, Any]]:
    """Return seconds of an epoch over the setting's rows, `batch_rows` at a time.

    LoRA's, and of each variant that leaves layers frozen: without the cache, the first epoch with
    it, and a later one.

    Args:
        setting: model and rows.
        batch_rows: rows of a step.
        epochs: of which the first fills the cache and the others, whose mean is taken, read it.
    """
    seconds = {LORA_EPOCH: _epoch(LORA, setting, batch_rows)}
    for variant in CACHED:
        seconds[row(variant, UNCACHED)] = _epoch(variant, setting, batch_rows)
        first, *later = _cached_epochs(variant, setting, batch_rows, epochs)
        seconds[row(variant, FIRST)] = first
        seconds[row(variant, LATER)] = sum(later) / len(later)
    return {name: {"seconds": value} for name, value in seconds.items()}


def _cached_epochs(name: str, setting: Setting, batch_rows: int, epochs: int) -> list[float]:
    tokens = sum(question + answer for question, answer in setting.lengths)
    model, step = prepared(name, setting)
    batches = list(_batches(setting, batch_rows, model))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.enter_context(cached_depth(model, tokens=tokens, folder=Path(folder)))
        return [_timed(step, batches) for _ in range(epochs)]


def _epoch(name: str, setting: Setting, batch_rows: int) -> float:
    """Return the seconds of the second epoch of a variant."""
    model, step = prepared(name, setting)
    batches = list(_batches(setting, batch_rows, model))
    _timed(step, batches[:1])
    return _timed(step, batches)


def _timed(step: Any, batches: list[dict[str, Any]]) -> float:
    began = time.perf_counter()
    for batch in batches:
        step(batch)
    return time.perf_counter() - began


def _batches(setting: Setting, rows: int, model: Any) -> Iterator[dict[str, Any]]:
    device = next(model.parameters()).device
    for start in range(0, len(setting.lengths), rows):
        lengths = setting.lengths[start : start + rows]
        yield make_batch(lengths, model.config.vocab_size, device, seed=start)
