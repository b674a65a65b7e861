"""Loss, accuracy, calibration, agreement and complements, by hand."""

import numpy as np
import pytest

from depthmix.analysis.observations import Observations
from depthmix.analysis.predictors import (
    agreement,
    complements,
    gain_over_last,
    names_of,
    reliability,
    score_predictors,
)


@pytest.fixture
def seen():
    """Four learned tokens of two rows and one of a prompt; two late layers and the model."""
    top = np.array([[1, 2, 2], [1, 1, 1], [3, 4, 3], [5, 5, 5], [0, 0, 9]])
    sure = np.array(
        [[0.9, 0.6, 0.7], [0.55, 0.8, 0.8], [0.4, 0.5, 0.4], [1.0, 0.9, 0.95], [1, 1, 1]]
    )
    loss = np.array(
        [[0.1, 1.1, 1.0], [0.6, 0.2, 0.2], [0.9, 2.0, 0.9], [0.0, 0.1, 0.05], [9, 9, 9]]
    )
    return Observations(
        (6, 7),
        (6, 7),
        np.array([0, 0, 1, 1, 1]),
        np.arange(5),
        np.array([1, 1, 3, 5, 0]),
        np.array([True, True, True, True, False]),
        np.full((5, 2), 0.5),
        loss,
        np.stack([top, top + 10, top + 20], axis=2),
        np.stack([sure, sure / 10, sure / 20], axis=2),
    )


def test_scores(seen):
    scores = {score.name: score for score in score_predictors(seen)}
    assert list(scores) == names_of(seen) == ["layer 6", "layer 7", "model"]
    assert scores["layer 7"].loss == pytest.approx((1.1 + 0.2 + 2.0 + 0.1) / 4)
    assert scores["layer 6"].accuracy == 1.0
    assert scores["layer 7"].accuracy == 0.5
    assert scores["model"].accuracy == 0.75
    gaps = abs(0 - 0.6) + abs(1 - 0.8) + abs(0 - 0.5) + abs(1 - 0.9)
    assert scores["layer 7"].calibration_error == pytest.approx(gaps / 4)
    residual = np.array([1.1 + 0.2 - 2 * 0.85, 2.0 + 0.1 - 2 * 0.85])
    error = np.sqrt((residual**2).sum() * 2) / 4
    assert scores["layer 7"].loss_error == pytest.approx(error)


def test_points_of_the_reliability_diagram(seen):
    points = [point for point in reliability(seen) if point.name == "layer 6"]
    assert [(point.tokens, round(point.confidence, 2)) for point in points] == [
        (1, 0.4),
        (1, 0.55),
        (1, 0.9),
        (1, 1.0),
    ]


def test_agreement(seen):
    shares = agreement(seen)
    assert shares[0, 1] == shares[1, 0] == 0.5
    assert shares[0, 2] == 0.75
    assert np.diag(shares).tolist() == [1, 1, 1]


def test_complements_are_the_surest_first(seen):
    found = complements(seen)
    assert [(c.place, c.layer, c.probability) for c in found] == [(0, 6, 0.9), (2, 6, 0.4)]


def test_gain_is_of_the_model_over_its_last_layer(seen):
    gain, error = gain_over_last(seen)
    assert gain == pytest.approx((0.1 + 0.0 + 1.1 + 0.05) / 4)
    assert error > 0
