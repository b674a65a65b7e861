"""Graphics cards by name, and whether a plan fits one."""

from __future__ import annotations

import re
from typing import Literal

from depthmix.errors import ConfigError, nearest, shown

Fit = Literal["yes", "tight", "no"]

# MiB, as nvidia-smi and rocm-smi report them.
CARDS = {
    "t4": 15360,
    "v100-16": 16384,
    "v100-32": 32768,
    "p100": 16384,
    "rtx3090": 24576,
    "rtx4090": 24564,
    "rtx5090": 32607,
    "a10": 23028,
    "l4": 23034,
    "l40s": 46068,
    "a6000": 49140,
    "rtx-pro-6000": 97887,
    "a100-40": 40960,
    "a100": 81920,
    "h100": 81559,
    "h200": 143771,
    "b200": 183359,
    "mi250x": 65536,
    "mi300x": 196592,
}
# What CUDA, its libraries and the allocator's gaps take besides, and how far a plan may be off.
_CONTEXT = 2**30
_MARGIN = 1.15

_UNITS = {"": 2**30, "g": 2**30, "gib": 2**30, "gb": 10**9, "m": 2**20, "mib": 2**20, "mb": 10**6}


def memory_of(card: str) -> int:
    """Return the bytes of a card.

    Raises:
        ConfigError: no such card is known.
    """
    name = card.lower().replace("_", "-").replace(" ", "")
    if name not in CARDS:
        hint = nearest(name, CARDS) or f"; known are {', '.join(CARDS)}, or give --memory"
        raise ConfigError(f"--gpu: no card {shown(card)} is known{hint}")
    return CARDS[name] * 2**20


def read_size(text: str) -> int:
    """Return the bytes that a text such as 24GiB, 80GB or 24 (GiB) means.

    Raises:
        ValueError: it means none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None or float(found[1]) == 0:
        raise ValueError(f"must be a size such as 24GiB, not {shown(text)}")
    return int(float(found[1]) * unit)


def fit(total: int, memory: int) -> Fit:
    """Return whether a step of `total` bytes fits: for certain, within the plan's error, or not."""
    if total * _MARGIN + _CONTEXT <= memory:
        return "yes"
    return "tight" if total + _CONTEXT <= memory else "no"
