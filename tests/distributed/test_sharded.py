"""A model that FSDP2 shards over two real processes learns what a whole one learns."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

WORKER = Path(__file__).with_name("sharded.py")


def run(out, processes):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), str(WORKER), str(out)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


def test_two_shards_are_one(tmp_path):
    one, two = run(tmp_path / "one.pt", 1), run(tmp_path / "two.pt", 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert one["trained"].keys() == two["trained"].keys()
    assert any("router" in name for name in one["trained"])
    for name, tensor in one["trained"].items():
        torch.testing.assert_close(two["trained"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(two["logits"], one["logits"], rtol=1e-4, atol=1e-4)
