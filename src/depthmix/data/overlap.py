"""Test questions that also stand in the training data: found by their normalised text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from depthmix.data.questions import Question


@dataclass(frozen=True)
class Overlap:
    """Which test questions the training data holds.

    Attributes:
        shared: whether each test question does, in their order.
    """

    shared: tuple[bool, ...]

    def __str__(self) -> str:
        return f"{sum(self.shared)} of {len(self.shared)} test questions stand in the training data"


def find_overlap(train: Iterable[Question], test: Sequence[Question]) -> Overlap:
    """Compare questions by their words and numbers: no case, no punctuation, no spacing."""
    known = {normalised(question) for question in train}
    return Overlap(tuple(normalised(question) in known for question in test))


def normalised(question: Question) -> str:
    """Return the words and numbers of a question, in lower case, numbers without idle zeros."""
    text = unicodedata.normalize("NFKC", f"{question.instruction} {question.context}").lower()
    words = re.findall(r"\d+(?:\.\d+)?|[^\W\d_]+", text)
    return " ".join(re.sub(r"\.0+$", "", word) for word in words)
