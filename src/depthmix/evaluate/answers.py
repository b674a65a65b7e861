"""Reading the answer in a reply, as LLM-Adapters and the work after it do."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_TOLERANCE = 1e-3  # LLM-Adapters'


def number_is_right(reply: str, answer: str) -> bool:
    """Compare the last number of a reply with the answer; commas in numbers are left out."""
    given, wanted = last_number(reply), last_number(answer)
    if given is None or wanted is None:
        return False
    return math.isclose(given, wanted, rel_tol=0, abs_tol=_TOLERANCE)


def last_number(text: str) -> float | None:
    """Return the last number in a text, or None."""
    numbers = _NUMBER.findall(re.sub(r"(?<=\d),(?=\d)", "", text))
    return float(numbers[-1]) if numbers else None


def label_is_right(reply: str, answer: str, labels: Sequence[str]) -> bool:
    """Compare the first of the labels that a reply names with the answer."""
    found = re.search("|".join(rf"\b{label}\b" for label in labels), reply.lower())
    return found is not None and found.group() == answer.lower()


def letter_is_right(reply: str, answer: str, labels: Sequence[str]) -> bool:
    """Compare the letter behind "answer is", or else the last letter that stands alone.

    Never just the first capital letter, which may begin a sentence.
    """
    letters = "".join(labels)
    named = re.findall(rf"answer is:?\s*\(?([{letters}])\b", reply)
    alone = re.findall(rf"(?<![\w'])\(?([{letters}])\)?(?![\w'])", reply)
    found = named or alone
    return bool(found) and found[-1] == answer
