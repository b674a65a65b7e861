"""The fused loss and its gradients against the naive reference."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from depthmix.method import fused_loss as losses
from depthmix.method.fused_loss import ensemble_loss
from depthmix.method.head import LinearHead, LogitTransform

DIVERGENCES = list(reference.DIVERGENCES)
TRANSFORMS = {
    "plain": LogitTransform(),
    "scale": LogitTransform(scale=0.25),
    "cap": LogitTransform(cap=2.0),
    "scale and cap": LogitTransform(scale=3.0, cap=2.0),
}


class Problem:
    """Random states, gate, labels and head of one loss, and the gradients taken of them."""

    def __init__(self, n=7, k=3, d=5, v=11, dtype=torch.float64, bias=True):
        wide = torch.promote_types(dtype, torch.float32)
        self.states = torch.randn(n, k, d, dtype=dtype, requires_grad=True)
        self.gate = torch.randn(n, k, dtype=wide).mul(2).softmax(-1).requires_grad_()
        self.labels = torch.randint(v, (n,))
        self.head = nn.Linear(d, v, bias=bias, dtype=dtype)
        nn.init.normal_(self.head.weight)
        self.inputs = [self.states, self.gate, *self.head.parameters()]

    def fused(
        self,
        transform=TRANSFORMS["plain"],
        weight=1.0,
        divergence="kl",
        late_states=None,
        further=False,
    ):
        return ensemble_loss(
            self.states,
            self.gate,
            self.labels,
            LinearHead(self.head.weight, self.head.bias),
            transform,
            weight,
            divergence,
            late_states,
            further=further,
        )

    def naive(self, transform=TRANSFORMS["plain"], weight=1.0, divergence="kl"):
        raw = self.head(self.states).to(self.gate.dtype)
        return reference.loss(raw, self.gate, self.labels, naive(transform), weight, divergence)

    def alone(self, i):
        """Return the problem of one token."""
        twin = copy.copy(self)
        twin.states, twin.gate = self.states[i : i + 1], self.gate[i : i + 1]
        twin.labels = self.labels[i : i + 1]
        return twin

    def gradients(self, loss, inputs=None):
        return torch.autograd.grad(loss, inputs or self.inputs, retain_graph=True)


def naive(transform):
    """Write a transform down a second time."""
    cap, scale = transform.cap, transform.scale
    return lambda raw: cap * torch.tanh(scale * raw / cap) if cap else scale * raw


def chunks_of(monkeypatch, tokens, k=3, v=11):
    monkeypatch.setattr(losses, "CHUNK_BYTES", tokens * 4 * k * v)


@pytest.mark.parametrize("tokens", [1, 3, 100])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_loss_and_gradients_equal_the_reference(monkeypatch, divergence, transform, tokens):
    chunks_of(monkeypatch, tokens)
    problem = Problem()
    fused = problem.fused(transform, 0.7, divergence).total
    expected = problem.naive(transform, 0.7, divergence)
    assert_close(fused, expected)
    assert_close(problem.gradients(fused), problem.gradients(expected))


@given(
    n=st.integers(0, 9),
    k=st.integers(1, 5),
    d=st.integers(1, 6),
    v=st.integers(1, 12),
    bias=st.booleans(),
    tokens=st.integers(1, 10),
    transform=st.sampled_from(list(TRANSFORMS.values())),
    weight=st.sampled_from([0.0, 0.5, 2.0]),
    divergence=st.sampled_from(DIVERGENCES),
)
def test_every_shape_equals_the_reference(n, k, d, v, bias, tokens, transform, weight, divergence):
    torch.manual_seed(0)
    problem = Problem(n, k, d, v, bias=bias)
    with pytest.MonkeyPatch.context() as monkeypatch:
        chunks_of(monkeypatch, tokens, k, v)
        fused = problem.fused(transform, weight, divergence).total
    expected = problem.naive(transform, weight, divergence)
    assert_close(fused, expected)
    assert_close(problem.gradients(fused), problem.gradients(expected))


@pytest.mark.parametrize("tokens", [1, 3, 100])
@pytest.mark.parametrize("weights", ["random", "signed", "one", "none"])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_every_token_has_a_gradient_of_its_own(monkeypatch, divergence, transform, weights, tokens):
    """As rewards and preferences weigh tokens: the naive loss, token by token, weighed alike."""
    chunks_of(monkeypatch, tokens)
    problem = Problem(n=7)
    upstream = {
        "random": torch.rand(7, dtype=torch.float64),
        "signed": torch.randn(7, dtype=torch.float64),
        "one": torch.eye(7, dtype=torch.float64)[3],
        "none": torch.zeros(7, dtype=torch.float64),
    }[weights]
    ours = problem.fused(transform, 0.7, divergence).per_token
    theirs = torch.stack([problem.alone(i).naive(transform, 0.7, divergence) for i in range(7)])
    assert_close(ours, theirs)
    assert_close(
        problem.gradients((upstream * ours).sum()), problem.gradients((upstream * theirs).sum())
    )


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_gradcheck_of_the_cross_entropy(transform):
    problem = Problem(n=3)

    def total(states, gate, weight, bias):
        head = LinearHead(weight, bias)
        return ensemble_loss(states, gate, problem.labels, head, transform, 0.0).total

    assert torch.autograd.gradcheck(total, problem.inputs)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_gradcheck_of_the_distillation(divergence):
    """With respect to the late states: the last one, and the head, also change the teacher."""
    problem = Problem(n=2)
    problem.head.requires_grad_(False)
    late, last = problem.states[:, :-1].detach().requires_grad_(), problem.states[:, -1:].detach()

    def total(late):
        problem.states = torch.cat([late, last], dim=1)
        return problem.fused(TRANSFORMS["scale and cap"], 1.5, divergence).total

    assert torch.autograd.gradcheck(total, [late])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
def test_low_precision_is_as_close_as_its_rounding(monkeypatch, dtype, tolerance, divergence):
    chunks_of(monkeypatch, 16, v=200)
    problem = Problem(n=50, d=16, v=200, dtype=dtype)
    fused = problem.fused(divergence=divergence)
    exact = Problem(n=50, d=16, v=200)
    for ours, theirs in zip(exact.inputs, problem.inputs, strict=True):
        ours.data = theirs.data.double()
    exact.labels = problem.labels
    expected = exact.naive(divergence=divergence)
    assert fused.total.dtype == torch.float32
    assert_close(fused.total.double(), expected, rtol=tolerance / 10, atol=0)
    for ours, theirs in zip(problem.gradients(fused.total), exact.gradients(expected), strict=True):
        assert (ours - theirs).norm() < tolerance * theirs.norm()


def test_parts_of_the_loss_a_token():
    problem = Problem()
    loss = problem.fused(TRANSFORMS["cap"], 0.7, "js", further=True)
    raw = problem.head(problem.states)
    logits = naive(TRANSFORMS["cap"])((problem.gate.unsqueeze(-1) * raw).sum(1))
    log_p = naive(TRANSFORMS["cap"])(raw).log_softmax(-1)
    nll = nn.functional.cross_entropy(logits, problem.labels, reduction="none")
    assert_close(loss.cross_entropy, nll)
    assert_close(loss.divergence, reference.js(log_p[:, -1:], log_p[:, :-1]).mean(1))
    assert_close(loss.entropy, torch.distributions.Categorical(logits=logits.detach()).entropy())
    assert torch.equal(loss.correct, logits.argmax(-1) == problem.labels)
    assert_close(loss.total, (loss.cross_entropy + 0.7 * loss.divergence).sum())
    assert_close(loss.mean_logits, logits.detach().mean(-1))
    assert_close(loss.log_sum_sq_probs, logits.detach().softmax(-1).square().sum(-1).log())
    parts = (loss.entropy, loss.correct, loss.mean_logits, loss.log_sum_sq_probs)
    assert loss.total.requires_grad
    assert not any(part.requires_grad for part in parts)


def test_correct_holds_where_the_label_wins():
    problem = Problem(n=11)
    raw = (problem.gate.unsqueeze(-1) * problem.head(problem.states)).sum(1)
    problem.labels = raw.argmax(-1)
    problem.labels[::2] = raw[::2].argmin(-1)
    assert problem.fused().correct.tolist() == [False, True] * 5 + [False]


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_no_token_gives_a_connected_zero(weight):
    problem = Problem(n=0)
    loss = problem.fused(weight=weight)
    assert loss.total.item() == 0
    assert loss.cross_entropy.shape == loss.divergence.shape == loss.correct.shape == (0,)
    for gradient, given_input in zip(problem.gradients(loss.total), problem.inputs, strict=True):
        assert torch.equal(gradient, torch.zeros_like(given_input))


def test_without_weight_nothing_is_distilled():
    problem = Problem()
    loss = problem.fused(weight=0.0)
    assert not loss.divergence.any()
    late = problem.states[:, :-1].detach().requires_grad_()
    connected = problem.fused(weight=0.0, late_states=late).total
    assert not problem.gradients(connected, [late])[0].any()


def test_one_layer_is_plain_cross_entropy():
    problem = Problem(k=1)
    with torch.no_grad():
        problem.gate.fill_(1.0)
    loss = problem.fused().total
    logits = problem.head(problem.states[:, 0])
    expected = nn.functional.cross_entropy(logits, problem.labels, reduction="sum")
    assert_close(loss, expected)
    inputs = [problem.states, *problem.head.parameters()]
    assert_close(problem.gradients(loss, inputs), problem.gradients(expected, inputs))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_distillation_reaches_the_late_states_given(divergence):
    problem = Problem()
    late = problem.states[:, :-1].detach().clone().requires_grad_()
    split = problem.fused(divergence=divergence, late_states=late).total
    d_states, d_late = problem.gradients(split, [problem.states, late])
    without = problem.naive(weight=0.0)
    whole = problem.naive(divergence=divergence)
    assert_close(split, whole)
    assert_close(d_states, problem.gradients(without)[0])
    assert_close(d_late, (problem.gradients(whole)[0] - d_states)[:, :-1])
    assert_close(problem.gradients(split)[2:], problem.gradients(whole)[2:])


@pytest.mark.parametrize(("weight", "bias"), [(True, False), (False, True), (False, False)])
def test_frozen_parts_of_the_head_get_no_gradient(weight, bias):
    problem = Problem()
    expected = problem.gradients(problem.naive())
    problem.head.weight.requires_grad_(weight)
    problem.head.bias.requires_grad_(bias)
    problem.fused().total.backward()
    for tensor, gradient in zip(problem.inputs, expected, strict=True):
        assert (tensor.grad is None) != tensor.requires_grad
        if tensor.requires_grad:
            assert_close(tensor.grad, gradient)


def test_gradient_scales_with_the_loss():
    problem = Problem()
    loss = problem.fused().total
    once = problem.gradients(loss)
    scaled = problem.gradients(loss * -3)
    assert_close(scaled, tuple(-3 * gradient for gradient in once))


def test_inputs_are_left_as_they_are():
    problem = Problem()
    before = [tensor.detach().clone() for tensor in problem.inputs]
    problem.fused(TRANSFORMS["cap"]).total.backward()
    assert all(torch.equal(a, b) for a, b in zip(before, problem.inputs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_autocast_around_the_loss_changes_nothing(dtype, divergence):
    problem = Problem(dtype=dtype)
    expected = problem.fused(divergence=divergence).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = problem.fused(divergence=divergence).total
    assert torch.equal(loss, expected)
    ours, theirs = problem.gradients(loss), problem.gradients(expected)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_extreme_logits_stay_finite(transform, divergence):
    problem = Problem(dtype=torch.float32)
    with torch.no_grad():
        problem.head.weight.mul_(1e4)
    loss = problem.fused(transform, divergence=divergence)
    assert loss.total.isfinite()
    assert all(gradient.isfinite().all() for gradient in problem.gradients(loss.total))


def test_certain_prediction_of_the_label_costs_nothing():
    problem = Problem(n=1)
    with torch.no_grad():
        problem.head.weight.zero_()
        problem.head.bias.zero_()[problem.labels] = 100.0
    loss = problem.fused()
    assert_close(loss.total, torch.zeros_like(loss.total))
    assert_close(loss.entropy, torch.zeros_like(loss.entropy))
    assert loss.correct.all()


class Largest(TorchDispatchMode):
    """Note the size of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


