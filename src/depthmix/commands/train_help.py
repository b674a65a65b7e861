"""The help of `depthmix train`: the options that matter at once, all of them on request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from depthmix.commands.parser import Parser
from depthmix.config import MoDEConfig
from depthmix.train.arguments import Option, RunOptions, all_options, options, type_in_words

_SUMMARY = """\
Tune a causal language model with MoDE on a PEFT method, by TRL's SFTTrainer.

Every option is a key of the YAML file and a flag; flags win. Beside those below, every field of
MoDEConfig, trl.SFTConfig and trl.ModelConfig is accepted: `depthmix train --help-all` lists them.
"""

_EXAMPLES = """\
examples:
  depthmix train --model_name_or_path HuggingFaceTB/SmolLM2-135M --dataset train.jsonl \\
      --output_dir out
  depthmix train run.yaml                        keys from a file
  depthmix train run.yaml --k 4 --max_steps 100  a flag wins over the file
  depthmix train run.yaml --no_mode              the baseline: the tuning method alone
  depthmix train out/depthmix.yaml --resume      go on where a run was stopped
  accelerate launch -m depthmix train run.yaml   several devices

Ctrl-C finishes the step, saves a checkpoint and says how to go on.
"""

_RUN = ("output_dir", "resume", "overwrite")
_DATA = (
    "dataset",
    "dataset_config",
    "dataset_split",
    "dataset_format",
    "eval_dataset",
    "eval_split",
)
_METHOD = ("method", "mode", "late_layers_only", "num_virtual_tokens", "vera_r")
_RATES = ("router_learning_rate", "norm_learning_rate")

# TRL's options that most runs set; TRL itself is not imported for a help text.
_TRL_MODEL = {
    "model_name_or_path": "Folder or hub name of the base model. Required.",
    "dtype": "Of the base model: float32, bfloat16, auto. Default: by device and method.",
    "load_in_4bit": "Quantise the base model (needs bitsandbytes).",
    "trust_remote_code": "Run code that comes with the model.",
}
_TRL_OUTPUT = {"output_dir": "Folder for the adapter, checkpoints and depthmix.yaml. Required."}
_TRL_LORA = {
    "lora_r": "Rank. Default: 16.",
    "lora_alpha": "Scale. Default: 32.",
    "lora_dropout": "Dropout. Default: 0.05.",
    "lora_target_modules": "Names of the modules to adapt. Default: all-linear.",
}
_TRL_TRAINING = {
    "learning_rate": "Of the tuning method. Default: 2e-4 for lora, by method for the others.",
    "num_train_epochs": "Passes over the data. Default: 3.",
    "max_steps": "Steps to train for, instead of epochs.",
    "per_device_train_batch_size": "Rows a step and device. Default: 8.",
    "gradient_accumulation_steps": "Steps to collect gradients over. Default: 1.",
    "lr_scheduler_type": "linear, cosine, constant ... Default: linear.",
    "warmup_steps": "Steps of warm-up; below 1: a share of all. Default: 0.",
    "max_length": "Tokens a row is cut to. Default: 1024.",
    "packing": "Put several rows into one sequence.",
    "bf16": "Mixed precision. Default: where the device has it.",
    "gradient_checkpointing": "Save memory for time. Default: on an accelerator.",
    "logging_steps": "Steps from log to log. Default: 10.",
    "save_steps": "Steps from checkpoint to checkpoint. Default: one an epoch.",
    "eval_steps": "Steps from evaluation to evaluation. Default: one an epoch.",
    "seed": "Default: 42.",
}
CURATED = {**_TRL_MODEL, **_TRL_OUTPUT, **_TRL_LORA, **_TRL_TRAINING}


def print_help() -> None:
    """Print the options that matter, without importing TRL."""
    own, method = options(RunOptions), options(MoDEConfig)
    parser = Parser("train", _SUMMARY, _EXAMPLES, usage="[CONFIG.yaml] [--key value ...]")
    parser.add_argument("--help-all", action="store_true", help="list every option that is accepted")
    _add_texts(parser, "model", _TRL_MODEL)
    _add_options(parser, "data", (own[name] for name in _DATA))
    _add_options(parser, "method", (own[name] for name in _METHOD))
    _add_texts(parser, "lora and dora", _TRL_LORA)
    _add_options(parser, "MoDE", (*method.values(), *(own[name] for name in _RATES)))
    _add_texts(parser, "training (of trl.SFTConfig)", _TRL_TRAINING)
    _add_texts(parser, "the run", _TRL_OUTPUT)
    _add_options(parser, "the run, once more", (own[name] for name in ("resume", "overwrite")))
    parser.print_help()


def print_all_options() -> None:
    """Print every key with its type, default and help, grouped by where it comes from."""
    for source, known in all_options().items():
        print(f"\n{source}\n{'-' * len(source)}")
        for option in known.values():
            print(f"  {option.name} ({type_in_words(option)}; default {option.default})")
            print(f"      {' '.join(option.help.split()).replace('%%', '%')}")
