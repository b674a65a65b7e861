"""What the model is compared with: itself, as it was when training began."""

from __future__ import annotations

import copy
from typing import Any

from depthmix.errors import ConfigError
from depthmix.train.arguments import TrainArguments

_NAME = "ref"  # TRL's copy of an adapter


def reference(arguments: TrainArguments, model: Any) -> dict[str, Any]:
    """Return what a trainer is to be told of its reference.

    Of an adapter TRL makes a copy itself, MoDE included. For a model without one it would load the
    base, without MoDE.

    Raises:
        ConfigError: the trainer takes none.
    """
    from peft import PeftModel

    training, objective = arguments.training, arguments.run.objective
    if objective == "sft" or isinstance(model, PeftModel):
        return {}
    if objective == "grpo":
        if training.beta and arguments.run.mode:
            raise ConfigError(
                "beta: with method full, TRL's reference would be the base model without MoDE: "
                "tune by an adapter, or leave beta at 0"
            )
        return {}
    return {"ref_model": copy.deepcopy(model).requires_grad_(False).eval()}


def drop_reference(model: Any) -> None:
    """Take TRL's copy off a model that is trained, so that it is not saved as an adapter of it."""
    from peft import PeftModel

    if isinstance(model, PeftModel) and _NAME in model.peft_config:
        model.delete_adapter(_NAME)
