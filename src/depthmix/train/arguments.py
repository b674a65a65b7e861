"""Options of `depthmix train`: one flat set of keys, in a YAML file and as flags (flags win).

A key is a field of one of four dataclasses: `RunOptions` here, `MoDEConfig`, and TRL's
`ModelConfig` and `SFTConfig`. A value stays the text that the user wrote, with its place, until the
type of its field is known: YAML would read `no` as false and `2e-4` as text. TRL is imported only
once the keys that need no TRL are found to be in order.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from depthmix.config import MoDEConfig
from depthmix.errors import ConfigError

if TYPE_CHECKING:
    from trl.trainer.model_config import ModelConfig
    from trl.trainer.sft_config import SFTConfig

Method = Literal["lora", "dora", "ia3", "vera", "prompt_tuning", "full", "none"]
DatasetFormat = Literal[
    "auto", "messages", "chat_completion", "prompt_completion", "alpaca", "question", "text"
]


def _help(text: str) -> dict[str, str]:
    return {"help": text}


@dataclass(frozen=True)
class RunOptions:
    """What `depthmix train` adds to MoDE's and TRL's own options.

    The help text of every field stands in its metadata, where the command line reads it.
    """

    dataset: list[str] | None = field(
        default=None,
        metadata=_help(
            "Local json, jsonl, csv or parquet file(s), a folder with train.*, or a hub name."
        ),
    )
    dataset_config: str | None = field(
        default=None, metadata=_help("Configuration of a hub data set.")
    )
    dataset_split: str = field(
        default="train", metadata=_help("Split to train on, of a folder or a hub data set.")
    )
    dataset_format: DatasetFormat = field(
        default="auto", metadata=_help("Kind of the rows. Default: told from their columns.")
    )
    eval_dataset: list[str] | None = field(
        default=None, metadata=_help("Data to evaluate on during training.")
    )
    eval_split: str = field(
        default="test", metadata=_help("Split to evaluate on, of a folder or a hub data set.")
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
    resume: bool = field(
        default=False, metadata=_help("Go on from the last checkpoint in output_dir.")
    )
    overwrite: bool = field(default=False, metadata=_help("Replace the run that output_dir holds."))

    def __post_init__(self) -> None:
        if self.method == "none" and not self.mode:
            raise ConfigError("method none trains MoDE alone; with mode false nothing is trained")
        if self.late_layers_only and self.method not in ("lora", "dora", "vera"):
            raise ConfigError(f"late_layers_only needs lora, dora or vera, not {self.method}")
        if self.resume and self.overwrite:
            raise ConfigError("resume and overwrite exclude each other")


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


_NOT_STORED = ("resume", "overwrite", "resume_from_checkpoint", "hub_token")

# Short names that other tools use, for "did you mean".
_ALSO_KNOWN_AS = {
    "base_model": "model_name_or_path",
    "batch_size": "per_device_train_batch_size",
    "epochs": "num_train_epochs",
    "lambda": "distill_weight",
    "lr": "learning_rate",
    "model": "model_name_or_path",
    "output": "output_dir",
    "peft": "method",
    "rank": "lora_r",
    "use_peft": "method",
}

# Fields of TRL that have no meaning here: `method` decides, or the command line cannot say it.
_LEFT_OUT = {"use_peft", "lora_task_type", "parallelism_config"}

_LEARNING_RATES: dict[str, float] = {
    "lora": 2e-4,
    "dora": 2e-4,
    "ia3": 3e-3,
    "vera": 2e-3,
    "prompt_tuning": 3e-2,
    "full": 2e-5,
    "none": 1e-3,
}


@dataclass(frozen=True)
class Given:
    """A value as the user wrote it, and the place to name when it is wrong.

    Args:
        text: text, a list of texts, a mapping, or None for YAML's null. An empty list is a flag
            without a value.
        place: `run.yaml:7: k` or `--k`.
    """

    text: Any
    place: str


@dataclass(frozen=True)
class Option:
    """One key that may be given: a field of a dataclass, with its type resolved."""

    name: str
    hint: Any
    default: Any
    help: str
    choices: tuple[Any, ...]


def parse(argv: Sequence[str]) -> TrainArguments:
    """Read `[CONFIG.yaml] [--key value ...]`.

    Raises:
        ConfigError: a key is unknown or a value does not fit; the message names the place.
    """
    given = read(argv)
    run, mode, rest = split_own(given)
    model, training, chosen = _trl(run, rest)
    for name, value in (
        ("model_name_or_path", model.model_name_or_path),
        ("dataset", run.dataset),
        ("output_dir", chosen.get("output_dir")),
    ):
        if not value:
            raise ConfigError(f"{name} is missing: set it in the YAML file or with --{name}")
    if training.eval_strategy != "no" and not run.eval_dataset:
        raise ConfigError("eval_strategy is set, but there is no eval_dataset")
    return TrainArguments(run, mode, model, training, chosen)


def read(argv: Sequence[str]) -> dict[str, Given]:
    """Return what the YAML file (the first argument, if it is no flag) and the flags give."""
    if argv and not argv[0].startswith("-"):
        return {**read_yaml(argv[0]), **read_flags(argv[1:])}
    return read_flags(argv)


def split_own(given: Mapping[str, Given]) -> tuple[RunOptions, MoDEConfig, dict[str, Given]]:
    """Return depthmix's own options and MoDE's, typed, and what is left for TRL."""
    own, method = options(RunOptions), options(MoDEConfig)
    given = _negated({**own, **method}, given)
    run = RunOptions(**_typed(own, given))
    mode = _mode_config(_typed(method, given), given)
    return run, mode, {name: v for name, v in given.items() if name not in {**own, **method}}


def adapter_options(given: Mapping[str, Given]) -> ModelConfig:
    """Return TRL's options of LoRA alone, for commands that do not train."""
    from trl.trainer.model_config import ModelConfig

    known = {n: o for n, o in options(ModelConfig).items() if n.startswith(("lora_", "use_"))}
    given = _negated(known, given)
    _require_known(given, [*known, *options(RunOptions), *options(MoDEConfig)])
    config: ModelConfig = _checked(ModelConfig, _typed(known, given))
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
        )
        for f in dataclasses.fields(cls)
        if f.init and f.name not in _LEFT_OUT
    }


