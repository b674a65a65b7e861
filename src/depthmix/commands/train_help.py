"""The help of `depthmix train`: the options that matter at once, all of them on request."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args, get_origin

from depthmix.commands.parser import Parser
from depthmix.commands.trl_defaults import trl_defaults
from depthmix.config import MoDEConfig
from depthmix.train.arguments import all_options
from depthmix.train.objectives.options import OBJECTIVES
from depthmix.train.options import Option, options
from depthmix.train.run_options import RunOptions
from depthmix.train.typed import type_in_words

_SUMMARY = """\
Tune a causal language model with MoDE on a PEFT method, by TRL's SFTTrainer; with --objective dpo
or grpo on pairs of answers or on rewards, by TRL's trainer of that name and with its options.

Every option is a key of a YAML file and a flag; of several files the later one wins, and flags win
over files. Beside those below, every field of
MoDEConfig, trl.SFTConfig and trl.ModelConfig is accepted: `depthmix train --help-all` lists them.
"""

_EXAMPLES = """\
examples:
  depthmix train --model_name_or_path HuggingFaceTB/SmolLM2-135M --dataset train.jsonl \\
      --output_dir out
  depthmix train run.yaml                        keys from a file
  depthmix train run.yaml --k 4 --max_steps 100  a flag wins over the file
  depthmix train model.yaml task.yaml --seed 2   several files
  depthmix train run.yaml --preview              what would be learned; trains nothing
  depthmix train run.yaml --no_mode              the baseline: the tuning method alone
  depthmix train --objective grpo --model_name_or_path out --dataset train.jsonl \\
      --reward number:answer --output_dir rewarded     go on from out, by rewards
  depthmix train out/depthmix.yaml --resume      go on where a run was stopped
  accelerate launch -m depthmix train run.yaml   several devices

Ctrl-C finishes the step, saves a checkpoint and says how to go on.
"""

# TRL's options that most runs set. A default stands here only where it is depthmix's own.
_TRL_MODEL = {
    "model_name_or_path": "Folder or hub name of the base model. Required.",
    "dtype": "Of the base model: float32, bfloat16, auto. Default: by device and method.",
    "load_in_4bit": "Quantise the base model (needs bitsandbytes).",
    "trust_remote_code": "Run code that comes with the model.",
}
_TRL_OUTPUT = {"output_dir": "Folder for the adapter, checkpoints and depthmix.yaml. Required."}
LORA_HELP = {
    "lora_r": "Rank.",
    "lora_alpha": "Scale.",
    "lora_dropout": "Dropout.",
    "lora_target_modules": "Names of the modules to adapt. Default: all-linear.",
}
_TRL_TRAINING = {
    "learning_rate": "Of the tuning method. Default: 2e-4 for lora, by method for the others.",
    "num_train_epochs": "Passes over the data.",
    "max_steps": "Steps to train for, instead of epochs.",
    "per_device_train_batch_size": "Rows a step and device.",
    "gradient_accumulation_steps": "Steps to collect gradients over.",
    "lr_scheduler_type": "linear, cosine, constant ...",
    "warmup_steps": "Steps of warm-up; below 1: a share of all.",
    "max_length": "Tokens a row is cut to.",
    "packing": "Put several rows into one sequence.",
    "bf16": "Mixed precision. Default: where the device has it.",
    "gradient_checkpointing": "Save memory for time. Default: on an accelerator.",
    "logging_steps": "Steps from log to log.",
    "save_steps": "Steps from checkpoint to checkpoint. Default: one an epoch.",
    "eval_steps": "Steps from evaluation to evaluation. Default: one an epoch.",
    "seed": "Of adapters, order and dropout.",
}
_DATA = (
    *(
        "objective",
        "reward",
        "dataset",
        "dataset_weights",
        "dataset_config",
        "dataset_split",
        "dataset_format",
    ),
    *("dataset_template", "prompt_column", "completion_column", "messages_column"),
    *("supervise", "eval_dataset", "eval_split", "validation_split"),
)
CURATED = {**_TRL_MODEL, **_TRL_OUTPUT, **LORA_HELP, **_TRL_TRAINING}


def print_help() -> None:
    """Print the options that matter, without importing TRL."""
    own, mode = option_texts(RunOptions), option_texts(MoDEConfig)
    data = [name for name in own if name in _DATA]
    rates = ("router_learning_rate", "norm_learning_rate")
    during = ("early_stopping_patience", "eval_accuracy")
    run = ("preview", "resume", "overwrite")
    method = [name for name in own if name not in {*data, *rates, *run, *during}]
    groups = {
        "model": with_defaults(_TRL_MODEL),
        "data": {name: own[name] for name in data},
        "method": {**{name: own[name] for name in method}, **with_defaults(LORA_HELP)},
        "MoDE": {**mode, **{name: own[name] for name in rates}},
        "training": {**with_defaults(_TRL_TRAINING), **{name: own[name] for name in during}},
        "the run": {**_TRL_OUTPUT, **{name: own[name] for name in run}},
    }
    parser = Parser("train", _SUMMARY, _EXAMPLES, usage="[CONFIG.yaml ...] [--key value ...]")
    parser.add_argument("--help-all", action="store_true", help="list every option there is")
    add_texts(parser, groups)
    parser.print_help()


def with_defaults(texts: Mapping[str, str]) -> dict[str, str]:
    """Add TRL's defaults to help texts that tell none."""
    defaults = trl_defaults()
    return {
        name: text
        if "Default" in text or defaults.get(name) in (None, False, -1)
        else f"{text} Default: {defaults[name]}."
        for name, text in texts.items()
    }


def add_texts(parser: Parser, groups: Mapping[str, Mapping[str, str]]) -> None:
    """Add options to a parser for the sake of its help alone, {group: {name: help}}."""
    for title, texts in groups.items():
        group = parser.add_argument_group(title)
        for name, text in texts.items():
            group.add_argument(f"--{name}", metavar="", help=text.replace("%", "%%"))


def option_texts(cls: type[Any], names: Iterable[str] | None = None) -> dict[str, str]:
    """Return {name: help} of the fields of a dataclass, all or the named ones."""
    known = options(cls)
    return {name: _help(known[name]) for name in (known if names is None else names)}


def print_all_options() -> None:
    """Print every key with its type, default and help, grouped by where it comes from."""
    groups = all_options()
    shared = {name for group in groups.values() for name in group}
    for objective in OBJECTIVES[1:]:
        *_, (source, known) = all_options(objective).items()
        groups[f"{source}, beside those above"] = {
            name: option for name, option in known.items() if name not in shared
        }
    for source, known in groups.items():
        print(f"\n{source}\n{'-' * len(source)}")
        for option in known.values():
            print(f"  {option.name}: {type_in_words(option)}; default {option.default}")
            print(textwrap.indent(textwrap.fill(_plain(option.help), 90), "      "))


def _help(option: Option) -> str:
    """Return the help with the choices, and the default where the text does not tell it."""
    text = option.help
    if option.choices or get_origin(option.hint) is Literal:
        text += f" One of {', '.join(option.choices or get_args(option.hint))}."
    if option.default is not None and "Default" not in text and option.default is not False:
        text += f" Default: {str(option.default).lower()}."
    return text


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("%%", "%")
