"""Which values an option may have: ranges of numbers, and paths with `~` for the home folder."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depthmix.errors import shown

Number = int | float
MOST = 2**31 - 1  # what torch, NumPy and tokenizers take as an integer
MOST_SEED = 2**32 - 1


@dataclass(frozen=True)
class Range:
    """The numbers that an option may be.

    Args:
        low: the least one.
        high: the greatest one.
        above: leave `low` out.
        below: leave `high` out.
        also: a number beside the range, such as -1 for "not given".
    """

    low: Number
    high: Number = MOST
    above: bool = False
    below: bool = False
    also: Number | None = None

    def __contains__(self, value: Number) -> bool:
        if value == self.also:
            return True
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            text = f"{'>' if self.above else '>='} {self.low:g}"
        elif self.high in (MOST, MOST_SEED):
            text = f"{'>' if self.above else '>='} {self.low:g} and <= {self.high:.0f}"
        else:
            text = f"{'(' if self.above else '['}{self.low:g}, {self.high:g}"
            text = f"in {text}{')' if self.below else ']'}"
        return text if self.also is None else f"{text}, or {self.also:g}"


_COUNT = Range(1)
_NOT_NEGATIVE = Range(0, math.inf, below=True)
_POSITIVE = Range(0, math.inf, above=True, below=True)
_SHARE = Range(0, 1, below=True)
_SEED = Range(0, MOST_SEED)

# MoDEConfig and RunOptions check further ones themselves.
RANGES = {
    **dict.fromkeys(
        (
            *("num_virtual_tokens", "vera_r", "lora_r", "lora_alpha", "max_length"),
            *("early_stopping_patience", "eval_accuracy", "save_total_limit"),
            *("per_device_train_batch_size", "per_device_eval_batch_size", "pad_to_multiple_of"),
            *("gradient_accumulation_steps", "eval_accumulation_steps", "torch_empty_cache_steps"),
            *("train_rows", "validation_rows", "test_rows", "most_characters"),
            *("num_generations", "num_generations_eval", "max_completion_length"),
            *("generation_batch_size", "steps_per_generation", "num_iterations"),
            *("precompute_ref_batch_size", "ref_model_sync_steps", "num_completions_to_print"),
            *("dataset_num_proc", "dataloader_prefetch_factor", "ddp_bucket_cap_mb", "ddp_timeout"),
        ),
        _COUNT,
    ),
    **dict.fromkeys(
        (
            *("learning_rate", "router_learning_rate", "norm_learning_rate", "weight_decay"),
            *("adam_epsilon", "max_grad_norm", "warmup_steps", "eval_delay"),
            *("neftune_noise_alpha", "router_aux_loss_coef"),
            *("beta", "epsilon", "epsilon_high"),
        ),
        _NOT_NEGATIVE,
    ),
    **dict.fromkeys(
        (
            *("num_train_epochs", "logging_steps", "eval_steps", "save_steps"),
            *("temperature", "repetition_penalty"),
        ),
        _POSITIVE,
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lora_dropout"), _SHARE),
    **dict.fromkeys(("seed", "data_seed", "seeds"), _SEED),
    "label_smoothing_factor": Range(0, 1),
    "label_smoothing": Range(0, 0.5, below=True),
    "top_p": Range(0, 1, above=True),
    "min_p": Range(0, 1),
    "top_k": Range(0),
    "top_entropy_quantile": Range(0, 1),
    "max_steps": Range(1, also=-1),
    "dataloader_num_workers": Range(0),
    "local_rank": Range(0, also=-1),
}

PATHS = {
    *("model_name_or_path", "dataset", "eval_dataset", "output_dir", "cache_dir"),
    *("chat_template_path", "resume_from_checkpoint"),
    *("deepspeed", "fsdp_config", "accelerator_config"),
}


def checked(name: str, value: Any) -> Any:
    """Return the value of an option, with `~` expanded in paths.

    Raises:
        ValueError: it is out of range, or no text that a file can have.
    """
    if isinstance(value, list):
        return [checked(name, item) for item in value]
    if isinstance(value, str):
        return _checked_text(name, value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    allowed = RANGES.get(name)
    if allowed is None:
        allowed = Range(-MOST) if isinstance(value, int) else None
    if allowed is not None and value not in allowed:
        expected = allowed if math.isfinite(value) else "a finite number"
        raise ValueError(f"must be {expected}, not {shown(value)}")
    return value


def _checked_text(name: str, text: str) -> str:
    if not text.isprintable() and any(character in text for character in "\0\n"):
        raise ValueError(f"must be on one line, without NUL, not {shown(text)}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"must be Unicode, not {shown(text)}") from None
    return str(Path(text).expanduser()) if name in PATHS and text.startswith("~") else text
