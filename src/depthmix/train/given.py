"""What the user wrote: YAML and flags as texts, each with its place.

A value stays the text that the user wrote until its type is known: YAML would read `no` as false
and `2e-4` as text, and an error is to name the file and the line.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from depthmix.errors import ConfigError


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


# YAML


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
    merged: dict[str, _Entry] = {}
    for key, value in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if key.tag == "tag:yaml.org,2002:merge":
            merged |= _merged(path, line, value, within)
            continue
        if name in found:
            raise ConfigError(f"{path}:{line}: {within}{name} is given twice")
        found[name] = _Entry(f"{within}{name}", line, value)
    return merged | found


def _merged(path: str, line: int, node: yaml.Node, within: str) -> dict[str, _Entry]:
    """Return what `<<: *anchor` brings; of several mappings the first counts, as YAML has it."""
    found: dict[str, _Entry] = {}
    try:
        for part in reversed(node.value if isinstance(node, yaml.SequenceNode) else [node]):
            found |= _entries(path, part, within)
    except RecursionError as error:
        raise ConfigError(f"{path}:{line}: what is merged here holds itself") from error
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
    return mapping(yaml.serialize(node))


def mapping(text: str) -> Any:
    """Return the values that a mapping in YAML means.

    Raises:
        YAMLError: it is not YAML.
    """
    return yaml.load(text, Loader=_Loader)


# Flags


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
