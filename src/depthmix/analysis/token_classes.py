"""What kind a token is: digit, operator, word, punctuation, white space, end of sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIGIT, OPERATOR, WORD_START, WORD_INSIDE = "digit", "operator", "word start", "word inside"
PUNCTUATION, WHITE_SPACE = "punctuation", "white space"
END, SPECIAL = "end of sequence", "special token"
CLASSES = (DIGIT, OPERATOR, WORD_START, WORD_INSIDE, PUNCTUATION, WHITE_SPACE, END, SPECIAL)

_OPERATORS = set("+-*/=<>^%\N{MULTIPLICATION SIGN}\N{DIVISION SIGN}\N{MINUS SIGN}\N{MIDDLE DOT}")
_ANCHOR = "a"


class Pieces:
    """The text of every token, blanks in front of words included.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer(_ANCHOR, add_special_tokens=False)["input_ids"]
        self._special = set(tokenizer.all_special_ids) | {
            token for token, added in tokenizer.added_tokens_decoder.items() if added.special
        }
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        """Return the text that a token adds: decoded behind another one, which keeps its blank."""
        if token not in self._known:
            before = self._decode(self._anchor)
            text = self._decode([*self._anchor, token])
            whole = text.startswith(before)
            self._known[token] = text[len(before) :] if whole else self._decode([token])
        return self._known[token]

    def kinds(self, ids: Sequence[int]) -> list[str]:
        """Return the class of every token of a row, one of `CLASSES`."""
        texts = [self[token] for token in ids]
        return [self._kind(ids[t], texts[t], texts[t - 1] if t else "") for t in range(len(ids))]

    def _kind(self, token: int, text: str, before: str) -> str:
        if token == self._tokenizer.eos_token_id:
            return END
        return SPECIAL if token in self._special else kind_of(text, before)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def kind_of(text: str, before: str = "") -> str:
    """Return the class of a token by its text.

    Args:
        text: of the token.
        before: of the token in front of it; a word goes on where neither has a blank between.
    """
    bare = text.strip()
    if not bare:
        return WHITE_SPACE
    if any(map(str.isalpha, bare)):
        goes_on = text[0].isalnum() and before[-1:].isalpha()
        return WORD_INSIDE if goes_on else WORD_START
    if any(map(str.isdigit, bare)):
        return DIGIT
    return OPERATOR if set(bare) <= _OPERATORS else PUNCTUATION
