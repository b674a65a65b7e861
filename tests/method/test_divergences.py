"""Divergences and their closed-form gradients against the reference and autograd."""

import math

import pytest
import torch
from torch.autograd import grad
from torch.testing import assert_close

import reference
from depthmix.config import Divergence
from depthmix.method.divergences import DIVERGENCES

NAMES = list(DIVERGENCES)


def log_probabilities(n=4, s=2, v=7, dtype=torch.float64, scale=3.0):
    logits = (scale * torch.randn(n, s + 1, v, dtype=dtype)).log_softmax(-1)
    return logits[:, :1], logits[:, 1:]


def test_every_divergence_of_the_configuration_exists():
    assert set(NAMES) == set(Divergence.__args__) == set(reference.DIVERGENCES)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("n", "s", "v"), [(4, 2, 7), (1, 1, 2), (3, 5, 33), (0, 2, 4), (2, 0, 4)], ids=str
)
def test_value_and_gradient_equal_the_reference(name, n, s, v):
    teacher, students = log_probabilities(n, s, v)
    logits = (students + torch.randn(n, s, 1, dtype=students.dtype)).requires_grad_()
    naive = reference.DIVERGENCES[name](teacher, logits.log_softmax(-1))
    value, gradient = DIVERGENCES[name](teacher, students)
    assert_close(value, naive)
    assert_close(gradient, grad(naive.sum(), logits)[0])


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_that_of_finite_differences(name):
    teacher, students = log_probabilities(n=2)
    eps = 1e-6
    _, gradient = DIVERGENCES[name](teacher, students)
    for index in [(0, 0, 0), (1, 1, 3), (1, 0, 6)]:
        step = torch.zeros_like(students)
        step[index] = eps
        up, _ = DIVERGENCES[name](teacher, (students + step).log_softmax(-1))
        down, _ = DIVERGENCES[name](teacher, (students - step).log_softmax(-1))
        assert_close(gradient[index], (up - down).sum() / (2 * eps), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_for_equals_and_positive_otherwise(name, dtype):
    teacher, students = log_probabilities(dtype=dtype)
    value, gradient = DIVERGENCES[name](teacher, teacher.expand_as(students))
    assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-6)
    assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)
    assert (DIVERGENCES[name](teacher, students)[0] > 1e-4).all()


def test_reverse_kl_is_kl_with_the_places_changed():
    teacher, students = log_probabilities(s=1)
    assert_close(
        DIVERGENCES["reverse_kl"](teacher, students)[0], DIVERGENCES["kl"](students, teacher)[0]
    )


def test_js_is_symmetric_and_at_most_log_2():
    teacher, students = log_probabilities(s=1, scale=30.0)
    value = DIVERGENCES["js"](teacher, students)[0]
    assert_close(value, DIVERGENCES["js"](students, teacher)[0])
    assert value.max() > 0.5
    assert (value <= math.log(2) + 1e-12).all()


@pytest.mark.parametrize("name", NAMES)
def test_extreme_predictions_stay_finite(name):
    teacher, students = log_probabilities(dtype=torch.float32, scale=1e4)
    value, gradient = DIVERGENCES[name](teacher, students)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_inputs_are_left_as_they_are(name):
    teacher, students = log_probabilities()
    before = teacher.clone(), students.clone()
    DIVERGENCES[name](teacher, students)
    assert torch.equal(teacher, before[0])
    assert torch.equal(students, before[1])
