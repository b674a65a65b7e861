"""Time and peak memory of a call, on the CPU and on CUDA, and what it asks of the LM head."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import logging

P = ParamSpec("P")
R = TypeVar("R")

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def median_seconds(
    calls: Mapping[str, Callable[[], object]], repeats: int, warm_up: bool = True
) -> dict[str, float]:
    """Return the median time of each call, all of them run in turn so that they share the noise.

    Args:
        calls: what to time.
        repeats: medians of so many.
        warm_up: call each once beforehand; not needed where that was done.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    if warm_up:
        for call in calls.values():
            call()
    for _ in range(repeats):
        for name, call in calls.items():
            _synchronize()
            began = time.perf_counter()
            call()
            _synchronize()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_bytes(call: Callable[[], object]) -> int:
    """Return by how much memory rose at most above what was in use before the call.

    On the CPU this is resident memory, as Linux counts it: measure each variant `in_fresh_process`,
    since freed memory that the allocator keeps would hide a later rise.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _CLEAR_REFS.write_text("5")  # resets the high-water mark
    before = _resident("VmRSS")
    call()
    return _resident("VmHWM") - before


def allocated_bytes(call: Callable[[], object]) -> int:
    """Return by how much memory in use by tensors rose at most above what was before the call.

    Other than `peak_bytes`, on the CPU as well: freed memory that the allocator keeps is left out.
    """
    if torch.cuda.is_available():
        return peak_bytes(call)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results: Any = profiler.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    sizes: Iterable[int] = (
        event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())
    )
    return max(itertools.accumulate(sizes, initial=0))


def in_fresh_process(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Return what `function` returns in a new process with as many threads as this one has."""
    # A server that has imported everything and touched no device forks quickly and cleanly.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["depthmix.quiet", function.__module__])
    threads = (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, context, _begin_quietly, threads) as pool:
        return pool.submit(function, *args, **kwargs).result()


def _begin_quietly(threads: int) -> None:
    """What the parent has warned of need not be said again by every process."""
    warnings.simplefilter("ignore")
    logging.disable_progress_bar()
    torch.set_num_threads(threads)


@dataclass
class HeadCounts:
    """What a step asks of the LM head.

    Attributes:
        projected: states multiplied with the head's weight.
        pulled_back: gradients of logits multiplied with it.
        largest_logits_bytes: size of the largest block of logits made.
    """

    projected: int = 0
    pulled_back: int = 0
    largest_logits_bytes: int = 0


class CountHead(TorchDispatchMode):
    """Counts the matrix products with the head's weight in a block, by whatever path they come.

    A part of the weight counts as a part: a loss that goes through the vocabulary in tiles projects
    a state once when it has seen all tiles.

    Args:
        weight: (vocabulary, width) of the head; known by its memory, also where it is sliced.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._memory = weight.untyped_storage().data_ptr()
        self._vocabulary, self._width = weight.shape
        self._multiplied = 0
        self._pulled = 0
        self._largest = 0

    @property
    def counts(self) -> HeadCounts:
        """What was counted so far."""
        return HeadCounts(
            self._multiplied // self._vocabulary, self._pulled // self._vocabulary, self._largest
        )

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation, and count it if it is a product with the head's weight."""
        output = function(*args, **(kwargs or {}))
        if function.overloadpacket in _PRODUCTS:
            left, right = [arg for arg in args if isinstance(arg, Tensor)][-2:]
            if right.untyped_storage().data_ptr() == self._memory:
                self._count(left, right, output)
        return output

    def _count(self, left: Tensor, right: Tensor, output: Tensor) -> None:
        if right.shape[-2] == self._width:
            self._multiplied += output.numel()
            self._largest = max(self._largest, output.numel() * output.itemsize)
        else:
            self._pulled += left.numel()


_PRODUCTS = {
    torch.ops.aten.mm,
    torch.ops.aten.bmm,
    torch.ops.aten.addmm,
    torch.ops.aten.addmm_,
}


def _resident(field: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
