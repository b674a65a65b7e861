"""reasoning-gym's generators as data: offline, seeded, each with a verifier of its own.

A source is written like an address::

    reasoning_gym:chain_sum?size=500&seed=1&min_terms=2&max_terms=2

`size` and `seed` are the data set's; the others are options of the generator. Its question i is
drawn from seed + i: data sets whose seeds lie closer than their sizes share questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

from depthmix.errors import DataError

_PREFIX = "reasoning_gym:"


def is_gym(source: str) -> bool:
    """Whether a source names a generator."""
    return source.startswith(_PREFIX)


def gym_rows(source: str) -> Iterator[dict[str, Any]]:
    """Yield rows of question and answer, no question twice; `entry` is what the verifier takes.

    Raises:
        DataError: the package is missing, or the generator or one of its options is unknown.
    """
    generator, options = _parsed(source)
    try:
        import reasoning_gym
    except ImportError:
        raise DataError(
            f"{source}: needs reasoning-gym: pip install 'depthmix[reasoning]'"
        ) from None
    try:
        entries = reasoning_gym.create_dataset(generator, **options)
    except (ValueError, TypeError, AssertionError) as error:
        raise DataError(f"{source}: {error}") from error
    seen: set[str] = set()
    for entry in entries:
        if entry["question"] not in seen:
            seen.add(entry["question"])
            yield {"question": entry["question"], "answer": str(entry["answer"]), "entry": entry}


def verify(source: str, reply: str, entry: dict[str, Any]) -> float:
    """Return the mark, 0 to 1, that the generator's own verifier gives a reply."""
    import reasoning_gym

    score = reasoning_gym.get_score_answer_fn(_parsed(source)[0])
    return float(score(reply, entry))


def first_line(reply: str) -> str:
    """Return what of a reply is verified: its first line."""
    return reply.strip().split("\n")[0].strip()


def _parsed(source: str) -> tuple[str, dict[str, int | float | str]]:
    generator, _, query = source.removeprefix(_PREFIX).partition("?")
    return generator, {name: _number(value) for name, value in parse_qsl(query)}


def _number(text: str) -> int | float | str:
    for cls in (int, float):
        try:
            return cls(text)
        except ValueError:
            continue
    return text
