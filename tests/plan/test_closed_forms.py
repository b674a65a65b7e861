"""`depthmix plan` against formulas written out by hand, for models of published sizes."""

import pytest
from closed_forms import CASES, errors

WITHIN = {"memory.activations": 0.08}  # the formula leaves small things out; the rest is exact


@pytest.mark.parametrize("model", CASES)
def test_what_is_planned_is_what_is_counted_by_hand(model):
    wrong = {
        quantity: f"{plan / by_hand - 1:+.1%}"
        for quantity, by_hand, plan in errors(model)
        if abs(plan / by_hand - 1) > WITHIN.get(quantity.partition(".")[2], 0.03)
    }
    assert not wrong


def test_published_sizes():
    llama = {quantity: plan for quantity, _, plan in errors("Llama-3-70B")}
    assert llama["parameters"] == pytest.approx(70.6e9, rel=0.005)
    qwen = {quantity: plan for quantity, _, plan in errors("Qwen3-30B-A3B")}
    assert qwen["parameters"] == pytest.approx(30.5e9, rel=0.005)
    assert qwen["decode"] == pytest.approx(6.6e9, rel=0.08)  # 3.3 billion parameters are active
