"""Mixture-of-Depths Ensemble (MoDE) tuning for Hugging Face models (arXiv 2410.13077).

    import depthmix

    model = depthmix.attach(model, depthmix.MoDEConfig(k=3), peft_config)   # then train as ever
    model = depthmix.load(base_model, "folder")                            # then generate as ever

Names are imported when first used: the command line answers without loading torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from depthmix.carry.groups import param_groups
    from depthmix.config import MoDEConfig
    from depthmix.errors import DepthmixError
    from depthmix.model.record import routing
    from depthmix.surgery import attach, detach, load

__version__ = "0.1.0"
__all__ = [
    "DepthmixError",
    "MoDEConfig",
    "attach",
    "detach",
    "load",
    "param_groups",
    "routing",
]

_HOMES = {
    "DepthmixError": "depthmix.errors",
    "MoDEConfig": "depthmix.config",
    "attach": "depthmix.surgery",
    "detach": "depthmix.surgery",
    "load": "depthmix.surgery",
    "param_groups": "depthmix.carry.groups",
    "routing": "depthmix.model.record",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'depthmix' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
