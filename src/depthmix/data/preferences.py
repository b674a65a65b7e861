"""Pairs of answers as texts, one chosen and one rejected; the prompt apart, or in common."""

from __future__ import annotations

from depthmix.data.fields import Row, common_length, text
from depthmix.errors import DataError


def text_preference(row: Row, prompt: str) -> Row:
    """Return TRL's columns prompt, chosen and rejected of a row of texts.

    Args:
        row: the row.
        prompt: the column of the prompt; where there is none, the prompt is what the two answers
            begin with in common, up to the last word that is whole.

    Raises:
        DataError: a field is missing or empty, or the two answers are one.
    """
    chosen, rejected = text(row, "chosen"), text(row, "rejected")
    if chosen == rejected:
        raise DataError("fields chosen and rejected are the same")
    if row.get(prompt) is not None:
        return {"prompt": text(row, prompt), "chosen": chosen, "rejected": rejected}
    cut = _start_of_answer(chosen, rejected)
    if not chosen[:cut].strip():
        raise DataError(
            f"there is no field {prompt}, and chosen and rejected have no beginning in common"
        )
    if not (chosen[cut:].strip() and rejected[cut:].strip()):
        raise DataError("one of chosen and rejected is the beginning of the other")
    return {"prompt": chosen[:cut], "chosen": chosen[cut:], "rejected": rejected[cut:]}


def _start_of_answer(chosen: str, rejected: str) -> int:
    """Return where two texts part: in front of a word, and of the blank before it."""
    cut = common_length(chosen, rejected)
    while cut and not chosen[cut - 1].isspace():
        cut -= 1
    return cut - 1 if chosen[:cut].endswith(" ") else cut
