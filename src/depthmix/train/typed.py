"""From text to typed values, by the types that options have."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from depthmix.errors import ConfigError, shown
from depthmix.train.given import Given, mapping
from depthmix.train.options import Option
from depthmix.train.values import checked


def typed(known: Mapping[str, Option], given: Mapping[str, Given]) -> dict[str, Any]:
    """Return the given values of known options, each in its type.

    Raises:
        ConfigError: a value does not fit; names its place.
    """
    values = {}
    for name, value in given.items():
        if name in known:
            try:
                values[name] = checked(name, convert(_all_given(value, known[name]), known[name]))
            except ValueError as error:
                raise ConfigError(f"{value.place}: {error}") from None
    return values


def _all_given(value: Given, known: Option) -> Any:
    """Return what was given, for a list with what the same flag gave before."""
    if value.earlier and any(_family(kind) is list for kind in _kinds(known.hint)):
        return [*value.earlier, *(value.text if isinstance(value.text, list) else [value.text])]
    return value.text


def negated(known: Mapping[str, Option], given: Mapping[str, Given]) -> dict[str, Given]:
    """Turn `--no_key` into `key: false` where `key` is a yes-or-no option."""
    result = {}
    for name, value in given.items():
        positive = known.get(name.removeprefix("no_"))
        if name not in known and positive and bool in _kinds(positive.hint) and value.text == []:
            result[positive.name] = Given("false", value.place)
        else:
            result[name] = value
    return result


def convert(text: Any, known: Option) -> Any:
    """Return the value that `text` means for an option.

    Raises:
        ValueError: it fits none of the option's types; the message says what is expected.
    """
    if text == [] and known.bare is not None:
        return known.bare
    kinds = _kinds(known.hint)
    for kind in kinds:
        try:
            value = _as(kind, text)
        except (ValueError, KeyError):
            continue
        if not known.choices or value is None or value in known.choices:
            return value
    if text == []:
        raise ValueError("needs a value")
    expected = type_in_words(known)
    if len(expected) > _LONGEST_LIST:
        expected = f"{expected[:_LONGEST_LIST].rpartition(',')[0]} ... (see --help-all)"
    raise ValueError(f"expected {expected}, not {_shown(text)}")


def type_in_words(known: Option) -> str:
    """Return what an option takes: "an integer or null", "one of nll, dft" ..."""
    if known.choices:
        return _one_of(known.choices)
    return " or ".join(map(_in_words, reversed(_kinds(known.hint))))


_LONGEST_LIST = 150
_PREFERENCE = (types.NoneType, bool, int, float, Literal, Enum, dict, str, list)
_BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


def _kinds(hint: Any) -> list[Any]:
    """Return the members of a union, the narrowest first; an enum leaves no room for free text."""
    kinds = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    if any(_family(kind) is Enum for kind in kinds):
        kinds = [kind for kind in kinds if kind is not str]
    return sorted(kinds, key=lambda kind: _PREFERENCE.index(_family(kind)))


def _family(kind: Any) -> Any:
    origin = get_origin(kind) or kind
    return Enum if isinstance(origin, type) and issubclass(origin, Enum) else origin


def _as(kind: Any, text: Any) -> Any:
    """Return `text` as one kind of value, or raise ValueError or KeyError."""
    family = _family(kind)
    if family is types.NoneType:
        return {None: None, "null": None}[_hashable(text)]
    if family is bool:
        return text == [] or _BOOLEANS[_scalar(text).lower()]
    if family is dict:
        return _as_mapping(text)
    if family is list:
        (item_type,) = get_args(kind) or (str,)
        items = text if isinstance(text, list) and text else [text]
        return [item_type(_scalar(item)) for item in items]
    if family is Enum:
        return kind(_scalar(text)).value
    if family is Literal:
        return {str(choice): choice for choice in get_args(kind)}[_scalar(text)]
    return kind(_scalar(text))


def _scalar(text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError("not one value")
    return text


def _hashable(text: Any) -> Any:
    return text if text is None else _scalar(text)


def _as_mapping(text: Any) -> dict[str, Any]:
    try:
        value = mapping(text) if isinstance(text, str) and text.startswith("{") else text
    except yaml.YAMLError as error:
        raise ValueError("not a mapping") from error
    if not isinstance(value, dict):
        raise ValueError("not a mapping")
    return value


def _in_words(kind: Any) -> str:
    family = _family(kind)
    if family is Enum:
        return _one_of(member.value for member in kind)
    if family is Literal:
        return _one_of(get_args(kind))
    return {
        types.NoneType: "null",
        bool: "true or false",
        int: "an integer",
        float: "a number",
        dict: "a mapping",
        list: f"a list of {_ITEMS.get(get_args(kind), 'texts')}",
        str: "a text",
    }[family]


_ITEMS: dict[tuple[Any, ...], str] = {(float,): "numbers", (int,): "integers"}


def _one_of(choices: Iterable[Any]) -> str:
    return f"one of {', '.join(map(str, choices))}"


def _shown(text: Any) -> str:
    if isinstance(text, list):
        return f"{len(text)} values ({', '.join(map(shown, text))})"
    return "null" if text is None else shown(text)
