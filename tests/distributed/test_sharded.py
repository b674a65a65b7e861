"""A model that FSDP2 shards over two real processes learns what a whole one learns."""

from pathlib import Path

import pytest
import torch
from launching import launch
from parameters import assert_same

WORKER = Path(__file__).with_name("sharded.py")


def losses_and_weights(out, processes):
    launch(WORKER, processes, out)
    return torch.load(out)


def test_two_shards_are_one(tmp_path):
    one = losses_and_weights(tmp_path / "one.pt", 1)
    two = losses_and_weights(tmp_path / "two.pt", 2)
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert any("router" in name for name in one["trained"])
    assert_same(two["trained"], one["trained"], atol=1e-5)
    torch.testing.assert_close(two["logits"], one["logits"], rtol=1e-4, atol=1e-4)
