"""Preferences and rewards begin where supervised training ended: with its adapter, as it is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmix.carry.saved_run import Holds, SavedRun
from depthmix.config import MoDEConfig
from depthmix.errors import ConfigError
from depthmix.train.given import Given
from depthmix.train.options import options
from depthmix.train.run_options import RunOptions
from depthmix.train.typed import negated, typed

if TYPE_CHECKING:
    from depthmix.train.arguments import TrainArguments

# What an adapter is made of. The terms of MoDE's loss are not: they may be others now.
_METHOD = (
    *("method", "late_layers_only", "tuned_layers", "num_virtual_tokens", "vera_r"),
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters"),
    *("lora_modules_to_save", "use_rslora", "use_dora"),
)
_MODE = (
    *("k", "adaptation", "adaptation_rank", "router_input", "router_top_k", "router_prior"),
    *("layers_path", "norm_path"),
)


def adapter_at(name: str, objective: str) -> SavedRun | None:
    """Return the adapter in a folder, if that is what a run of this objective begins with."""
    folder = Path(name).expanduser()
    if objective == "sft" or not folder.is_dir():
        return None
    run = SavedRun(name, folder)
    return run if run.holds is Holds.ADAPTER else None


def continued(given: Mapping[str, Given]) -> dict[str, Given]:
    """Add what the adapter that a run begins with was made by, which stays.

    Raises:
        ConfigError: one of these options is given another value.
    """
    name, objective = given.get("model_name_or_path"), given.get("objective")
    if not (name and objective and isinstance(name.text, str)):
        return dict(given)
    run = adapter_at(name.text, str(objective.text))
    if run is None:
        return dict(given)
    from trl.trainer.model_config import ModelConfig

    known = {**options(RunOptions), **options(MoDEConfig), **options(ModelConfig)}
    given = negated(known, given)
    made = {n: v for n, v in run.record.options.items() if n in _METHOD}
    if run.has_mode:
        from depthmix.carry.checkpoint import Checkpoint

        config = Checkpoint(run.folder).spec()["config"]
        made |= {"mode": True, **{name: config[name] for name in _MODE}}
    for option, value in made.items():
        if option in given and typed(known, {option: given[option]})[option] != value:
            raise ConfigError(
                f"{given[option].place}: the adapter in {run.name}, with which the run begins, has "
                f"{option} {value}: leave it out"
            )
    place = f"{run.name}: "
    return {**{n: Given(_as_text(v), place + n) for n, v in made.items()}, **given}


def go_on_with(run: SavedRun, base: Any, arguments: TrainArguments) -> Any:
    """Return a base model with a saved adapter, to be trained on.

    An adapter without MoDE gets one, unless `mode` is off: then the loss is the fused one alone.

    Raises:
        CheckpointError: the adapter does not go onto the base model.
    """
    from depthmix import attach
    from depthmix.pretrained import with_adapter

    if run.has_mode:
        return with_adapter(base, run, is_trainable=True, config=arguments.mode)
    model = with_adapter(base, run, is_trainable=True)
    return attach(model, arguments.mode if arguments.run.mode else MoDEConfig(k=1))


def base_of(arguments: TrainArguments) -> str:
    """Return the name of the base model that a run loads."""
    name = str(arguments.model.model_name_or_path)
    run = adapter_at(name, arguments.run.objective)
    return name if run is None else run.base


def _as_text(value: Any) -> Any:
    """Return a value as a YAML file would have it written."""
    if value is None:
        return None
    if isinstance(value, list):
        return [str(item) for item in value]
    return str(value).lower() if isinstance(value, bool) else str(value)
