"""What an objective hands to its trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from depthmix.train.objectives.reward_figures import RewardFigures


@dataclass(frozen=True)
class Prepared:
    """The data of a run, and what else its trainer takes.

    Attributes:
        train: rows to train on, in the columns of TRL's trainer.
        evaluation: rows to evaluate on, or None.
        format: the format of the rows, by which the tuned model is prompted.
        tokenizer: the tokenizer.
        notes: what there is to say about the rows.
        prompts: token ids of the prompts, where the model is to answer them; None where the rows
            have their ids.
        further: arguments of the trainer beside model, options, rows and tokenizer.
        figures: what adds to the trainer's logs, ahead of all who read them.
    """

    train: Dataset
    evaluation: Dataset | None
    format: str
    tokenizer: PreTrainedTokenizerBase
    notes: list[str] = field(default_factory=list)
    prompts: list[list[int]] | None = None
    further: dict[str, Any] = field(default_factory=dict)
    figures: RewardFigures | None = None
