"""TRL's options: `ModelConfig`, and the objective's, with the defaults that are depthmix's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from depthmix.budgets import BUDGETS
from depthmix.config import MoDEConfig
from depthmix.errors import ConfigError
from depthmix.train.given import Given
from depthmix.train.installed import require_deepspeed
from depthmix.train.objectives.options import (
    RELATIVE_RATES,
    config_class,
    defaults,
    require_own_options,
)
from depthmix.train.options import options, require_known
from depthmix.train.run_options import Method, RunOptions
from depthmix.train.typed import negated, typed

if TYPE_CHECKING:
    from trl.trainer.model_config import ModelConfig

_LEARNING_RATES: dict[Method, float] = {
    "lora": 2e-4,
    "dora": 2e-4,
    "ia3": 3e-3,
    "vera": 2e-3,
    "prompt_tuning": 3e-2,
    "full": 2e-5,
    "none": 1e-3,
}


def trl_options(
    run: RunOptions, given: Mapping[str, Given]
) -> tuple[ModelConfig, Any, dict[str, Any]]:
    """Return TRL's options, typed, and what the user or depthmix chose of them.

    Raises:
        ConfigError: a key is unknown or a value does not fit; the message names the place.
    """
    from trl.trainer.model_config import ModelConfig

    training_config = config_class(run.objective)
    for_model, for_training = options(ModelConfig), options(training_config)
    given = negated({**for_model, **for_training}, given)
    own = [*options(RunOptions), *options(MoDEConfig)]
    require_own_options(run.objective, given)
    require_known(given, [*for_model, *for_training, *own])
    model = typed(for_model, given)
    training = _without_old_names(typed(for_training, given))
    require_deepspeed(training.get("deepspeed"))
    if run.objective == "sft":
        training = _without_trls_masks(run, training)
    training = {**_training_defaults(run, training), **training}
    if run.method != "full" and training["bf16"]:
        model = {"dtype": "bfloat16", **model}
    return (
        checked_config(ModelConfig, model),
        checked_config(training_config, training),
        {**model, **training},
    )


def _without_old_names(training: dict[str, Any]) -> dict[str, Any]:
    """Rename what TRL still declares under a name that transformers warns about."""
    return {
        name.replace("gradient_checkpointing", "activation_checkpointing"): value
        for name, value in training.items()
    }


def _without_trls_masks(run: RunOptions, training: dict[str, Any]) -> dict[str, Any]:
    """Leave out TRL's words for what `supervise` says; they must agree with it.

    Raises:
        ConfigError: they do not; says how to put it.
    """
    for name in ("assistant_only_loss", "completion_only_loss"):
        said = training.get(name)
        if said is not None and said != (run.supervise != "all"):
            instead = "assistant" if said else "all"
            raise ConfigError(
                f"{name} {str(said).lower()} is not what supervise {run.supervise} means: leave it "
                f"out and set supervise {instead}"
            )
    masks = ("assistant_only_loss", "completion_only_loss")
    return {name: value for name, value in training.items() if name not in masks}


def _training_defaults(run: RunOptions, training: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults that differ from TRL's, which asks for bf16 wherever it runs."""
    import torch
    from transformers.utils.import_utils import is_torch_bf16_gpu_available

    eval_strategy = _eval_strategy(run, training)
    accelerated = torch.accelerator.is_available() and not training.get("use_cpu")
    return {
        **defaults(run.objective, training),
        "learning_rate": _LEARNING_RATES[run.method] * _relative_rate(run),
        "save_strategy": "steps" if "save_steps" in training else "epoch",
        "eval_strategy": eval_strategy,
        "bf16": accelerated and is_torch_bf16_gpu_available() and not training.get("fp16"),
        "activation_checkpointing": accelerated and run.tunes_many_layers,
        "dataloader_pin_memory": accelerated,
        **_early_stopping_defaults(run, training, eval_strategy),
    }


def _relative_rate(run: RunOptions) -> float:
    budget = BUDGETS[run.budget].rate if run.budget else 1.0
    return budget * RELATIVE_RATES[run.objective]


def _early_stopping_defaults(
    run: RunOptions, training: Mapping[str, Any], eval_strategy: str
) -> dict[str, Any]:
    """Return what early stopping needs: checkpoints where there are evaluations, the best kept."""
    if run.early_stopping_patience is None:
        return {}
    steps = {"save_steps": training["eval_steps"]} if "eval_steps" in training else {}
    best = {"metric_for_best_model": "eval_reward"} if run.objective == "grpo" else {}
    return {
        **best,
        "load_best_model_at_end": True,
        "save_strategy": training.get("eval_strategy", eval_strategy),
        "restore_callback_states_from_checkpoint": True,
        **steps,
    }


def _eval_strategy(run: RunOptions, training: Mapping[str, Any]) -> str:
    if not run.evaluates:
        return "no"
    return "steps" if "eval_steps" in training else "epoch"


def checked_config(cls: type[Any], values: dict[str, Any]) -> Any:
    """Build one of TRL's dataclasses; what it refuses becomes a `ConfigError`."""
    try:
        return cls(**values)
    except _REFUSALS as error:
        raise ConfigError(f"{cls.__name__}: {error}") from error


# What transformers and accelerate raise where they refuse an option.
_REFUSALS = (ValueError, TypeError, ImportError, RuntimeError, OSError, KeyError, AssertionError)
