"""Which mixture applies now: that of PEFT's active adapter, the plain one, or none."""

from __future__ import annotations

import functools
import gc
from typing import Any

from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from depthmix.errors import DepthmixError, TrainingError
from depthmix.method.mixture import MODULE_NAME, DepthMixture


def host_of(model: nn.Module) -> PreTrainedModel:
    """Return the causal language model inside a PeftModel, or the model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model  # type: ignore[return-value]


class ActiveMixture:
    """Gives the mixture that applies now: that of PEFT's active adapter, or the plain one."""

    def __init__(self) -> None:
        self._wrapper: ModulesToSaveWrapper | None = None
        self._peft_model: PeftModel | None = None

    def __call__(self, host: nn.Module) -> DepthMixture | None:
        """Return the active mixture of a model, or None where the base model alone must answer."""
        module: Any = host.get_submodule(MODULE_NAME)
        if not isinstance(module, ModulesToSaveWrapper):
            return module  # type: ignore[no-any-return]
        if _mixes_adapters(module):
            raise DepthmixError("adapter_names: one batch through several adapters has no MoDE")
        active = module.active_adapters
        if module.disable_adapters or not active or self._prompt_learning_disabled(host, module):
            return None
        if active[0] not in module.modules_to_save:
            return None
        return module.modules_to_save[active[0]]  # type: ignore[return-value]

    def require_carried(self, host: nn.Module) -> None:
        """Refuse to train an adapter without MoDE beside one with it.

        Raises:
            TrainingError: the active adapter has no MoDE.
        """
        module: Any = host.get_submodule(MODULE_NAME)
        if not host.training or not isinstance(module, ModulesToSaveWrapper):
            return
        carrying = set(module.active_adapters) & set(module.modules_to_save)
        if not carrying and not module.disable_adapters:
            raise TrainingError(
                "the active adapter has no MoDE, so it would be trained without: put 'depthmix' "
                "into modules_to_save of its PEFT configuration"
            )

    def _prompt_learning_disabled(self, host: nn.Module, wrapper: ModulesToSaveWrapper) -> bool:
        """Tell whether a prompt-learning PeftModel is in `disable_adapter()`.

        There PEFT replaces methods of the PeftModel and leaves all modules as they are.
        """
        if "peft_config" in vars(host):
            return False  # not prompt learning: a tuner sets this on the model it changes
        if self._wrapper is not wrapper:
            # Nothing leads from a module to its PeftModel: look for it, once a wrapper. There is
            # none once LN tuning was merged, which leaves the wrapper where it is.
            self._wrapper, self._peft_model = wrapper, _peft_model_around(host)
        return self._peft_model is not None and self._peft_model._adapters_disabled


def _peft_model_around(host: nn.Module) -> PeftModel | None:
    # By type, since `isinstance` would wake lazy objects of other libraries.
    models = (o for o in gc.get_objects() if issubclass(type(o), PeftModel))
    return next((model for model in models if model.get_base_model() is host), None)


def _mixes_adapters(wrapper: ModulesToSaveWrapper) -> bool:
    """Tell whether PEFT has been given `adapter_names`, which reach its modules as hooks."""
    hooks = wrapper._forward_pre_hooks.values()
    return any(isinstance(h, functools.partial) and "adapter_names" in h.keywords for h in hooks)


def require_trainable(host: PreTrainedModel, mixture: DepthMixture) -> None:
    """Refuse to train beside a frozen MoDE: it would be left out of the checkpoint too.

    Raises:
        TrainingError: something is trained, and MoDE is not, or is not saved with it.
    """
    if host._hf_peft_config_loaded:
        raise TrainingError(ADAPTERS_OF_TRANSFORMERS)
    if mixture.config.k == 1 or any(p.requires_grad for p in mixture.parameters()):
        return
    if any(p.requires_grad for p in host.parameters()):
        raise TrainingError(
            "MoDE is attached but frozen, so it would be neither trained nor saved: put "
            "'depthmix' into modules_to_save of the PEFT configuration, or pass that "
            "configuration to depthmix.attach(model, config, peft_config)"
        )


ADAPTERS_OF_TRANSFORMERS = (
    "adapters of transformers itself (model.add_adapter) do not save MoDE: use PEFT's "
    "get_peft_model, or pass the configuration to depthmix.attach(model, config, peft_config)"
)
