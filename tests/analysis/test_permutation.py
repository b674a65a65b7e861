"""The tests against chance: exact where few permutations exist, and right in their error rate."""

import itertools

import numpy as np
import pytest

from depthmix.analysis.permutation import LEAST_ROWS, between_rows, within_rows


def test_p_of_one_test_is_that_of_all_signs():
    values = np.array([0.3, -0.1, 0.4, 0.2, 0.15, 0.05, -0.02])
    signs = np.array(list(itertools.product([-1, 1], repeat=len(values))))
    exact = (np.abs(signs @ values) >= abs(values.sum()) - 1e-9).mean()
    (found,) = within_rows(values[:, None])
    assert found.difference == pytest.approx(values.mean())
    assert found.rows == 7
    assert found.p == pytest.approx(exact, abs=0.01)


def test_between_rows_is_the_test_of_all_divisions():
    values = np.array([1.0, 1.2, 0.9, 0.2, 0.6, 0.5, 0.95])
    group = np.array([True, True, True, False, False, False, False])
    divisions = [list(d) for d in itertools.combinations(range(7), 3)]
    gaps = [values[d].mean() - np.delete(values, d).mean() for d in divisions]
    found = values[group].mean() - values[~group].mean()
    exact = np.mean([abs(gap) >= abs(found) - 1e-9 for gap in gaps])
    (((result),),) = between_rows(values[:, None], [group])
    assert result.difference == pytest.approx(found)
    assert result.p == pytest.approx(exact, abs=0.015)


def test_noise_is_seldom_found_and_a_difference_is():
    generator = np.random.default_rng(1)
    false_alarms = 0
    for seed in range(100):
        # Twenty tests of tokens that depend on one another, and on each other's tests.
        noise = generator.normal(size=(30, 1)) * 0.7 + generator.normal(size=(30, 20))
        results = within_rows(noise, permutations=199, seed=seed)
        false_alarms += min(result.p for result in results) <= 0.05
    assert false_alarms <= 12  # 5 expected of 100 families, whatever the number of tests
    signal = generator.normal(size=(30, 20))
    signal[:, 3] += 1.5
    results = within_rows(signal)
    assert results[3].p < 0.01
    assert [i for i, result in enumerate(results) if result.p < 0.05] == [3]


def test_few_rows_and_equal_weights_tell_nothing():
    values = np.full((LEAST_ROWS + 3, 3), np.nan)
    values[: LEAST_ROWS - 1, 0] = 1.0
    values[:, 1] = 1e-9
    few, equal, none = within_rows(values, permutations=99)
    assert np.isnan(few.p)
    assert few.rows == LEAST_ROWS - 1
    assert equal.p == 1
    assert np.isnan(none.difference)
