"""The options of `depthmix train` for an objective: TRL's class, defaults, what has no use.

Those of supervised training are in `train/trl_options.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, get_args

from depthmix.data.formats import FORMATS, Purpose
from depthmix.errors import ConfigError
from depthmix.train.given import Given
from depthmix.train.options import options
from depthmix.train.run_options import Objective, RunOptions

OBJECTIVES: tuple[Objective, ...] = get_args(Objective)
PURPOSES: dict[Objective, Purpose] = {"sft": "completions", "dpo": "pairs", "grpo": "prompts"}

# Learning rates of tuning method, router and norms, relative to those of supervised training.
RELATIVE_RATES: dict[Objective, float] = {"sft": 1.0, "dpo": 0.25, "grpo": 0.25}

_GROUP = 8  # TRL's number of answers to a prompt
_DEFAULTS: dict[Objective, dict[str, Any]] = {
    "sft": {},
    "dpo": {},
    # Four prompts a step, and room for a short answer: what a small machine can do.
    "grpo": {"gradient_accumulation_steps": 4, "max_completion_length": 128, "logging_steps": 1},
}

# Words that TRL itself looks at only once the first step is computed.
_PAIR_LOSSES = (
    *("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot"),
    *("aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
)
_REWARD_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo")
_WORDS: dict[Objective, dict[str, tuple[str, ...]]] = {
    "sft": {},
    "dpo": {
        "loss_type": _PAIR_LOSSES,
        "f_divergence_type": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    },
    "grpo": {
        "loss_type": _REWARD_LOSSES,
        "importance_sampling_level": ("token", "sequence"),
        "scale_rewards": ("group", "batch", "none"),
    },
}

# Options of depthmix that say something of supervised rows alone.
_SUPERVISED = ("supervise", "completion_column", "eval_accuracy", "cache_dtype", "calibrate")


def config_class(objective: Objective) -> type[Any]:
    """Return TRL's class of options."""
    return _of_trl(objective, "config", "Config")


def trainer_class(objective: Objective) -> type[Any]:
    """Return TRL's trainer."""
    return _of_trl(objective, "trainer", "Trainer")


def _of_trl(objective: Objective, module: str, suffix: str) -> type[Any]:
    found: type[Any] = getattr(
        import_module(f"trl.trainer.{objective}_{module}"), objective.upper() + suffix
    )
    return found


def defaults(objective: Objective, training: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults that differ from TRL's, beside those of every objective."""
    if objective != "grpo":
        return _DEFAULTS[objective]
    group = training.get("num_generations", _GROUP)
    evaluated = training.get("num_generations_eval", group)
    rows = {"per_device_train_batch_size": group, "per_device_eval_batch_size": evaluated}
    return {**_DEFAULTS[objective], **rows}


def rates_of_mode(run: RunOptions) -> tuple[float, float]:
    """Return the learning rates of router and norms."""
    from depthmix.carry.groups import NORM_LR, ROUTER_LR

    relative = RELATIVE_RATES[run.objective]
    given = (run.router_learning_rate, run.norm_learning_rate)
    router, norm = (
        rate * relative if chosen is None else chosen
        for rate, chosen in zip((ROUTER_LR, NORM_LR), given, strict=True)
    )
    return router, norm


def require_own_options(objective: Objective, given: Mapping[str, Given]) -> None:
    """Refuse options of TRL that another objective has, and this one has not.

    Raises:
        ConfigError: names the option and the objectives.
    """
    own = options(config_class(objective))
    for name, value in given.items():
        others = [o for o in OBJECTIVES if o != objective and name in options(config_class(o))]
        if name not in own and others:
            raise ConfigError(
                f"{value.place}: objective {objective} has no such option, which is one of "
                f"objective {' and '.join(others)}"
            )


def require_known_words(objective: Objective, training: Any) -> None:
    """Refuse words that TRL does not know, before anything is loaded.

    Raises:
        ConfigError: names the option and the words.
    """
    for name, known in _WORDS[objective].items():
        given = getattr(training, name)
        for word in given if isinstance(given, list) else [given]:
            if word not in known:
                raise ConfigError(f"{name} {word}: expected one of {', '.join(known)}")


def require_fitting(run: RunOptions) -> None:
    """Refuse options of depthmix that have no use with the objective.

    Raises:
        ConfigError: names the option and the way out.
    """
    if run.objective != "grpo" and run.reward:
        raise ConfigError(f"reward: objective {run.objective} knows no rewards; grpo does")
    known = FORMATS.get(run.dataset_format)
    if known and PURPOSES[run.objective] not in known.purposes:
        able = [n for n, form in FORMATS.items() if PURPOSES[run.objective] in form.purposes]
        raise ConfigError(
            f"dataset_format {run.dataset_format}: objective {run.objective} reads rows of format "
            f"{', '.join(able)}"
        )
    if run.objective == "sft":
        return
    fields = options(RunOptions)
    for name in _SUPERVISED:
        if getattr(run, name) != fields[name].default:
            raise ConfigError(f"{name}: only objective sft takes it; leave it out")
    if run.cache == "on":
        raise ConfigError(
            f"cache: objective {run.objective} runs all layers, on answers of its own or beside a "
            "reference; leave it out"
        )
