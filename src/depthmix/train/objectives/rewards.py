"""Rewards that can be verified: what `--reward` says, as functions that TRL's GRPOTrainer calls."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depthmix.data.fields import Row
from depthmix.data.gym import first_line, is_gym, verify
from depthmix.errors import ConfigError, DataError, TrainingError, nearest
from depthmix.evaluate.answers import last_number, number_is_right
from depthmix.train.run_options import RunOptions

GYM = "reasoning_gym"
_KINDS = ("number", "exact", "regex", GYM)
_COLUMN = re.compile(r"\{([A-Za-z_]\w*)\}")  # a quantifier such as {3} is none
_FUNCTION = re.compile(r"([A-Za-z_]\w*(?:\.\w+)*):([A-Za-z_]\w*)")
_FROM_TRL = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
_CARRIED = "row:"  # TRL leaves out columns that have names of its own, such as completion
Marks = list[float | None]


@dataclass(frozen=True)
class Reward:
    """A reward of answers.

    Attributes:
        name: what it is called in the logs: what the user wrote.
        columns: the columns of a row that it reads.
        score: TRL's signature: prompts, completions and columns, a value an answer -> marks; None
            where it does not apply.
        wanted: the columns of a row -> what would be rewarded, in words.
        require: raises a `DataError` where no answer to a row could be rewarded.
    """

    name: str
    columns: tuple[str, ...]
    score: Callable[..., Marks]
    wanted: Callable[[Row], str]
    require: Callable[[Row], None] = lambda values: None


def rewards_of(run: RunOptions) -> list[Reward]:
    """Return the rewards of a run: those that are named, or the verifier of generated data.

    Raises:
        ConfigError: there is none, or it cannot be had; says why.
    """
    named = run.reward
    if not named:
        if not all(map(is_gym, run.dataset or [])):
            raise ConfigError(
                "reward is missing: say what objective grpo is to reward, such as --reward "
                "number:answer; only data of reasoning_gym brings its own"
            )
        named = [GYM]
    rewards = [reward(text) for text in named]
    for found in rewards:
        if "prompt" in found.columns:
            raise ConfigError(
                f"reward {found.name}: prompt is no column to reward by; a function has it in its "
                "parameter prompts"
            )
    return rewards


def reward(text: str) -> Reward:
    """Return the reward that a text names; see the help of `--reward`.

    Raises:
        ConfigError: it names none.
    """
    kind, _, rest = text.partition(":")
    if kind == GYM:
        return _gym(text, rest)
    if kind in _KINDS:
        if not rest:
            expected = "PATTERN" if kind == "regex" else "COLUMN"
            raise ConfigError(f"reward {text}: expected {kind}:{expected}")
        return {"number": _number, "exact": _exact, "regex": _regex}[kind](text, rest)
    found = _FUNCTION.fullmatch(text)
    if found:
        return _function(text, *found.groups())
    raise ConfigError(
        f"reward {text}: expected number:COLUMN, exact:COLUMN, regex:PATTERN, {GYM} or "
        f"MODULE:FUNCTION{nearest(kind, _KINDS)}"
    )


def carried(column: str) -> str:
    """Return the name under which a column goes through TRL's trainer."""
    return _CARRIED + column


def named_as_written(given: dict[str, Any]) -> dict[str, Any]:
    """Return what TRL's trainer gives a reward, columns under the names that the rows have."""
    return {name.removeprefix(_CARRIED): values for name, values in given.items()}


# The kinds


def _number(name: str, column: str) -> Reward:
    def require(values: Row) -> None:
        if last_number(_text(values[column])) is None:
            raise DataError(f"field {column} holds no number to compare an answer with")

    return Reward(
        name,
        (column,),
        _each((column,), lambda reply, values: number_is_right(reply, _text(values[column]))),
        lambda values: f"a last number that is {last_number(_text(values[column])):g}",
        require,
    )


