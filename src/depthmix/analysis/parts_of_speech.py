"""Parts of speech of tokens, by a pipeline of spaCy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from depthmix.errors import ConfigError


def load_tagger(name: str) -> Any:
    """Load a pipeline of spaCy that tags parts of speech.

    Args:
        name: of an installed pipeline (`en_core_web_sm`), or its folder.

    Raises:
        ConfigError: spaCy or the pipeline is not installed.
    """
    try:
        import spacy
    except ImportError as error:
        raise ConfigError("--pos needs spaCy: pip install spacy") from error
    try:
        return spacy.load(name)
    except OSError as error:
        raise ConfigError(
            f"--pos {name}: there is no such pipeline: python -m spacy download en_core_web_sm"
        ) from error


def parts_of_speech(pieces: Sequence[str], tagger: Any) -> list[str]:
    """Return the part of speech of the word that each token belongs to, such as NOUN.

    Args:
        pieces: the texts of a row's tokens, which are the row's text together.
        tagger: a pipeline of spaCy.

    Returns:
        One a token; empty where there is no word or the pipeline does not tell.
    """
    by_character: dict[int, str] = {}
    for word in tagger("".join(pieces)):
        by_character |= dict.fromkeys(range(word.idx, word.idx + len(word.text)), word.pos_)
    found, start = [], 0
    for piece in pieces:
        first = start + len(piece) - len(piece.lstrip())
        found.append(by_character.get(first, "") if piece.strip() else "")
        start += len(piece)
    return found
