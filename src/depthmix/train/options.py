"""From text to typed options: YAML and flags keep what was written, until the type is known.

A value stays the text that the user wrote, with its place: YAML would read `no` as false and `2e-4`
as text, and an error is to name the file and the line.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from depthmix.errors import ConfigError, nearest, shown
from depthmix.train.values import checked

# Short names that other tools use, for "did you mean".
_ALSO_KNOWN_AS = {
    "base_model": "model_name_or_path",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "grad_accum": "gradient_accumulation_steps",
    "lambda": "distill_weight",
    "lora_rank": "lora_r",
    "lr": "learning_rate",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "model": "model_name_or_path",
    "norm_lr": "norm_learning_rate",
    "output": "output_dir",
    "peft": "method",
    "r": "lora_r",
    "rank": "lora_r",
    "router_lr": "router_learning_rate",
    "target_modules": "lora_target_modules",
    "use_peft": "method",
}

# Fields of TRL that have no meaning here: `method` decides, or the command line cannot say it.
_LEFT_OUT = {"use_peft", "lora_task_type", "parallelism_config"}


@dataclass(frozen=True)
class Given:
    """A value as the user wrote it, and the place to name when it is wrong.

    Args:
        text: text, a list of texts, a mapping, or None for YAML's null. An empty list is a flag
            without a value.
        place: `run.yaml:7: k` or `--k`.
        earlier: what the same flag gave before, which a list keeps.
    """

    text: Any
    place: str
    earlier: tuple[str, ...] = ()


@dataclass(frozen=True)
class Option:
    """One key that may be given: a field of a dataclass, with its type resolved.

    Args:
        name: the key.
        hint: the type of its values.
        default: the value where it is not given.
        help: what it means.
        choices: the values it may have, where they are few.
        bare: the value of a flag without a value, or None where it needs one.
    """

    name: str
    hint: Any
    default: Any
    help: str
    choices: tuple[Any, ...]
    bare: Any = None

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is dataclasses.MISSING


def options(cls: type[Any]) -> dict[str, Option]:
    """Return the fields of a dataclass as options."""
    hints = get_type_hints(cls)
    return {
        f.name: Option(
            f.name,
            hints[f.name],
            f.default if f.default_factory is dataclasses.MISSING else f.default_factory(),
            f.metadata.get("help", ""),
            tuple(f.metadata.get("choices", ())),
            f.metadata.get("bare"),
        )
        for f in dataclasses.fields(cls)
        if f.init and f.name not in _LEFT_OUT
    }


# Reading text


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 2e-4 is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: str) -> dict[str, Given]:
    """Read a flat mapping, keeping the text and the line number of every value."""
    return {name: _given(path, entry) for name, entry in _entries(path, _compose(path)).items()}


def read_nested(path: str, depths: Mapping[str, int]) -> dict[str, Any]:
    """Read a mapping some of whose values are mappings themselves.

    Args:
        path: of the file.
        depths: how many mappings deep the values under a key are, where that is not 0.

    Returns:
        A `Given`, or a mapping of them, or a mapping of mappings, by key.
    """
    entries = _entries(path, _compose(path))
    return {name: _nested(path, entry, depths.get(name, 0)) for name, entry in entries.items()}


@dataclass(frozen=True)
class _Entry:
    """A key of a YAML mapping and its value; `name` tells of what it is a part."""

    name: str
    line: int
    node: yaml.Node


def _entries(path: str, node: yaml.Node | None, within: str = "") -> dict[str, _Entry]:
    if node is None or _is_null(node):
        return {}
    if not isinstance(node, yaml.MappingNode):
        place = f"{path}:{node.start_mark.line + 1}: {within[:-1]}" if within else path
        raise ConfigError(f"{place}: must hold `key: value` lines")
    found: dict[str, _Entry] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in found:
            raise ConfigError(f"{path}:{line}: {within}{name} is given twice")
        found[name] = _Entry(f"{within}{name}", line, value)
    return found


def _nested(path: str, entry: _Entry, depth: int) -> Any:
    if depth == 0:
        return _given(path, entry)
    inner = _entries(path, entry.node, f"{entry.name}.")
    return {name: _nested(path, part, depth - 1) for name, part in inner.items()}


def _given(path: str, entry: _Entry) -> Given:
    place = f"{path}:{entry.line}: {entry.name}"
    try:
        return Given(_text(entry.node), place)
    except yaml.YAMLError as error:
        raise ConfigError(f"{place}: not plain values: {error}") from error


def _is_null(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null"


def _compose(path: str) -> yaml.Node | None:
    try:
        return yaml.compose(Path(path).expanduser().read_text("utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from error


def _text(node: yaml.Node) -> Any:
    """Return scalars as written, lists of them, and mappings as the values they mean."""
    if isinstance(node, yaml.ScalarNode):
        return None if _is_null(node) else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_text(item) for item in node.value]
    return _mapping(yaml.serialize(node))


def _mapping(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def read_flags(argv: Sequence[str]) -> dict[str, Given]:
    """Read `--key value ...`, `--key=value` and `--key`; `-` and `_` in a key are the same.

    Of a flag that is given twice the last counts, and a list takes all.
    """
    given: dict[str, Given] = {}
    name = None
    for token in argv:
        if token.startswith("--"):
            flag, equals, value = token.partition("=")
            name = flag[2:].replace("-", "_")
            before = given.get(name, Given([], flag))
            earlier = (*before.earlier, *before.text)
            given[name] = Given([value] if equals else [], flag, earlier)
        elif token.endswith((".yaml", ".yml")):
            raise ConfigError(f"{token}: the configuration file must come before the flags")
        elif name is None:
            raise ConfigError(f"{token!r}: expected a flag such as --max_steps 100")
        else:
            given[name].text.append(token)
    return {
        name: dataclasses.replace(v, text=v.text[0] if len(v.text) == 1 else v.text)
        for name, v in given.items()
    }


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


# From text to typed values


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


def require_known(given: Mapping[str, Given], known: Iterable[str]) -> None:
    """Raise a ConfigError for a key that is no option, with the nearest one that is."""
    names = list(known)
    for name, value in given.items():
        if name not in names:
            raise ConfigError(f"{value.place}: no such option{_suggestion(name, names)}")


def _suggestion(name: str, known: list[str]) -> str:
    if name in _ALSO_KNOWN_AS:
        return f"; did you mean {_ALSO_KNOWN_AS[name]}?"
    return nearest(name, known)


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
        value = _mapping(text) if isinstance(text, str) and text.startswith("{") else text
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