def _exact(name: str, column: str) -> Reward:
    return Reward(
        name,
        (column,),
        _each((column,), lambda reply, values: reply.strip() == _text(values[column]).strip()),
        lambda values: f"exactly {_text(values[column]).strip()!r}",
    )


def _regex(name: str, pattern: str) -> Reward:
    columns = tuple(dict.fromkeys(_COLUMN.findall(pattern)))

    def filled(values: Row) -> str:
        return _COLUMN.sub(lambda found: re.escape(_text(values[found[1]]).strip()), pattern)

    try:
        re.compile(filled(dict.fromkeys(columns, "")))
    except re.error as error:
        raise ConfigError(f"reward {name}: not a regular expression: {error}") from None
    return Reward(
        name,
        columns,
        _each(columns, lambda reply, values: re.search(filled(values), reply) is not None),
        lambda values: f"a text in which {filled(values)} is found",
    )


def _gym(name: str, generator: str) -> Reward:
    """Score by the verifier of a generator: the named one, or the one that made the row."""
    if generator:
        _require_generator(name, generator.partition("?")[0])

    def mark(reply: str, values: Row) -> float:
        source = generator or values["entry"]["metadata"]["source_dataset"]
        return verify(f"{GYM}:{source}", first_line(reply), values["entry"])

    return Reward(
        name,
        ("entry",),
        _each(("entry",), mark),
        lambda values: (
            f"what the verifier says of the first line; {values['entry']['answer']!r}"
            f" gets {mark(str(values['entry']['answer']), values):g}"
        ),
    )


def _require_generator(name: str, generator: str) -> None:
    try:
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise ConfigError(
            f"reward {name}: needs reasoning-gym: pip install 'depthmix[reasoning]'"
        ) from None
    if generator not in DATASETS:
        raise ConfigError(f"reward {name}: no such generator{nearest(generator, DATASETS)}")


def _function(name: str, module: str, function: str) -> Reward:
    """Import a function with TRL's signature; its parameters name the columns that it reads."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except Exception as error:  # whatever a module of the user's may raise
        raise ConfigError(
            f"reward {name}: {module} cannot be imported from {here}: {type(error).__name__}: "
            f"{error}{nearest(module, _KINDS)}"
        ) from error
    finally:
        sys.path.remove(here)
    if not callable(found):
        raise ConfigError(f"reward {name}: {module} has no function {function}")
    parameters = inspect.signature(found).parameters.values()
    columns = tuple(
        p.name
        for p in parameters
        if p.kind is not p.VAR_KEYWORD and p.name not in _FROM_TRL and p.default is p.empty
    )
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
    accepted = {p.name for p in parameters}

    def score(**given: Any) -> Marks:
        values = {n: v for n, v in given.items() if takes_all or n in accepted}
        values |= {n: [json.loads(text) for text in given[n]] for n in columns}
        try:
            marks = found(**values)
        except Exception as error:
            raise TrainingError(f"reward {name}: {type(error).__name__}: {error}") from error
        return _checked(name, marks, len(given["completions"]))

    return Reward(name, columns, score, lambda values: f"what {name} says")


def _checked(name: str, marks: Any, expected: int) -> Marks:
    numbers = isinstance(marks, Sequence) and all(isinstance(m, int | float | None) for m in marks)
    if not numbers or len(marks) != expected:
        raise TrainingError(
            f"reward {name}: expected a list of {expected} numbers, one an answer, not "
            f"{str(marks)[:60]}"
        )
    return list(marks)


# What they share


def _each(columns: Sequence[str], mark: Callable[[str, Row], float]) -> Callable[..., Marks]:
    """Return TRL's function of all answers, made of one answer's mark; columns hold JSON."""

    def score(completions: list[Any], **given: Any) -> Marks:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        rows = [{name: json.loads(given[name][n]) for name in columns} for n in range(len(texts))]
        return [float(mark(text, row)) for text, row in zip(texts, rows, strict=True)]

    return score


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
