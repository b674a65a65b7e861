"""What the parts of `gpu.py` are told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """The command line.

    Attributes:
        model: folder of a causal model.
        data: files or sources of prompt and completion, as for `depthmix train --dataset`.
        output: the JSON file.
        minutes: for everything.
        seeds: of the comparisons.
        workers: runs of a comparison at a time, on the one GPU.
        small: sizes for a CPU.
    """

    model: str
    data: list[str]
    output: Path
    minutes: float
    seeds: int
    workers: int
    small: bool
