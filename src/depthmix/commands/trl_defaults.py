"""Defaults of TRL's options, read from its source: a help text must not wait for its import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Where options are declared; of two declarations the later one counts, as in Python.
_DECLARED_IN = (
    ("transformers", "training_args.py"),
    ("trl", "trainer/base_config.py"),
    ("trl", "trainer/sft_config.py"),
    ("trl", "trainer/model_config.py"),
)


def trl_defaults() -> dict[str, Any]:
    """Return the defaults that are plain values, by name of the option."""
    found: dict[str, Any] = {}
    for package, path in _DECLARED_IN:
        spec = find_spec(package)
        folder = Path(next(iter(spec.submodule_search_locations or ()))) if spec else Path()
        for item in ast.walk(ast.parse((folder / path).read_text("utf-8"))):
            if isinstance(item, ast.ClassDef):
                found |= dict(_defaults(item))
    return found


def _defaults(declared: ast.ClassDef) -> Iterator[tuple[str, Any]]:
    for item in declared.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            value = item.value
            if isinstance(value, ast.Call):  # field(default=...)
                value = next((k.value for k in value.keywords if k.arg == "default"), None)
            if isinstance(value, ast.Constant | ast.UnaryOp):  # a number may have a sign
                yield item.target.id, ast.literal_eval(value)
