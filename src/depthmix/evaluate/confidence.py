"""How sure a model is of the answers that it gives: the probability of each.

Of a reply, the product of its tokens' probabilities: that of these very words. Of a choice by
likelihood, its share among the choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from depthmix.calibration.reliability import Reliability
from depthmix.evaluate.tasks import ACCURACY

Row = dict[str, Any]

CONFIDENCE = "confidence"
_MARKS = (ACCURACY, "acc", "exact_match")  # ours, and those of lm-eval's own tasks


def add_confidence(lm: LM, rows: Sequence[Row]) -> None:
    """Add `confidence` to samples of a task whose replies are texts or likelihoods of choices.

    Texts are read once more, prompt and reply, in the batches of `lm`.
    """
    texts = [row for row in rows if isinstance(_reply(row), str) and _reply(row)]
    requests = [
        Instance("loglikelihood", {}, (row["prompt"], _reply(row)), idx)
        for idx, row in enumerate(texts)
    ]
    likelihoods = lm.loglikelihood(requests) if requests else []
    for row, (likelihood, _) in zip(texts, likelihoods, strict=True):
        row[CONFIDENCE] = math.exp(likelihood)
    for row in rows:
        choices = _choices(row)
        if choices:
            most = max(choices)
            row[CONFIDENCE] = 1 / sum(math.exp(value - most) for value in choices)


def reliability_of(rows: Sequence[Row]) -> Reliability | None:
    """Return how far the confidence of samples is from their marks; None where there is none."""
    known = [row for row in rows if CONFIDENCE in row]
    mark = next((name for name in _MARKS if known and name in known[0]), None)
    if mark is None:
        return None
    return Reliability.of([row[CONFIDENCE] for row in known], [row[mark] for row in known])


def _reply(row: Row) -> Any:
    """Return the one reply of a sample, if it has one."""
    replies = row["replies"]
    return replies[0] if len(replies) == 1 else None


def _choices(row: Row) -> list[float]:
    """Return the log-likelihoods of a sample's choices, if it has some."""
    replies = [reply[0] if len(reply) == 1 else None for reply in row["replies"]]
    pairs = [reply for reply in replies if isinstance(reply, (tuple, list)) and len(reply) == 2]
    return [float(value) for value, _ in pairs] if len(pairs) == len(replies) > 1 else []
