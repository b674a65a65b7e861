"""Run the cells of a comparison: on this machine, or over a cluster with Ray.

Either way a run is a process of its own whose outcome is in its folder; on a cluster, the folder
must be on a file system that all nodes share.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LOG = "log.txt"


def run_here(folders: Sequence[Path], workers: int) -> Iterator[tuple[Path, int]]:
    """Yield each folder with its run's exit status, `workers` runs at a time."""
    # More threads than cores make a run several times slower.
    threads = max(1, (os.cpu_count() or 1) // workers)
    with ThreadPoolExecutor(workers) as pool:
        statuses = pool.map(lambda folder: run_one(folder, threads), folders)
        yield from zip(folders, statuses, strict=True)


def run_on_ray(folders: Sequence[Path], address: str, gpus: float) -> Iterator[tuple[Path, int]]:
    """Yield each folder with its run's exit status, as Ray finds room for them.

    Args:
        folders: of the runs.
        address: of a Ray cluster, or `local` to start one on this machine.
        gpus: that one run takes.
    """
    import ray

    ray.init(address=None if address == "local" else address, log_to_driver=False)
    try:
        run = ray.remote(num_cpus=1, num_gpus=gpus)(run_one)
        waiting = {run.remote(folder.resolve(), 1): folder for folder in folders}
        while waiting:
            (done, *_), _ = ray.wait(list(waiting))
            yield waiting.pop(done), ray.get(done)
    finally:
        ray.shutdown()


def run_one(folder: Path, threads: int) -> int:
    """Run one cell in a new process and return its exit status; its output goes to its folder."""
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    with (folder / LOG).open("w") as log:
        command = [sys.executable, "-m", "depthmix.compare.run", str(folder)]
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
    return done.returncode
