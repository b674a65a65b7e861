"""Options of `depthmix train`: one flat set of keys, in a YAML file and as flags (flags win).

A key is a field of one of four dataclasses: `RunOptions` here, `MoDEConfig`, and TRL's
`ModelConfig` and `SFTConfig`. TRL is imported only once the keys that need no TRL are found to be
in order.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

from depthmix.config import MoDEConfig
from depthmix.data.conversation import Supervise
from depthmix.errors import ConfigError, shown
from depthmix.train.installed import require_deepspeed
from depthmix.train.options import (
    Given,
    Option,
    negated,
    options,
    read_flags,
    read_yaml,
    require_known,
    typed,
)

if TYPE_CHECKING:
    from trl.trainer.model_config import ModelConfig
    from trl.trainer.sft_config import SFTConfig

Method = Literal["lora", "dora", "ia3", "vera", "prompt_tuning", "full", "none"]
DatasetFormat = Literal[
    "auto",
    "messages",
    "sharegpt",
    "chat_completion",
    "prompt_completion",
    "alpaca",
    "question",
    "mawps",
    "text",
]


def _help(text: str) -> dict[str, str]:
    return {"help": text}


_DEPTH = re.compile(r"all|half|[1-9]\d{0,5}|0?\.\d{0,6}[1-9]\d{0,6}|1\.0")


@dataclass(frozen=True)
class RunOptions:
    """What `depthmix train` adds to MoDE's and TRL's own options.

    The help text of every field stands in its metadata, where the command line reads it.
    """

    dataset: list[str] | None = field(
        default=None,
        metadata=_help(
            "File(s) of type json, jsonl, csv, tsv, parquet or arrow, also compressed; folders "
            "with train.*; patterns such as 'data/*.jsonl'; hub names; or "
            "reasoning_gym:GENERATOR?size=500&seed=1."
        ),
    )
    dataset_weights: list[float] | None = field(
        default=None,
        metadata=_help(
            "Shares of several sources, to draw rows by. Default: all rows, one source after "
            "another."
        ),
    )
    dataset_config: str | None = field(
        default=None, metadata=_help("Configuration of a hub data set.")
    )
    dataset_split: str = field(
        default="train",
        metadata=_help(
            "Split to train on, of a folder or a hub data set; slices (train[:100], train[:5%]) of "
            "files as well."
        ),
    )
    dataset_format: DatasetFormat = field(
        default="auto", metadata=_help("Kind of the rows. Default: told from their columns.")
    )
    dataset_template: Literal["alpaca", "question"] | None = field(
        default=None,
        metadata=_help(
            "Form of the prompts, for rows that are questions. Default: alpaca for instruction + "
            "output, question for the others."
        ),
    )
    prompt_column: str | None = field(
        default=None, metadata=_help("Column of the prompts. Default: prompt.")
    )
    completion_column: str | None = field(
        default=None, metadata=_help("Column of the completions. Default: completion.")
    )
    messages_column: str | None = field(
        default=None, metadata=_help("Column of the messages. Default: messages.")
    )
    supervise: Supervise = field(
        default="assistant",
        metadata=_help(
            "What is learned: assistant: the answers in messages, and completions; last: the last "
            "answer of a conversation; all: prompts as well."
        ),
    )
    eval_dataset: list[str] | None = field(
        default=None, metadata=_help("Data to evaluate on during training.")
    )
    eval_split: str = field(
        default="test", metadata=_help("Split to evaluate on, of a folder or a hub data set.")
    )
    validation_split: float | None = field(
        default=None,
        metadata=_help("Share of the rows to evaluate on instead, drawn by seed, such as 0.05."),
    )
    preview: int | None = field(
        default=None,
        metadata={
            "help": "Show so many rows as the model gets them, what of them is learned, and how "
            "long they are; train nothing. Default: 3, where no number is given.",
            "bare": 3,
        },
    )
    method: Method = field(
        default="lora",
        metadata=_help("Tuning method that MoDE sits on; none: MoDE alone; full: every parameter."),
    )
    mode: bool = field(
        default=True,
        metadata=_help("Attach MoDE. --no_mode: the tuning method alone, as a baseline."),
    )
    late_layers_only: bool = field(
        default=False,
        metadata=_help("Put the adapter on the k late layers only: no backward pass below them."),
    )
    tuned_layers: str | None = field(
        default=None,
        metadata=_help(
            "How many of the last layers carry the adapter: a number, a share such as 0.5, half or "
            "all (default). No backward pass runs below them. Apart from k."
        ),
    )
    num_virtual_tokens: int = field(
        default=20, metadata=_help("Length of the prompt that prompt_tuning learns.")
    )
    vera_r: int = field(default=256, metadata=_help("Rank of VeRA's shared matrices."))
    router_learning_rate: float | None = field(
        default=None, metadata=_help("Learning rate of MoDE's router.")
    )
    norm_learning_rate: float | None = field(
        default=None, metadata=_help("Learning rate of MoDE's norms.")
    )
    cache: Literal["auto", "on", "off"] = field(
        default="auto",
        metadata=_help(
            "Store what the frozen layers give, and read it in later epochs. auto: where the first "
            "layers are frozen and rows come back."
        ),
    )
    cache_dtype: Literal["exact", "bfloat16"] = field(
        default="exact",
        metadata=_help("bfloat16 takes half the room of float32, and rounds the stored states."),
    )
    cache_dir: str | None = field(
        default=None, metadata=_help("Folder of the caches. Default: ~/.cache/depthmix.")
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata=_help(
            "Stop after so many evaluations without a better eval_loss (or metric_for_best_model), "
            "and take the best checkpoint."
        ),
    )
    eval_accuracy: int | None = field(
        default=None,
        metadata=_help(
            "Answer so many evaluation rows by generation at each evaluation, logged as "
            "eval_accuracy."
        ),
    )
    resume: bool = field(
        default=False, metadata=_help("Go on from the last checkpoint in output_dir.")
    )
    overwrite: bool = field(default=False, metadata=_help("Replace the run that output_dir holds."))

    def __post_init__(self) -> None:
        if self.method == "none" and not self.mode:
            raise ConfigError("method none trains MoDE alone; with mode false nothing is trained")
        self._check_depth()
        if self.resume and self.overwrite:
            raise ConfigError("resume and overwrite exclude each other")
        self._check_data()

    def _check_depth(self) -> None:
        if self.late_layers_only and self.tuned_layers is not None:
            raise ConfigError("late_layers_only is short for tuned_layers = k: give one of them")
        name = "late_layers_only" if self.late_layers_only else "tuned_layers"
        restricted = self.late_layers_only or self.tuned_layers is not None
        if restricted and self.method not in ("lora", "dora", "ia3", "vera"):
            raise ConfigError(f"{name} needs lora, dora, ia3 or vera, not {self.method}")
        if self.tuned_layers is not None and not _DEPTH.fullmatch(self.tuned_layers):
            raise ConfigError(
                "tuned_layers must be a number of layers, a share such as 0.5, half or all, not "
                f"{shown(self.tuned_layers)}"
            )

    def _check_data(self) -> None:
        if self.validation_split is not None and self.eval_dataset:
            raise ConfigError("validation_split and eval_dataset exclude each other")
        if self.validation_split is not None and not 0 < self.validation_split < 1:
            raise ConfigError(
                f"validation_split must lie between 0 and 1, such as 0.05, not "
                f"{self.validation_split}"
            )
        if self.messages_column and (self.prompt_column or self.completion_column):
            raise ConfigError(
                "messages_column excludes prompt_column and completion_column: rows are one or the "
                "other"
            )
        if self.preview is not None and self.preview < 1:
            raise ConfigError(f"preview must be 1 or more rows, not {self.preview}")
        weights = self.dataset_weights
        if weights and not all(0 < weight < math.inf for weight in weights):
            raise ConfigError(f"dataset_weights must be numbers above 0, not {weights}")
        if weights and len(weights) != len(self.dataset or []):
            raise ConfigError(
                f"dataset_weights: {len(weights)} weights for {len(self.dataset or [])} sources in "
                "dataset"
            )


@dataclass(frozen=True)
class TrainArguments:
    """Everything a training run is told, typed and with depthmix's defaults filled in.

    Args:
        run: depthmix's own options.
        mode: the configuration of MoDE.
        model: TRL's options for loading the model and for LoRA.
        training: TRL's and the Trainer's options.
        chosen: what the user or depthmix chose for TRL's fields; the others have TRL's defaults.
    """

    run: RunOptions
    mode: MoDEConfig
    model: ModelConfig
    training: SFTConfig
    chosen: dict[str, Any]

    def resolved(self) -> dict[str, Any]:
        """Return the flat mapping that reproduces this run as a YAML file."""
        values = {**self.chosen, **dataclasses.asdict(self.run), **self.mode.to_dict()}
        return {name: value for name, value in values.items() if name not in _NOT_STORED}


_NOT_STORED = ("resume", "overwrite", "preview", "resume_from_checkpoint", "hub_token")

_LEARNING_RATES: dict[str, float] = {
    "lora": 2e-4,
    "dora": 2e-4,
    "ia3": 3e-3,
    "vera": 2e-3,
    "prompt_tuning": 3e-2,
    "full": 2e-5,
    "none": 1e-3,
}


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
    run, mode, rest = split_own(given)
    model, training, chosen = _trl(run, rest)
    for name, value in (
        ("model_name_or_path", model.model_name_or_path),
        ("dataset", run.dataset),
        ("output_dir", chosen.get("output_dir") or run.preview),
    ):
        if not value:
            raise ConfigError(f"{name} is missing: set it in the YAML file or with --{name}")
    if training.eval_strategy != "no" and not _evaluates(run):
        raise ConfigError(
            "eval_strategy is set, but there is no eval_dataset and no validation_split"
        )
    if training.eval_strategy == "no" and "eval_steps" in chosen:
        raise ConfigError("eval_steps is set, but nothing is evaluated: give eval_dataset")
    return TrainArguments(run, mode, model, training, chosen)


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
    given = negated({**own, **method}, given)
    run = RunOptions(**typed(own, given))
    mode = _mode_config(typed(method, given), given)
    return run, mode, {name: v for name, v in given.items() if name not in {**own, **method}}


def adapter_options(given: Mapping[str, Given]) -> ModelConfig:
    """Return TRL's options of LoRA alone, for commands that do not train."""
    from trl.trainer.model_config import ModelConfig

    known = {n: o for n, o in options(ModelConfig).items() if n.startswith(("lora_", "use_"))}
    given = negated(known, given)
    require_known(given, [*known, *options(RunOptions), *options(MoDEConfig)])
    config: ModelConfig = _checked(ModelConfig, typed(known, given))
    return config


