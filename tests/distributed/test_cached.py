"""Two real processes that share a cache give the parameters of two that have none."""

from pathlib import Path

import torch
from launching import launch
from parameters import assert_same
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("cached.py")


def test_processes_read_what_the_others_wrote(tmp_path):
    launch(WORKER, 2, tmp_path / "off", tmp_path / "cache", "--off")
    launch(WORKER, 2, tmp_path / "on", tmp_path / "cache")
    plain, cached = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("off", "on"))
    assert_same(cached, plain)
    runs = [torch.load(tmp_path / "on" / f"{rank}.pt") for rank in range(2)]
    # Eight rows in six epochs: of the 24 forwards of a process, 4 meet rows that nobody knows.
    assert all(hits + misses == 24 and hits >= 16 for hits, misses in runs)
