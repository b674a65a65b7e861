"""Run the cells of a comparison: on this machine, or over a cluster with Ray.

Either way a run is a process of its own whose outcome is in its folder; on a cluster, the folder
must be on a file system that all nodes share.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue

LOG = "log.txt"


def run_here(folders: Sequence[Path], workers: int) -> Iterator[tuple[Path, int]]:
    """Yield each folder with its run's exit status as it ends, `workers` runs at a time.

    Where there are several GPUs, each worker has one for itself, as far as they go.
    """
    # More threads than cores make a run several times slower.
    threads = max(1, (os.cpu_count() or 1) // workers)
    free: SimpleQueue[str | None] = SimpleQueue()
    for device in devices(workers):
        free.put(device)

    def run(folder: Path) -> int:
        device = free.get()
        try:
            return run_one(folder, threads, device)
        finally:
            free.put(device)

    with ThreadPoolExecutor(workers) as pool:
        try:
            waiting = {pool.submit(run, folder): folder for folder in folders}
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def devices(workers: int) -> list[str | None]:
    """Return what each worker is to see as CUDA_VISIBLE_DEVICES; None leaves it as it is."""
    import torch

    count = torch.cuda.device_count()
    if count < 2:
        return [None] * workers
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(count)]
    return [names[worker % count] for worker in range(workers)]


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


def run_one(folder: Path, threads: int, device: str | None = None) -> int:
    """Run one cell in a new process and return its exit status; its output goes to its folder.

    Args:
        folder: of the run.
        threads: that it may use.
        device: the GPU that it sees; None for all that this process sees.
    """
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = device
    with (folder / LOG).open("w") as log:
        command = [sys.executable, "-m", "depthmix.compare.run", str(folder)]
        done = subprocess.run(command, stdout=log, stderr=log, env=environment, check=False)
    return done.returncode
