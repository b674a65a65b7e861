"""The standard error of the mean reward, beside TRL's figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import torch
from accelerate.utils import reduce
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from depthmix.train.objectives.rewards import Marks, Reward, named_as_written


class RewardFigures(TrainerCallback):
    """Adds `reward_se` (`eval_reward_se`) to the logs.

    Answers to one prompt are alike, so that it is the spread of the prompts' mean rewards over the
    root of their number.

    Args:
        weights: of the rewards, as TRL adds them up.

    Attributes:
        trainer: whose rewards they are; set once there is one.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = list(weights)
        self._marks: list[Marks] = []  # of the answers that are scored just now, by reward
        self._means: dict[bool, list[float]] = {True: [], False: []}  # by whether in training
        self.trainer: Any = None

    def watching(self, rewards: Sequence[Reward]) -> list[Callable[..., Marks]]:
        """Return the functions of rewards for TRL, each of which notes what it gives."""
        return [self._watching(reward) for reward in rewards]

    def _watching(self, reward: Reward) -> Callable[..., Marks]:
        def score(**given: Any) -> Marks:
            marks = reward.score(**named_as_written(given))
            self._marks.append(marks)
            if len(self._marks) == len(self._weights):
                self._note(given["prompts"])
            return marks

        score.__name__ = reward.name  # what TRL calls it in the logs
        return score

    def _note(self, prompts: list[Any]) -> None:
        totals = [
            sum(w * (mark or 0.0) for w, mark in zip(self._weights, marks, strict=True))
            for marks in zip(*self._marks, strict=True)
        ]
        self._marks.clear()
        means = self._means[self.trainer.model.training]
        for _, group in groupby(zip(prompts, totals, strict=True), key=lambda pair: pair[0]):
            of_prompt = [total for _, total in group]
            means.append(sum(of_prompt) / len(of_prompt))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the figure since the last log, over all processes."""
        for name, training in (("reward", True), ("eval_reward", False)):
            if logs is not None and name in logs:
                error = _standard_error(self._means[training], args.device)
                self._means[training].clear()
                if error is not None:
                    logs[f"{name}_se"] = error
                    state.log_history[-1][f"{name}_se"] = error


def _standard_error(means: list[float], device: torch.device) -> float | None:
    """Return the standard error of the mean, over all processes; None of a single value."""
    values = torch.tensor(means, dtype=torch.float64)
    sums = torch.stack([torch.tensor(float(len(values))), values.sum(), (values**2).sum()])
    count, total, squares = reduce(sums.float().to(device), reduction="sum").tolist()
    if count < 2:
        return None
    variance = max(squares - total**2 / count, 0.0) / (count - 1)
    return float((variance / count) ** 0.5)
