"""The tuning methods that MoDE sits on, and what the command line's options make of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from depthmix.config import MoDEConfig
from depthmix.errors import ConfigError, DepthmixError
from depthmix.train.run_options import RunOptions

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel
    from trl.trainer.model_config import ModelConfig


def tune(
    model: PreTrainedModel, run: RunOptions, mode: MoDEConfig, model_config: ModelConfig
) -> Any:
    """Put the tuning method, and MoDE unless `run.mode` is off, on a base model.

    Without MoDE the loss is still the fused one, of the last layer alone; what is saved is PEFT's.

    Returns:
        The PeftModel, or the model itself where every parameter is trained.

    Raises:
        ConfigError: PEFT cannot put the method on this model.
    """
    from depthmix import attach

    tuned_layers = mode.k if run.late_layers_only else run.tuned_layers
    config = peft_config(run, model_config)
    _require_names(model, model_config)
    try:
        return attach(
            model, mode if run.mode else MoDEConfig(k=1), config, tuned_layers=tuned_layers
        )
    except DepthmixError:
        raise
    # PEFT's: unknown target modules, an architecture without defaults; torch's: no such memory.
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise ConfigError(f"method {run.method}: {error}") from error


def without_effect(run: RunOptions, chosen: Iterable[str]) -> list[str]:
    """Return the chosen options of LoRA that this method does not read."""
    read = _READ_BY.get(run.method, ())
    return [n for n in chosen if n.startswith(_LORA_OPTIONS) and not n.startswith(read)]


_LORA_OPTIONS = ("lora_", "use_rslora", "use_dora")
_READ_BY: dict[str, tuple[str, ...]] = {
    "lora": _LORA_OPTIONS,
    "dora": _LORA_OPTIONS,
    "vera": ("lora_target_modules", "lora_dropout", "lora_modules_to_save"),
}


def peft_config(run: RunOptions, model_config: ModelConfig) -> PeftConfig | None:
    """Return PEFT's configuration of the method, or None for full fine-tuning."""
    from depthmix.carry.adapters import mode_only_config

    if run.method == "full":
        return None
    if run.method == "none":
        return mode_only_config()
    return _method_config(run, model_config)


def _method_config(run: RunOptions, options: ModelConfig) -> PeftConfig:
    from peft import IA3Config, LoraConfig, PromptTuningConfig, VeraConfig

    common: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    if run.method == "prompt_tuning":
        return PromptTuningConfig(**common, num_virtual_tokens=run.num_virtual_tokens)
    if run.method == "ia3":
        return IA3Config(**common)
    common["target_modules"] = _target_modules(options)
    common["modules_to_save"] = options.lora_modules_to_save
    if run.method == "vera":
        return VeraConfig(**common, r=run.vera_r, vera_dropout=options.lora_dropout)
    return LoraConfig(
        **common,
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_parameters=options.lora_target_parameters,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora or run.method == "dora",
    )


def _require_names(model: PreTrainedModel, options: ModelConfig) -> None:
    """PEFT passes over names that are not there, in silence."""
    modules = [name for name, _ in model.named_modules()]
    parameters = [name for name, _ in model.named_parameters()]
    for option, known in (
        ("lora_modules_to_save", modules),
        ("lora_target_parameters", parameters),
    ):
        for name in getattr(options, option) or ():
            if not any(f".{path}".endswith(f".{name}") for path in known):
                raise ConfigError(f"{option}: the model has no {name}")


def _target_modules(options: ModelConfig) -> list[str] | str:
    """Return names of modules, or a pattern: TRL turns a single name into a pattern."""
    targets = options.lora_target_modules or "all-linear"
    return [targets] if isinstance(targets, str) and targets.isidentifier() else targets
