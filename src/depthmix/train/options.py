"""Options: the fields of dataclasses, by their names and types, and names that are none."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from depthmix.errors import ConfigError, nearest
from depthmix.train.given import Given

# Short names that other tools use, for "did you mean".
_ALSO_KNOWN_AS = {
    "base_model": "model_name_or_path",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "grad_accum": "gradient_accumulation_steps",
    "lambda": "distill_weight",
    "lora_rank": "lora_r",
    "lr": "learning_rate",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "model": "model_name_or_path",
    "norm_lr": "norm_learning_rate",
    "output": "output_dir",
    "peft": "method",
    "r": "lora_r",
    "rank": "lora_r",
    "router_lr": "router_learning_rate",
    "target_modules": "lora_target_modules",
    "use_peft": "method",
}

# Fields of TRL that have no meaning here: `method` decides, or the command line cannot say it.
_LEFT_OUT = {"use_peft", "lora_task_type", "parallelism_config"}


@dataclass(frozen=True)
class Option:
    """One key that may be given: a field of a dataclass, with its type resolved.

    Args:
        name: the key.
        hint: the type of its values.
        default: the value where it is not given.
        help: what it means.
        choices: the values it may have, where they are few.
        bare: the value of a flag without a value, or None where it needs one.
    """

    name: str
    hint: Any
    default: Any
    help: str
    choices: tuple[Any, ...]
    bare: Any = None

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is dataclasses.MISSING


def options(cls: type[Any]) -> dict[str, Option]:
    """Return the fields of a dataclass as options."""
    hints = get_type_hints(cls)
    return {
        f.name: Option(
            f.name,
            hints[f.name],
            f.default if f.default_factory is dataclasses.MISSING else f.default_factory(),
            f.metadata.get("help", ""),
            tuple(f.metadata.get("choices", ())),
            f.metadata.get("bare"),
        )
        for f in dataclasses.fields(cls)
        if f.init and f.name not in _LEFT_OUT
    }


def require_known(given: Mapping[str, Given], known: Iterable[str]) -> None:
    """Raise a ConfigError for a key that is no option, with the nearest one that is."""
    names = list(known)
    for name, value in given.items():
        if name not in names:
            raise ConfigError(f"{value.place}: no such option{_suggestion(name, names)}")


def _suggestion(name: str, known: list[str]) -> str:
    if name in _ALSO_KNOWN_AS:
        return f"; did you mean {_ALSO_KNOWN_AS[name]}?"
    return nearest(name, known)
