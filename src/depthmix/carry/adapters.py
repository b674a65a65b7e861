"""PEFT: carry MoDE beside any tuning method, in PEFT's own `ModulesToSaveWrapper`.

PEFT then trains, saves, loads, switches, disables and merges around it, and unmodified trainers
write its checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.config import PeftConfigMixin
from peft.utils import CONFIG_NAME, _set_trainable
from peft.utils.constants import DUMMY_TARGET_MODULES

from depthmix.config import MoDEConfig
from depthmix.errors import ConfigError
from depthmix.method.mixture import MODULE_NAME

# PEFT warns of a key it does not know by its name.
DESCRIPTION_KEY = "load_with_depthmix.load"
_DESCRIPTION = "depthmix_description"  # attribute of a configuration


def wrap_mixture(model: PeftModel) -> None:
    """Wrap the MoDE that was just attached inside `model`, for every adapter it has."""
    for name, config in model.peft_config.items():
        with_mode(config)
        _set_trainable(
            model.get_base_model(),
            name,
            module_names=[MODULE_NAME],
            inference_mode=config.inference_mode,
            activate_adapter=name in model.active_adapters,
        )


def with_mode(config: PeftConfig) -> PeftConfig:
    """Add MoDE to what a PEFT configuration saves, in place, and return it.

    Raises:
        ConfigError: the tuning method cannot save further modules, or has a loss of its own.
    """
    name = type(config).__name__
    if "modules_to_save" not in {field.name for field in dataclasses.fields(config)}:
        raise ConfigError(f"{name} has no modules_to_save, in which MoDE would be saved")
    if config.peft_type == PeftType.CPT:
        raise ConfigError(f"{name}: the method has a loss of its own, in place of the model's")
    if getattr(config, "layer_replication", None):
        raise ConfigError(f"{name}: layer_replication moves the layers that MoDE mixes")
    untyped: Any = config
    saved = list(untyped.modules_to_save or [])
    if MODULE_NAME not in saved:
        untyped.modules_to_save = [*saved, MODULE_NAME]
    return config


def without_mode(config: PeftConfig) -> PeftConfig:
    """Undo `with_mode` and `describe_in`, in place, and return the configuration."""
    untyped: Any = config
    vars(config).pop(_DESCRIPTION, None)
    kept = [name for name in untyped.modules_to_save or [] if name != MODULE_NAME]
    untyped.modules_to_save = kept or None
    return config


def mode_only_config(task_type: str = "CAUSAL_LM") -> LoraConfig:
    """Return a PEFT configuration for MoDE without a tuning method: router and norms alone.

    Args:
        task_type: PEFT's name for what the model does; `SEQ_CLS` trains its head as well.
    """
    return LoraConfig(
        task_type=task_type,
        target_modules=DUMMY_TARGET_MODULES,
        modules_to_save=[MODULE_NAME],
    )


def description(config: MoDEConfig) -> dict[str, Any]:
    """Return what a saved adapter's configuration says of MoDE."""
    return {"config": config.to_dict()}


def describe_in(config: PeftConfig, text: dict[str, Any]) -> None:
    """Let `config.save_pretrained` write `text` under a key that PEFT does not know.

    A process that loads the adapter without depthmix then gets PEFT's warning about that key,
    which says what to do, instead of wrong logits in silence.
    """
    vars(config)[_DESCRIPTION] = text
    cast("Any", PeftConfigMixin).to_dict = _to_dict_described


_to_dict = PeftConfigMixin.to_dict


def _to_dict_described(self: PeftConfigMixin) -> dict[str, Any]:
    """Return what PEFT writes of a configuration, and the description of MoDE if it has one."""
    text = vars(self).get(_DESCRIPTION)
    return _to_dict(self) | ({} if text is None else {DESCRIPTION_KEY: text})


def read_peft_config(folder: Path) -> PeftConfig:
    """Read an adapter's configuration, without the description that MoDE adds to it."""
    values = json.loads((folder / CONFIG_NAME).read_text("utf-8"))
    for key in (DESCRIPTION_KEY, MODULE_NAME):  # the latter up to version 0.1
        values.pop(key, None)
    return PeftConfig.from_peft_type(**values)  # type: ignore[no-any-return]