@pytest.mark.parametrize("trainable_head", [True, False])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_memory_stays_that_of_one_chunk(monkeypatch, divergence, trainable_head):
    n, k, d, v, tokens = 64, 3, 4, 100, 8
    chunks_of(monkeypatch, tokens, k, v)
    problem = Problem(n, k, d, v, bias=False)
    problem.head.requires_grad_(trainable_head)
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.append(t.numel()) or t, lambda t: t
        ),
        Largest() as largest,
    ):
        loss = problem.fused(TRANSFORMS["cap"], divergence=divergence).total
        loss.backward()
    assert tokens * v < largest.elements <= max(tokens * k * v, n * k * d)
    # The gradients of states, late states and gate. If the head learns, its gradient, and what it
    # takes to sum it up again: states, gate and labels.
    of_the_head = v * d + n * k * d + n * k + n
    assert sum(saved) == n * k * d + n * (k - 1) * d + n * k + of_the_head * trainable_head


def test_loss_of_uniform_logits_is_log_of_the_vocabulary():
    problem = Problem(v=11)
    nn.init.zeros_(problem.head.weight)
    nn.init.zeros_(problem.head.bias)
    loss = problem.fused()
    assert_close(loss.cross_entropy, torch.full_like(loss.cross_entropy, math.log(11)))
    assert_close(loss.divergence, torch.zeros_like(loss.divergence))
