"""depthmix's own options of `depthmix train`: a new one is a field here, with its help and checks.

Ranges of numbers and paths are in `train/values.py`, the groups of the help in
`commands/train_help.py`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from depthmix.data.conversation import Supervise
from depthmix.data.formats import FORMAT_NAMES
from depthmix.data.template import TEMPLATES
from depthmix.errors import ConfigError, shown

Method = Literal["lora", "dora", "ia3", "vera", "prompt_tuning", "full", "none"]
Objective = Literal["sft", "dpo", "grpo"]
RESTRICTABLE = ("lora", "dora", "ia3", "vera")  # to some of the layers


def _help(text: str) -> dict[str, str]:
    return {"help": text}


_DEPTH = re.compile(r"all|half|[1-9]\d{0,5}|0?\.\d{0,6}[1-9]\d{0,6}|1\.0")


@dataclass(frozen=True)
class RunOptions:
    """What `depthmix train` adds to MoDE's and TRL's own options.

    The help text of every field stands in its metadata, where the command line reads it.
    """

    objective: Objective = field(
        default="sft",
        metadata=_help(
            "What is learned from: sft: answers; dpo: pairs of a chosen and a rejected answer; "
            "grpo: rewards of answers that the model gives. By TRL's trainer of that name, with "
            "its options."
        ),
    )
    reward: list[str] | None = field(
        default=None,
        metadata=_help(
            "What grpo rewards: number:COLUMN or exact:COLUMN (the answer in a column), "
            "regex:PATTERN ({COLUMN} stands for a column's text), reasoning_gym (the generator's "
            "verifier; the default of its data) or MODULE:FUNCTION. Several add up."
        ),
    )
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
    dataset_format: str = field(
        default="auto",
        metadata={
            "help": "Kind of the rows. Default: told from their columns.",
            "choices": FORMAT_NAMES,
        },
    )
    dataset_template: str | None = field(
        default=None,
        metadata={
            "help": "Form of the prompts, for rows that are questions. Default: alpaca for "
            "instruction + output, question for the others.",
            "choices": tuple(TEMPLATES),
        },
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
            "all (default), or auto, as `depthmix probe` recommends. No backward pass runs below "
            "them. Apart from k."
        ),
    )
    budget: Literal["full", "half", "light"] | None = field(
        default=None,
        metadata=_help(
            "How much to tune: full: all layers, rank 16; half: the upper half; light: rank 1 on "
            "the upper half. Sets tuned_layers, lora_r, lora_alpha and the default of "
            "learning_rate, each unless it is given."
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
            "Stop after so many evaluations without a better eval_loss (grpo: eval_reward; or "
            "metric_for_best_model), and take the best checkpoint."
        ),
    )
    eval_accuracy: int | None = field(
        default=None,
        metadata=_help(
            "Answer so many evaluation rows by generation at each evaluation, logged as "
            "eval_accuracy."
        ),
    )
    calibrate: bool = field(
        default=False,
        metadata=_help(
            "After training, fit a temperature on the evaluation rows, which generate, chat and "
            "eval then apply; greedy answers stay what they are."
        ),
    )
    resume: bool = field(
        default=False, metadata=_help("Go on from the last checkpoint in output_dir.")
    )
    overwrite: bool = field(default=False, metadata=_help("Replace the run that output_dir holds."))

    @property
    def evaluates(self) -> bool:
        """Whether there is data to evaluate on."""
        return bool(self.eval_dataset) or self.validation_split is not None

    @property
    def tunes_many_layers(self) -> bool:
        """Whether the backward pass goes below the late layers, and makes activations again."""
        return not self.late_layers_only and self.method != "none"

    def __post_init__(self) -> None:
        if self.method == "none" and not self.mode:
            raise ConfigError("method none trains MoDE alone; with mode false nothing is trained")
        if self.budget and self.method not in ("lora", "dora"):
            raise ConfigError(f"budget {self.budget} needs method lora or dora, not {self.method}")
        self._check_depth()
        if self.resume and self.overwrite:
            raise ConfigError("resume and overwrite exclude each other")
        self._check_data()

    def _check_depth(self) -> None:
        if self.late_layers_only and self.tuned_layers is not None:
            raise ConfigError("late_layers_only is short for tuned_layers = k: give one of them")
        name = "late_layers_only" if self.late_layers_only else "tuned_layers"
        restricted = self.late_layers_only or self.tuned_layers is not None
        if restricted and self.method not in RESTRICTABLE:
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
