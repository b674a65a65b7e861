"""Options of `depthmix train`: one flat set of keys, in a YAML file and as flags (flags win).

A key is a field of one of four dataclasses: `RunOptions`, `MoDEConfig`, and TRL's
`ModelConfig` and the configuration of the objective's trainer (`SFTConfig` ...). TRL is imported
only once the keys that need no TRL are found to be in order.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from depthmix.budgets import BUDGETS
from depthmix.config import MoDEConfig
from depthmix.errors import ConfigError
from depthmix.train.given import Given, read_flags, read_yaml
from depthmix.train.objectives.options import config_class, require_fitting
from depthmix.train.objectives.start import continued
from depthmix.train.options import Option, options, require_known
from depthmix.train.run_options import Objective, RunOptions
from depthmix.train.trl_options import checked_config, trl_options
from depthmix.train.typed import negated, typed

if TYPE_CHECKING:
    from trl.trainer.model_config import ModelConfig


# Options that may be "auto", with what stands in for them until a probe has settled them.
AUTO = {"k": str(MoDEConfig.k), "tuned_layers": "half"}


@dataclass(frozen=True)
class TrainArguments:
    """Everything a training run is told, typed and with depthmix's defaults filled in.

    Args:
        run: depthmix's own options.
        mode: the configuration of MoDE.
        model: TRL's options for loading the model and for LoRA.
        training: TRL's and the Trainer's options, in TRL's class for the objective.
        chosen: what the user or depthmix chose for TRL's fields; the others have TRL's defaults.
        auto: options of `AUTO` that a probe is to settle (`depthmix.probe.settle`).
        probed: what the probe found, for the record of the run.
    """

    run: RunOptions
    mode: MoDEConfig
    model: ModelConfig
    training: Any
    chosen: dict[str, Any]
    auto: tuple[str, ...] = ()
    probed: dict[str, Any] | None = None

    def resolved(self) -> dict[str, Any]:
        """Return the flat mapping that reproduces this run as a YAML file."""
        values = {**self.chosen, **dataclasses.asdict(self.run), **self.mode.to_dict()}
        return {name: value for name, value in values.items() if name not in _NOT_STORED}


_NOT_STORED = ("resume", "overwrite", "preview", "resume_from_checkpoint", "hub_token")


def parse(argv: Sequence[str]) -> TrainArguments:
    """Read `[CONFIG.yaml ...] [--key value ...]`.

    Raises:
        ConfigError: a key is unknown or a value does not fit; the message names the place.
    """
    return resolve(read(argv))


def resolve(given: Mapping[str, Given]) -> TrainArguments:
    """Return typed options, with defaults filled in.

    Raises:
        ConfigError: a key is unknown or a value does not fit; the message names the place.
    """
    auto, given = _without_auto(given)
    run, mode, rest = split_own(continued(given))
    require_fitting(run)
    if auto and run.objective != "sft":
        raise ConfigError(f"{auto[0]}: auto reads supervised rows, which objective sft has")
    if "k" in auto and not run.mode:
        raise ConfigError("k: auto chooses the layers of MoDE, and mode is false: leave one out")
    model, training, chosen = trl_options(run, rest)
    for name, value in (
        ("model_name_or_path", model.model_name_or_path),
        ("dataset", run.dataset),
        ("output_dir", chosen.get("output_dir") or run.preview),
    ):
        if not value:
            raise ConfigError(f"{name} is missing: set it in the YAML file or with --{name}")
    if training.eval_strategy != "no" and not run.evaluates:
        raise ConfigError(
            "eval_strategy is set, but there is no eval_dataset and no validation_split"
        )
    if training.eval_strategy == "no" and "eval_steps" in chosen:
        raise ConfigError("eval_steps is set, but nothing is evaluated: give eval_dataset")
    return TrainArguments(run, mode, model, training, chosen, auto)


def _without_auto(given: Mapping[str, Given]) -> tuple[tuple[str, ...], dict[str, Given]]:
    """Return the names of the options that are auto, and the options with stand-ins for them."""
    auto = tuple(name for name in AUTO if name in given and given[name].text == "auto")
    stand_ins = {name: dataclasses.replace(given[name], text=AUTO[name]) for name in auto}
    return auto, {**given, **stand_ins}


def read(argv: Sequence[str]) -> dict[str, Given]:
    """Return what the YAML files (the arguments before the flags) and the flags give.

    Of two that give the same key, the later one counts.
    """
    files = list(takewhile(lambda argument: not argument.startswith("-"), argv))
    given: dict[str, Given] = {}
    for file in files:
        given |= read_yaml(file)
    return given | read_flags(argv[len(files) :])


def split_own(given: Mapping[str, Given]) -> tuple[RunOptions, MoDEConfig, dict[str, Given]]:
    """Return depthmix's own options and MoDE's, typed, and what is left for TRL."""
    own, method = options(RunOptions), options(MoDEConfig)
    given = with_budget(negated({**own, **method}, given))
    run = RunOptions(**typed(own, given))
    mode = _mode_config(typed(method, given), given)
    return run, mode, {name: v for name, v in given.items() if name not in {**own, **method}}


def with_budget(given: Mapping[str, Given]) -> dict[str, Given]:
    """Add what a budget stands for, where it is not given.

    Raises:
        ConfigError: there is no such budget.
    """
    known = options(RunOptions)
    names = {"budget", "late_layers_only", "tuned_layers"} & given.keys()
    own = typed({n: known[n] for n in names}, {n: given[n] for n in names})
    if own.get("budget") is None:
        return dict(given)
    settings = BUDGETS[own["budget"]].options()
    if own.get("late_layers_only"):
        del settings["tuned_layers"]
    place = f"budget {own['budget']}"
    # Null, as depthmix.yaml of a run without a budget has it, leaves the depth to the budget.
    kept = {n: v for n, v in given.items() if n not in settings or own.get(n, v) is not None}
    return {**{n: Given(text, place) for n, text in settings.items()}, **kept}


def adapter_options(given: Mapping[str, Given]) -> ModelConfig:
    """Return TRL's options of LoRA alone, for commands that do not train."""
    from trl.trainer.model_config import ModelConfig

    known = {n: o for n, o in options(ModelConfig).items() if n.startswith(("lora_", "use_"))}
    given = negated(known, given)
    require_known(given, [*known, *options(RunOptions), *options(MoDEConfig)])
    config: ModelConfig = checked_config(ModelConfig, typed(known, given))
    return config


def all_options(objective: Objective = "sft") -> dict[str, dict[str, Option]]:
    """Return every key that is accepted, grouped by where it comes from."""
    from trl.trainer.model_config import ModelConfig

    config = config_class(objective)
    return {
        "depthmix": options(RunOptions),
        "MoDE": options(MoDEConfig),
        "model and adapter (trl.ModelConfig)": options(ModelConfig),
        f"training (trl.{config.__name__})": options(config),
    }


def _mode_config(values: dict[str, Any], given: Mapping[str, Given]) -> MoDEConfig:
    try:
        return MoDEConfig(**values)
    except ConfigError as error:
        message = str(error).removeprefix("MoDE configuration: ")
        name = message.split()[0]
        place = given[name].place if name in given else name
        raise ConfigError(f"{place}{message.removeprefix(name)}") from None