def _trl(
    run: RunOptions, given: Mapping[str, Given]
) -> tuple[ModelConfig, SFTConfig, dict[str, Any]]:
    from trl.trainer.model_config import ModelConfig
    from trl.trainer.sft_config import SFTConfig

    for_model, for_training = options(ModelConfig), options(SFTConfig)
    given = _negated({**for_model, **for_training}, given)
    own = [*options(RunOptions), *options(MoDEConfig)]
    _require_known(given, [*for_model, *for_training, *own])
    model = _typed(for_model, given)
    training = _without_old_names(_typed(for_training, given))
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


def _training_defaults(run: RunOptions, training: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults that differ from TRL's, which asks for bf16 wherever it runs."""
    import torch
    from transformers.utils.import_utils import is_torch_bf16_gpu_available

    accelerated = torch.accelerator.is_available() and not training.get("use_cpu")
    prefix_is_trained = not run.late_layers_only and run.method != "none"
    return {
        "learning_rate": _LEARNING_RATES[run.method],
        "save_strategy": "steps" if "save_steps" in training else "epoch",
        "eval_strategy": _eval_strategy(run, training),
        "bf16": accelerated and is_torch_bf16_gpu_available() and not training.get("fp16"),
        "activation_checkpointing": accelerated and prefix_is_trained,
        "dataloader_pin_memory": accelerated,
    }


def _eval_strategy(run: RunOptions, training: Mapping[str, Any]) -> str:
    if not run.eval_dataset:
        return "no"
    return "steps" if "eval_steps" in training else "epoch"


def _checked(cls: type[Any], values: dict[str, Any]) -> Any:
    """Build one of TRL's dataclasses; what it refuses becomes a `ConfigError`."""
    try:
        return cls(**values)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{cls.__name__}: {error}") from error


def _mode_config(values: dict[str, Any], given: Mapping[str, Given]) -> MoDEConfig:
    try:
        return MoDEConfig(**values)
    except ConfigError as error:
        message = str(error).removeprefix("MoDE configuration: ")
        name = message.split()[0]
        place = given[name].place if name in given else name
        raise ConfigError(f"{place}{message.removeprefix(name)}") from None


# Reading text


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 2e-4 is a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_yaml(path: str) -> dict[str, Given]:
    """Read a flat mapping, keeping the text and the line number of every value."""
    try:
        root = yaml.compose(Path(path).read_text("utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from error
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError(f"{path}: must hold `key: value` lines")
    given: dict[str, Given] = {}
    for key, value in root.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in given:
            raise ConfigError(f"{path}:{line}: {name} is given twice")
        given[name] = Given(_text(value), f"{path}:{line}: {name}")
    return given


def _text(node: yaml.Node) -> Any:
    """Return scalars as written, lists of them, and mappings as the values they mean."""
    if isinstance(node, yaml.ScalarNode):
        return None if node.tag == "tag:yaml.org,2002:null" else node.value
    if isinstance(node, yaml.SequenceNode):
        return [_text(item) for item in node.value]
    return _mapping(yaml.serialize(node))


def _mapping(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def read_flags(argv: Sequence[str]) -> dict[str, Given]:
    """Read `--key value ...`, `--key=value` and `--key`; `-` and `_` in a key are the same."""
    given: dict[str, Given] = {}
    name = None
    for token in argv:
        if token.startswith("--"):
            flag, equals, value = token.partition("=")
            name = flag[2:].replace("-", "_")
            given[name] = Given([value] if equals else [], flag)
        elif token.endswith((".yaml", ".yml")):
            raise ConfigError(f"{token}: the configuration file must come before the flags")
        elif name is None:
            raise ConfigError(f"{token!r}: expected a flag such as --max_steps 100")
        else:
            given[name].text.append(token)
    return {
        name: Given(v.text[0] if len(v.text) == 1 else v.text, v.place) for name, v in given.items()
    }


def _negated(known: Mapping[str, Option], given: Mapping[str, Given]) -> dict[str, Given]:
    """Turn `--no_key` into `key: false` where `key` is a yes-or-no option."""
    result = {}
    for name, value in given.items():
        positive = known.get(name.removeprefix("no_"))
        if name not in known and positive and bool in _kinds(positive.hint) and value.text == []:
            result[positive.name] = Given("false", value.place)
        else:
            result[name] = value
    return result


# From text to typed values


def _typed(known: Mapping[str, Option], given: Mapping[str, Given]) -> dict[str, Any]:
    values = {}
    for name, value in given.items():
        if name in known:
            try:
                values[name] = convert(value.text, known[name])
            except ValueError as error:
                raise ConfigError(f"{value.place}: {error}") from None
    return values


def _require_known(given: Mapping[str, Given], known: Iterable[str]) -> None:
    names = list(known)
    for name, value in given.items():
        if name not in names:
            raise ConfigError(f"{value.place}: no such option{_suggestion(name, names)}")


def _suggestion(name: str, known: list[str]) -> str:
    if name in _ALSO_KNOWN_AS:
        return f"; did you mean {_ALSO_KNOWN_AS[name]}?"
    close = difflib.get_close_matches(name, known, n=1) or [k for k in known if name in k]
    return f"; did you mean {close[0]}?" if close else ""


def convert(text: Any, known: Option) -> Any:
    """Return the value that `text` means for an option.

    Raises:
        ValueError: it fits none of the option's types; the message says what is expected.
    """
    kinds = _kinds(known.hint)
    for kind in kinds:
        try:
            value = _as(kind, text)
        except (ValueError, KeyError):
            continue
        if not known.choices or value is None or value in known.choices:
            return value
    if text == []:
        raise ValueError("needs a value")
    expected = type_in_words(known)
    if len(expected) > _LONGEST_LIST:
        expected = f"{expected[:_LONGEST_LIST].rpartition(',')[0]} ... (see --help-all)"
    raise ValueError(f"expected {expected}, not {_shown(text)}")


def type_in_words(known: Option) -> str:
    """Return what an option takes: "an integer or null", "one of nll, dft" ..."""
    if known.choices:
        return _one_of(known.choices)
    return " or ".join(map(_in_words, reversed(_kinds(known.hint))))


_LONGEST_LIST = 150
_PREFERENCE = (types.NoneType, bool, int, float, Literal, Enum, dict, str, list)
_BOOLEANS = {
    **dict.fromkeys(("true", "yes", "on", "1"), True),
    **dict.fromkeys(("false", "no", "off", "0"), False),
}


def _kinds(hint: Any) -> list[Any]:
    """Return the members of a union, the narrowest first; an enum leaves no room for free text."""
    kinds = list(get_args(hint)) if get_origin(hint) in (Union, types.UnionType) else [hint]
    if any(_family(kind) is Enum for kind in kinds):
        kinds = [kind for kind in kinds if kind is not str]
    return sorted(kinds, key=lambda kind: _PREFERENCE.index(_family(kind)))


def _family(kind: Any) -> Any:
    origin = get_origin(kind) or kind
    return Enum if isinstance(origin, type) and issubclass(origin, Enum) else origin


def _as(kind: Any, text: Any) -> Any:
    """Return `text` as one kind of value, or raise ValueError or KeyError."""
    family = _family(kind)
    if family is types.NoneType:
        return {None: None, "null": None}[_hashable(text)]
    if family is bool:
        return text == [] or _BOOLEANS[_scalar(text).lower()]
    if family is dict:
        return _as_mapping(text)
    if family is list:
        return (
            [_scalar(item) for item in text] if isinstance(text, list) and text else [_scalar(text)]
        )
    if family is Enum:
        return kind(_scalar(text)).value
    if family is Literal:
        return {str(choice): choice for choice in get_args(kind)}[_scalar(text)]
    return kind(_scalar(text))


def _scalar(text: Any) -> str:
    if not isinstance(text, str):
        raise ValueError("not one value")
    return text


def _hashable(text: Any) -> Any:
    return text if text is None else _scalar(text)


def _as_mapping(text: Any) -> dict[str, Any]:
    value = _mapping(text) if isinstance(text, str) and text.startswith("{") else text
    if not isinstance(value, dict):
        raise ValueError("not a mapping")
    return value


def _in_words(kind: Any) -> str:
    family = _family(kind)
    if family is Enum:
        return _one_of(member.value for member in kind)
    if family is Literal:
        return _one_of(get_args(kind))
    return {
        types.NoneType: "null",
        bool: "true or false",
        int: "an integer",
        float: "a number",
        dict: "a mapping",
        list: "a list of texts",
        str: "a text",
    }[family]


def _one_of(choices: Iterable[Any]) -> str:
    return f"one of {', '.join(map(str, choices))}"


def _shown(text: Any) -> str:
    if isinstance(text, list):
        return f"{len(text)} values ({', '.join(map(str, text))})"
    return "null" if text is None else repr(text)
