"""Run lm-eval on a model: batched, cached, with standard errors and every reply kept."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from datasets.exceptions import DatasetNotFoundError
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import Tensor, nn
from transformers import set_seed

from depthmix.errors import DataError
from depthmix.evaluate.confidence import add_confidence, reliability_of
from depthmix.evaluate.replies import ReplyFile, ReplyingLM
from depthmix.evaluate.tasks import CLEAN, LocalTask, Scoring, harness_config
from depthmix.inference.form import appends_eos

Results = dict[str, Any]


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[LocalTask | str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    scoring: Scoring = "generate",
    max_new_tokens: int = 128,
    cache: Path | None = None,
    chat: bool = False,
) -> tuple[dict[str, Results], dict[str, list[Results]]]:
    """Score a model, MoDE attached or not.

    Args:
        model: a causal language model, PEFT-wrapped or not, on its device.
        tokenizer: its tokenizer.
        tasks: local tasks, or names of lm-eval's own.
        batch_size: requests at a time; a batch gives what single requests give.
        limit: documents of each task; None for all.
        scoring: generate a reply and read its answer, or compare likelihoods of the answers.
        max_new_tokens: length of a reply at most.
        cache: file for the replies so far (JSON lines); a run that was stopped goes on from it. It
            belongs to one model.
        chat: put every question into the tokenizer's chat template, as a user's message.

    Returns:
        Figures by task, each with its standard error, the expected calibration error of the answers
        among them, and every document with its reply and the model's confidence in it, by task.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant here
    model.eval()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    device = next(model.parameters()).device
    lm: Any = _PromptedLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        device=str(device),
        # A chat template writes BOS itself, where training had one.
        add_bos_token=False if chat else None,
    )
    answering = lm if cache is None else ReplyingLM(lm, ReplyFile(cache))
    try:
        # What lm-eval calls simple_evaluate asks git for a commit, of whatever folder this is.
        found: Any = evaluator.evaluate(
            lm=answering,
            task_dict=_loaded(tasks, scoring, max_new_tokens),
            limit=limit,
            bootstrap_iters=1000,
            apply_chat_template=chat,
        )
    except (OSError, DatasetNotFoundError) as error:  # of lm-eval's own tasks: data on the hub
        raise DataError(f"the data of a task cannot be loaded: {error}") from error
    figures = {
        name: {
            key.partition(",")[0]: value
            for key, value in row.items()
            if isinstance(value, (int, float))
        }
        for name, row in found["results"].items()
    }
    samples = {name: [_kept(row) for row in rows] for name, rows in found["samples"].items()}
    for name, rows in samples.items():
        add_confidence(answering, rows)
        _count(figures[name], rows)
    return figures, samples


def _loaded(tasks: Sequence[LocalTask | str], scoring: Scoring, max_new_tokens: int) -> Any:
    """Return tasks as lm-eval's evaluation takes them, examples drawn by its default seeds."""
    set_seed(_SEED)
    random.seed(0)
    manager = _task_manager(any(isinstance(task, str) for task in tasks))
    loaded = manager.load(
        [
            task
            if isinstance(task, str)
            else ConfigurableTask(config=harness_config(task, scoring, max_new_tokens))
            for task in tasks
        ]
    )
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
    return loaded


_SEED = 1234


def harness_tasks() -> Iterable[str]:
    """Return the names that lm-eval knows: its tasks, groups and tags."""
    names: Iterable[str] = _task_manager(True).all_tasks
    return names


@lru_cache
def _task_manager(with_own: bool) -> TaskManager:
    """Return lm-eval's finder of tasks, which reads thousands of files for its own."""
    return TaskManager(include_defaults=with_own)


class _PromptedLM(HFLM):  # type: ignore[misc]
    """lm-eval's model, with progress bars at a terminal alone.

    A tokenizer that ends every text with EOS does not end prompts with it.
    """

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        replies: list[str] = super().generate_until(requests, disable_tqdm or _is_logged())
        return replies

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        likelihoods: list[tuple[float, bool]] = super().loglikelihood(
            requests, disable_tqdm or _is_logged()
        )
        return likelihoods

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        likelihoods: list[float] = super().loglikelihood_rolling(
            requests, disable_tqdm or _is_logged()
        )
        return likelihoods

    def tok_encode(self, string: str, *args: Any, **options: Any) -> list[int]:
        ids: list[int] = super().tok_encode(string, *args, **options)
        return ids[:-1] if self._appends_eos and ids[-1:] == [self.eot_token_id] else ids

    def tok_batch_encode(self, strings: Sequence[str], *args: Any, **options: Any) -> Any:
        ids: Tensor
        ids, mask = super().tok_batch_encode(strings, *args, **options)
        if self._appends_eos and bool((ids[:, -1] == self.eot_token_id).all()):
            return ids[:, :-1], mask[:, :-1]  # padded on the left, so that all end together
        return ids, mask

    @property
    def _appends_eos(self) -> bool:
        return appends_eos(self.tokenizer)


def _is_logged() -> bool:
    """Whether what is said goes to a file, where a bar is drawn over and over."""
    return not sys.stderr.isatty()


def _kept(sample: Results) -> Results:
    """Return what is worth keeping of a sample: the prompt, the reply, the marks."""
    document = sample["doc"]
    kept = {
        "prompt": sample["arguments"][0][0],
        "answer": str(sample["target"]),
        "replies": sample["resps"][0] if len(sample["resps"]) == 1 else sample["resps"],
    }
    marks = {name: sample[name] for name in sample["metrics"]}
    return {**kept, "clean": document.get("clean", True), **marks}


def _count(figures: Results, rows: list[Results]) -> None:
    reliability = reliability_of(rows)
    if reliability is not None:
        figures["ece"] = reliability.error
    figures["questions"] = len(rows)
    if CLEAN in figures:
        figures["clean_questions"] = sum(row["clean"] for row in rows)
