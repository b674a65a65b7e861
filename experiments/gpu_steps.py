"""Whole training steps, and decoding, as `depthmix bench` measures them."""

from __future__ import annotations

from typing import Any

from depthmix.bench.batch import real_lengths
from depthmix.bench.decoding import measure_decoding
from depthmix.bench.training import VARIANTS, Setting, measure_steps

Row = dict[str, Any]


def steps(model: str, small: bool) -> list[Row]:
    """Return time and peak memory of one step of every method, relative to LoRA's as well."""
    rows, longest = (2, 16) if small else (8, None)
    setting = Setting(model, real_lengths(rows, longest), k=2 if small else 3)
    names = [name for name in VARIANTS if "naive" not in name]
    figures = measure_steps(setting, names, repeats=1 if small else 5)
    lora = figures["lora"]
    return [
        {
            "method": name,
            "ms": 1e3 * cost["seconds"],
            "MiB": round(cost["peak_bytes"] / 2**20),
            "time": cost["seconds"] / lora["seconds"],
            "memory": cost["peak_bytes"] / lora["peak_bytes"],
        }
        for name, cost in figures.items()
    ]


def decoding(model: str, small: bool) -> list[Row]:
    """Return time and peak memory of a prefill, and the time of a token."""
    prompt, tokens, repeats = (8, 4, 1) if small else (1024, 64, 5)
    setting = Setting(model, [], k=2 if small else 3)
    figures = measure_decoding(setting, prompt, tokens, repeats)
    return [
        {
            "model": name,
            "prefill ms": 1e3 * cost["prefill_seconds"],
            "prefill MiB": round(cost["prefill_peak_bytes"] / 2**20),
            "token ms": 1e3 * cost["token_seconds"],
        }
        for name, cost in figures.items()
    ]