def all_options() -> dict[str, dict[str, Option]]:
    """Return every key that is accepted, grouped by where it comes from."""
    from trl.trainer.model_config import ModelConfig
    from trl.trainer.sft_config import SFTConfig

    return {
        "depthmix": options(RunOptions),
        "MoDE": options(MoDEConfig),
        "model and adapter (trl.ModelConfig)": options(ModelConfig),
        "training (trl.SFTConfig)": options(SFTConfig),
    }


def _trl(
    run: RunOptions, given: Mapping[str, Given]
) -> tuple[ModelConfig, SFTConfig, dict[str, Any]]:
    from trl.trainer.model_config import ModelConfig
    from trl.trainer.sft_config import SFTConfig

    for_model, for_training = options(ModelConfig), options(SFTConfig)
    given = negated({**for_model, **for_training}, given)
    own = [*options(RunOptions), *options(MoDEConfig)]
    require_known(given, [*for_model, *for_training, *own])
    model = typed(for_model, given)
    training = _without_old_names(typed(for_training, given))
    require_deepspeed(training.get("deepspeed"))
    training = _without_trls_masks(run, training)
    training = {**_training_defaults(run, training), **training}
    if run.method != "full" and training["bf16"]:
        model = {"dtype": "bfloat16", **model}
    return _checked(ModelConfig, model), _checked(SFTConfig, training), {**model, **training}


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
    prefix_is_trained = tunes_all_layers(run)
    return {
        "learning_rate": _LEARNING_RATES[run.method],
        "save_strategy": "steps" if "save_steps" in training else "epoch",
        "eval_strategy": eval_strategy,
        "bf16": accelerated and is_torch_bf16_gpu_available() and not training.get("fp16"),
        "activation_checkpointing": accelerated and prefix_is_trained,
        "dataloader_pin_memory": accelerated,
        **_early_stopping_defaults(run, training, eval_strategy),
    }


