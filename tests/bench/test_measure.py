"""Counting the products with the head's weight; memory in a process of its own."""

import torch
import torch.nn.functional as F
from torch import nn

from depthmix.bench.batch import IGNORED, make_batch, real_lengths
from depthmix.bench.loss import NAIVE, OURS, Shape, losses
from depthmix.bench.measure import CountHead, in_fresh_process, median_seconds, peak_bytes

V, D, MIB = 50, 8, 2**20


def test_products_with_the_head_are_counted():
    head, states = nn.Linear(D, V, bias=False), torch.randn(7, D, requires_grad=True)
    with CountHead(head.weight) as counter:
        other = F.linear(states, torch.randn(V, D))
        (head(states).sum() + other.sum()).backward()
    assert counter.counts.projected == 7
    assert counter.counts.pulled_back == 7
    assert counter.counts.largest_logits_bytes == 7 * V * 4


def test_tiles_of_the_vocabulary_count_as_parts():
    weight, states = torch.randn(V, D), torch.randn(6, D)
    buffer = torch.empty(6, 25)
    with CountHead(weight) as counter:
        for start in (0, 25):
            torch.mm(states, weight[start : start + 25].T, out=buffer)
            buffer @ weight[start : start + 25]
    assert counter.counts.projected == counter.counts.pulled_back == 6
    assert counter.counts.largest_logits_bytes == 6 * 25 * 4


def test_losses_compared_are_the_same_loss():
    steps = losses(Shape(tokens=5, vocabulary=V, width=D, k=3))
    torch.testing.assert_close(steps[OURS](), steps[NAIVE]())


def test_peak_is_what_a_call_holds_at_most():
    peak = in_fresh_process(peak_of_a_tensor, 64)
    assert 60 * MIB <= peak <= 80 * MIB


def peak_of_a_tensor(mebibytes):
    return peak_bytes(lambda: torch.ones(mebibytes * MIB // 4).sum())


def test_medians_are_taken_in_turn():
    calls = []
    seconds = median_seconds({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3
    assert set(seconds) == {"a", "b"}


def test_batch_supervises_answers_only():
    batch = make_batch(real_lengths(3, longest=40), V, torch.device("cpu"))
    mask, labels = batch["attention_mask"].bool(), batch["labels"]
    assert batch["input_ids"].shape[1] <= 40
    assert (labels[~mask] == IGNORED).all()
    assert (labels[:, 0] == IGNORED).all()
    supervised = labels != IGNORED
    assert supervised.any(dim=1).all()
    assert torch.equal(labels[supervised], batch["input_ids"][supervised])
