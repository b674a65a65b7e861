"""PEFT: carry MoDE beside any tuning method, in PEFT's own `ModulesToSaveWrapper`.

PEFT then trains, saves, loads, switches, disables and merges around it, and unmodified trainers
write its checkpoints.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import re
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.utils import ModulesToSaveWrapper, _set_trainable
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn
from transformers import PreTrainedModel

from depthmix.config import MoDEConfig
from depthmix.discovery import discover
from depthmix.errors import ConfigError, DepthmixError
from depthmix.mixture import DepthMixture

MODULE_NAME = "depthmix"


def host_of(model: nn.Module) -> PreTrainedModel:
    """Return the causal language model inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


class ActiveMixture:
    """Gives the mixture that applies now: that of PEFT's active adapter, or the plain one."""

    def __init__(self, host: PreTrainedModel) -> None:
        self._host = host
        self._peft_model: PeftModel | None = None

    def __call__(self) -> DepthMixture | None:
        """Return the active mixture, or None where the base model alone must answer."""
        module: Any = self._host.get_submodule(MODULE_NAME)
        if not isinstance(module, ModulesToSaveWrapper):
            return module  # type: ignore[no-any-return]
        if _mixes_adapters(module):
            raise DepthmixError("adapter_names: one batch through several adapters has no MoDE")
        active = module.active_adapters
        if module.disable_adapters or not active or self._prompt_learning_disabled():
            return None
        if active[0] not in module.modules_to_save:
            return None
        return module.modules_to_save[active[0]]  # type: ignore[return-value]

    def _prompt_learning_disabled(self) -> bool:
        """Tell whether a prompt-learning PeftModel is in `disable_adapter()`.

        There PEFT replaces methods of the PeftModel and leaves all modules as they are.
        """
        if "peft_config" in vars(self._host):
            return False  # not prompt learning: a tuner sets this on the model it changes
        if self._peft_model is None:
            # Nothing leads from a module to its PeftModel; look for it once. By type, since
            # `isinstance` would wake lazy objects of other libraries. There is none once LN tuning
            # was merged, which leaves the wrapper where it is.
            self._peft_model = next(
                (
                    o
                    for o in gc.get_objects()
                    if issubclass(type(o), PeftModel) and o.get_base_model() is self._host
                ),
                None,
            )
        return self._peft_model is not None and self._peft_model._adapters_disabled


def _mixes_adapters(wrapper: ModulesToSaveWrapper) -> bool:
    """Tell whether PEFT has been given `adapter_names`, which reach its modules as hooks."""
    hooks = wrapper._forward_pre_hooks.values()
    return any(isinstance(h, functools.partial) and "adapter_names" in h.keywords for h in hooks)


def carry(model: PeftModel) -> None:
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
    untyped: Any = config
    saved = list(untyped.modules_to_save or [])
    if MODULE_NAME not in saved:
        untyped.modules_to_save = [*saved, MODULE_NAME]
    return config


def without_mode(config: PeftConfig) -> PeftConfig:
    """Undo `with_mode` and `describe_in`, in place, and return the configuration."""
    untyped: Any = config
    vars(config).pop("to_dict", None)
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


def late_layers(config: PeftConfig, model: nn.Module, k: int) -> PeftConfig:
    """Restrict a PEFT configuration to the k late layers of `model`, in place, and return it.

    No gradient then reaches below these layers: no backward pass and no activations are kept there.

    Raises:
        ConfigError: the tuning method cannot be restricted to some layers.
        DiscoveryError: the layers of the model were not found.
    """
    fields = {field.name for field in dataclasses.fields(config)}
    untyped: Any = config
    anatomy = discover(host_of(model), MoDEConfig(k=k))
    if "exclude_modules" in fields:
        if untyped.exclude_modules:
            raise ConfigError("exclude_modules is set, which is what restricts to the late layers")
        # `layers_to_transform` is not heeded where PEFT lists targets by their full names.
        late = "|".join(map(str, anatomy.layer_indices))
        untyped.exclude_modules = rf"(?!{re.escape(anatomy.layers_path)}\.(?:{late})\.).*"
    elif "layers_to_transform" in fields:
        untyped.layers_to_transform = list(anatomy.layer_indices)
        untyped.layers_pattern = anatomy.layers_path.rpartition(".")[2]
    else:
        raise ConfigError(f"{type(config).__name__} cannot be restricted to the late layers")
    return config


def description(config: MoDEConfig) -> dict[str, Any]:
    """Return what a saved adapter's configuration says of MoDE."""
    return {"load_with": "depthmix.load", "config": config.to_dict()}


def describe_in(config: PeftConfig, text: dict[str, Any]) -> None:
    """Let `config.save_pretrained` write `text` under the key `depthmix`.

    A process that loads the adapter with plain PEFT, without MoDE, then gets PEFT's warning about
    a key it does not know, instead of wrong logits in silence.
    """
    untyped: Any = config
    untyped.to_dict = functools.partial(_with_description, config, text)


def _with_description(config: PeftConfig, text: dict[str, Any]) -> dict[str, Any]:
    return {**type(config).to_dict(config), MODULE_NAME: text}
