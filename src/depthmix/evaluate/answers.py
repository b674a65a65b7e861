"""Reading the answer in a reply, as LLM-Adapters and the work after it do."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

# A number as people write it: sign, currency, thousands, decimals, exponent; a fraction, alone or
# behind a whole number. A minus behind a digit, a letter or a bracket is a subtraction's.
_NUMBER = re.compile(
    r"""
    (?:(?<![\w.)\]]) (?P<sign>[-+\u2212\u2013]))? [$€£¥]? (?P<after>(?<=[$€£¥])-)?
    (?:
        (?:(?P<whole>\d+)\ )? (?<![\d/.,]) (?P<above>\d+)\ ?[/\u2044]\ ?(?P<below>\d+)
        (?![\d/]|[.,]\d)
      | (?P<number> (?: \d{1,3}(?:,\d{3})+(?!\d) | \d+ ) (?:\.\d+)? | (?<![\w.])\.\d+ )
        (?P<exponent>[eE][-+]?\d+(?!\w))?
    )
    (?P<percent>\s?%)?
    """,
    re.VERBOSE,
)
_MINUS = ("-", "\u2212", "\u2013")
_TOLERANCE = 1e-3  # LLM-Adapters'


def number_is_right(reply: str, answer: str) -> bool:
    """Compare the last number of a reply with the answer.

    A percentage counts as the number before the sign and as the hundredth of it: 50 % answers both
    50 and 0.5.
    """
    wanted = last_number(answer)
    found = _last(reply)
    if found is None or wanted is None:
        return False
    value, is_percentage = found
    given = [value, value / 100] if is_percentage else [value]
    return any(math.isclose(number, wanted, rel_tol=0, abs_tol=_TOLERANCE) for number in given)


def last_number(text: str) -> float | None:
    """Return the last number in a text, or None."""
    found = _last(text)
    return None if found is None else found[0]


def _last(text: str) -> tuple[float, bool] | None:
    """Return the last number and whether it is a percentage."""
    numbers = list(_NUMBER.finditer(text))
    return (_value(numbers[-1]), numbers[-1]["percent"] is not None) if numbers else None


def _value(found: re.Match[str]) -> float:
    sign = -1 if found["sign"] in _MINUS or found["after"] else 1
    if found["number"]:
        return sign * float(found["number"].replace(",", "") + (found["exponent"] or ""))
    above, below = float(found["above"]), float(found["below"])
    # What is divided by zero is no number: the last one is then the zero.
    return sign * (float(found["whole"] or 0) + above / below) if below else 0.0


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
