"""PEFT configurations for MoDE, under the name that users know; see `carry/adapters.py`."""

from depthmix.carry.adapters import mode_only_config

__all__ = ["mode_only_config"]