def _early_stopping_defaults(
    run: RunOptions, training: Mapping[str, Any], eval_strategy: str
) -> dict[str, Any]:
    """Return what early stopping needs: checkpoints where there are evaluations, the best kept."""
    if run.early_stopping_patience is None:
        return {}
    steps = {"save_steps": training["eval_steps"]} if "eval_steps" in training else {}
    return {
        "load_best_model_at_end": True,
        "save_strategy": training.get("eval_strategy", eval_strategy),
        "restore_callback_states_from_checkpoint": True,
        **steps,
    }


def _evaluates(run: RunOptions) -> bool:
    return bool(run.eval_dataset) or run.validation_split is not None


def tunes_all_layers(run: RunOptions) -> bool:
    """Whether the backward pass goes through all layers, which then makes activations again."""
    partly = run.late_layers_only or run.tuned_layers not in (None, "all")
    return not partly and run.method != "none"


def _eval_strategy(run: RunOptions, training: Mapping[str, Any]) -> str:
    if not _evaluates(run):
        return "no"
    return "steps" if "eval_steps" in training else "epoch"


def _checked(cls: type[Any], values: dict[str, Any]) -> Any:
    """Build one of TRL's dataclasses; what it refuses becomes a `ConfigError`."""
    try:
        return cls(**values)
    except _REFUSALS as error:
        raise ConfigError(f"{cls.__name__}: {error}") from error


# What transformers and accelerate raise where they refuse an option.
_REFUSALS = (ValueError, TypeError, ImportError, RuntimeError, OSError, KeyError, AssertionError)


def _mode_config(values: dict[str, Any], given: Mapping[str, Given]) -> MoDEConfig:
    try:
        return MoDEConfig(**values)
    except ConfigError as error:
        message = str(error).removeprefix("MoDE configuration: ")
        name = message.split()[0]
        place = given[name].place if name in given else name
        raise ConfigError(f"{place}{message.removeprefix(name)}") from None
