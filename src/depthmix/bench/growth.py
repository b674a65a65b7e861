"""How the cost of the loss grows with the vocabulary, the number of late layers and the tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from tqdm import tqdm

from depthmix.bench.loss import Shape, measure_loss

SHORT = Shape(tokens=256, vocabulary=32_000, width=256)
FULL = Shape(tokens=1024, vocabulary=32_000, width=1024)
VOCABULARIES = (32_000, 128_000, 256_000)
LATE_LAYERS = (1, 2, 3, 5, 8)
TOKENS = {False: (256, 512, 1024), True: (256, 1024, 2048, 4096, 8192)}


def measure_growth(full: bool, most_bytes: int) -> list[dict[str, Any]]:
    """Return one row a shape: what grows, the shape, and figures of ours and of the naive loss.

    Args:
        full: larger shapes, for a GPU or an hour of time.
        most_bytes: the naive loss is left out where it needs more than that.
    """
    rows = []
    for grows, shape in tqdm(list(_shapes(full)), desc="shapes of the loss", unit="shape"):
        figures = measure_loss(shape, repeats=1, with_naive=shape.naive_bytes <= most_bytes)
        rows.append({"grows": grows, **asdict(shape), **figures})
    return rows


def _shapes(full: bool) -> Iterator[tuple[str, Shape]]:
    start = FULL if full else SHORT
    for vocabulary in VOCABULARIES:
        yield "vocabulary", replace(start, vocabulary=vocabulary)
    for k in LATE_LAYERS:
        yield "k", replace(start, k=k)
    for tokens in TOKENS[full]:
        yield "tokens", replace(start, tokens=tokens)
