"""PEFT's `hotswap_adapter` swaps LoRA's matrices alone: refused where MoDE is carried."""

from __future__ import annotations

from typing import Any, cast

from peft import PeftConfig
from peft.utils import hotswap

from depthmix.errors import DepthmixError
from depthmix.method.mixture import MODULE_NAME

_check: Any = hotswap.check_hotswap_configs_compatible


def refuse_hotswap() -> None:
    """Have PEFT refuse to swap adapters with MoDE; without, it fails with a KeyError halfway."""
    cast("Any", hotswap).check_hotswap_configs_compatible = _check_without_mode


def _check_without_mode(active: PeftConfig, other: PeftConfig) -> None:
    """Check two configurations as PEFT does, and that neither carries MoDE.

    Raises:
        DepthmixError: one does.
    """
    if any(MODULE_NAME in (getattr(c, "modules_to_save", None) or ()) for c in (active, other)):
        raise DepthmixError(
            "hotswap_adapter cannot swap MoDE: use model.load_adapter(folder, name) and "
            "model.set_adapter(name)"
        )
    _check(active, other)
