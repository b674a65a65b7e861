"""An epoch of late-layer LoRA + MoDE from cached depth, against an epoch of LoRA on all layers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from depthmix.bench.batch import make_batch
from depthmix.bench.training import LATE_LORA_MODE, LORA, Setting, prepared
from depthmix.cache.depth import cached_depth

LORA_EPOCH, FIRST, LATER, UNCACHED = "lora", "first epoch", "later epochs", "without the cache"


def measure_epochs(setting: Setting, batch_rows: int, epochs: int) -> dict[str, dict[str, Any]]:
    """Return seconds of an epoch over the setting's rows, `batch_rows` at a time.

    Args:
        setting: model and rows.
        batch_rows: rows of a step.
        epochs: of which the first fills the cache and the others, whose mean is taken, read it.
    """
    seconds = {LORA_EPOCH: _epoch(LORA, setting, batch_rows)}
    seconds[UNCACHED] = _epoch(LATE_LORA_MODE, setting, batch_rows)
    tokens = sum(question + answer for question, answer in setting.lengths)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model, step = prepared(LATE_LORA_MODE, setting)
        batches = list(_batches(setting, batch_rows, model))
        stack.enter_context(cached_depth(model, tokens=tokens, folder=folder))
        times = [_timed(step, batches) for _ in range(epochs)]
    seconds[FIRST], seconds[LATER] = times[0], sum(times[1:]) / len(times[1:])
    return {name: {"seconds": value} for name, value in seconds.items()}


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
