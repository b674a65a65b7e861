"""Two real processes give the parameters of one: DDP, uneven batches, accumulation, resume."""

import sys
from pathlib import Path

import pytest
import torch
from launching import launch, run
from parameters import assert_same
from safetensors.torch import load_file

WORKER = Path(__file__).with_name("worker.py")


def train(out, processes, *options):
    if processes == 1:
        run([sys.executable, WORKER, out, *options])
    else:
        launch(WORKER, processes, out, *options)
    return load_file(out / "final/adapter_model.safetensors")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The run of one process with the whole batch."""
    out = tmp_path_factory.mktemp("one")
    return train(out, 1, "--batch", "4"), torch.load(out / "log.pt")


def test_two_processes_are_one(one, tmp_path):
    parameters, log = one
    assert_same(parameters, train(tmp_path, 2, "--batch", "2"), atol=1e-5)
    two = torch.load(tmp_path / "log.pt")
    for name in ("ce_loss", "distill_loss", "router_entropy", "router_weight/layer_3"):
        assert two[0][name] == pytest.approx(log[0][name], rel=1e-4), name


def test_process_without_a_supervised_token(tmp_path):
    one = train(tmp_path / "one", 1, "--batch", "4", "--uneven")
    assert_same(one, train(tmp_path / "two", 2, "--batch", "2", "--uneven"), atol=1e-5)


def test_resume_on_another_number_of_processes(one, tmp_path):
    train(tmp_path, 2, "--batch", "2", "--stop-after", "2")
    assert_same(one[0], train(tmp_path, 1, "--batch", "4", "--resume"), atol=1e-5)


def test_a_signal_to_one_process_stops_all_after_the_same_step(one, tmp_path):
    train(tmp_path, 2, "--batch", "2", "--signal-in", "2")
    assert torch.load(tmp_path / "log.pt")[-1]["step"] == 2
    (checkpoint,) = tmp_path.glob("checkpoint-*")
    assert checkpoint.name == "checkpoint-2"
    assert len(list(checkpoint.glob("rng_state_*.pth"))) == 2
    assert_same(one[0], train(tmp_path, 1, "--batch", "4", "--resume"), atol=1e-5)
