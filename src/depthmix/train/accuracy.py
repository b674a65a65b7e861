"""Accuracy by generation during training: evaluation rows answered as the tuned model would."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from depthmix.data.tokens import IGNORED
from depthmix.errors import ConfigError
from depthmix.evaluate.answers import number_is_right

if TYPE_CHECKING:
    from transformers import Trainer


@dataclass(frozen=True)
class Asked:
    """A row without its last answer.

    Attributes:
        prompt: token ids up to the answer, as training has them.
        answer: token ids of what is to be learned.
    """

    prompt: list[int]
    answer: list[int]


class EvalAccuracy(TrainerCallback):
    """Adds `eval_accuracy` to the figures of every evaluation.

    A reply is right if it is the row's answer, or, where that ends with a number, if its last
    number is the same one. Decoding is greedy, up to twice as long as the longest answer.

    Args:
        trainer: with evaluation rows; each process answers its share.
        count: rows to answer, the first ones that are whole.

    Raises:
        ConfigError: the rows have no prompts, or the model is spread over processes.
    """

    def __init__(self, trainer: Trainer, count: int) -> None:
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ConfigError("eval_accuracy: a model that is sharded over processes cannot answer")
        rows: Any = trainer.eval_dataset
        limit: int | None = trainer.args.max_length  # type: ignore[attr-defined]
        whole = (asked(row) for row in rows if limit is None or len(row["input_ids"]) < limit)
        self._rows = [row for row, _ in zip(whole, range(count), strict=False)]
        if not all(row.prompt for row in self._rows) or not self._rows:
            raise ConfigError(
                "eval_accuracy needs evaluation rows with prompt and answer that fit max_length"
            )
        self._trainer = trainer
        self._longest = 2 * max(len(row.answer) for row in self._rows)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Answer, where the figures of an evaluation are logged."""
        if logs is not None and "eval_loss" in logs:
            logs["eval_accuracy"] = self.measure()
            state.log_history[-1]["eval_accuracy"] = logs["eval_accuracy"]

    def measure(self) -> float:
        """Return the share of rows that are answered rightly."""
        accelerator, size = self._trainer.accelerator, self._trainer.args.per_device_eval_batch_size
        mine = self._rows[accelerator.process_index :: accelerator.num_processes]
        batches = [mine[start : start + size] for start in range(0, len(mine), size)]
        right = torch.tensor(sum(map(self._right, batches)), device=accelerator.device)
        return int(accelerator.reduce(right, "sum")) / len(self._rows)

    def _right(self, rows: list[Asked]) -> int:
        tokenizer: Any = self._trainer.processing_class
        replies = self._replies(rows, tokenizer)
        wanted = tokenizer.batch_decode([row.answer for row in rows], skip_special_tokens=True)
        return sum(is_right(reply, answer) for reply, answer in zip(replies, wanted, strict=True))

    def _replies(self, rows: list[Asked], tokenizer: Any) -> list[str]:
        model: Any = self._trainer.model
        pad = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
        width = max(len(row.prompt) for row in rows)
        ids = torch.tensor([[pad] * (width - len(r.prompt)) + r.prompt for r in rows])
        mask = torch.tensor([[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in rows])
        model.eval()
        with torch.no_grad(), self._trainer.accelerator.autocast():
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=self._longest,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                use_cache=True,
                pad_token_id=pad,
                eos_token_id=tokenizer.eos_token_id,
            )
        return list(tokenizer.batch_decode(output[:, width:], skip_special_tokens=True))


def asked(row: dict[str, Any]) -> Asked:
    """Take the last answer off a row: the last run of supervised tokens."""
    ids, labels = row["input_ids"], row["labels"]
    end = max((i for i, label in enumerate(labels) if label != IGNORED), default=-1) + 1
    start = end
    while start > 0 and labels[start - 1] != IGNORED:
        start -= 1
    return Asked(list(ids[:start]), list(ids[start:end]))


def is_right(reply: str, answer: str) -> bool:
    """Compare a reply with the answer of a row; see `EvalAccuracy`."""
    if re.search(r"\d[\s.!%]*$", answer):
        return number_is_right(reply, answer)
    return reply.split() == answer.split()
