"""lm-eval tasks for local files and generators; prompts are those of training."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml

from depthmix.data.files import read_items
from depthmix.data.gym import first_line, is_gym, verify
from depthmix.data.load import load_questions
from depthmix.data.overlap import find_overlap
from depthmix.data.template import TEMPLATES, Template
from depthmix.errors import ConfigError, DataError
from depthmix.evaluate.answers import (
    label_is_right,
    last_number,
    letter_is_right,
    number_is_right,
)

Document = dict[str, Any]
Scoring = Literal["generate", "likelihood"]

ACCURACY, CLEAN = "accuracy", "clean_accuracy"
# The name of `CHAT` among the templates.
CHAT_NAME = "chat"
# The user's message of a question: the model's own chat template goes around it.
CHAT = Template(lambda instruction, context: f"{instruction}\n{context}".rstrip("\n"), gap="")
# Where a reply of a model that does not stop goes on to another question.
STOPS = ["Question:", "### Instruction", "Below is an instruction"]


@dataclass(frozen=True)
class Kind:
    """How the replies of a task are read; see tasks.yaml."""

    answer: Literal["number", "letter", "label", "verified"] = "number"
    labels: list[str] = field(default_factory=list)
    harness: str | None = None


def known_tasks() -> dict[str, Kind]:
    """Return the tasks of tasks.yaml by name."""
    path = Path(__file__).with_name("tasks.yaml")
    return {name: Kind(**entry) for name, entry in yaml.safe_load(path.read_text()).items()}


@dataclass(frozen=True)
class LocalTask:
    """Documents of one task and how they are scored.

    Attributes:
        name: what the results are called.
        documents: prompt, answer, whether the question is clean, and what the scoring needs.
        template: the template that made the prompts.
        is_right: (reply, document) -> whether it is right.
        labels: the answers to choose from, for scoring by likelihood.
    """

    name: str
    documents: list[Document]
    template: Template
    is_right: Callable[[str, Document], bool]
    labels: list[str]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Accuracy, and that on clean questions where some are not."""
        return (ACCURACY,) if all(d["clean"] for d in self.documents) else (ACCURACY, CLEAN)

    def marks(self, document: Document, right: bool) -> dict[str, float]:
        """Return the mark of a reply under the name of every metric that it counts for."""
        counted = self.metrics if document["clean"] else (ACCURACY,)
        return dict.fromkeys(counted, float(right))


def local_task(
    name: str, source: str, template: str | None, train_data: Sequence[str] | None
) -> LocalTask:
    """Return the task of that name on a file, or on a generator of reasoning-gym.

    Args:
        name: key of tasks.yaml; for a generator, its source is the name.
        source: file, folder or `reasoning_gym:...`.
        template: key of `TEMPLATES`, or chat; None for the format's own.
        train_data: where training questions stand, which are not clean to test on.

    Raises:
        ConfigError: the name is unknown.
        DataError: rows are missing or broken; names file and line.
    """
    if is_gym(source):
        rows = [item.row for item in read_items([source], "test", None)]
        questions, format = load_questions([source])
        # As text: the entries of a generator differ in their fields.
        extra = [{"entry": json.dumps(row["entry"])} for row in rows]
        kind, is_right = Kind(answer="verified"), partial(_verified, source)
    else:
        kind = known_tasks().get(name) or _unknown(name)
        questions, format = load_questions([source])
        extra, is_right = [{} for _ in questions], partial(_matches, kind)
    form = {**TEMPLATES, CHAT_NAME: CHAT}[template] if template else format.template_named(None)
    shared = [False] * len(questions)
    if train_data:
        shared = list(find_overlap(load_questions(train_data, split="train")[0], questions).shared)
    documents = [
        {
            "prompt": form.prompt(question.instruction, question.context),
            "answer": _checked(question.answer, kind, f"{source}: question {number}"),
            "clean": not also_trained,
            **more,
        }
        for number, (question, also_trained, more) in enumerate(
            zip(questions, shared, extra, strict=True), 1
        )
    ]
    return LocalTask(name, documents, form, is_right, kind.labels)


def harness_config(task: LocalTask, scoring: Scoring, max_new_tokens: int) -> dict[str, Any]:
    """Return lm-eval's configuration of a local task.

    Raises:
        ConfigError: likelihood is asked for, but there are no answers to choose from.
    """
    from datasets import Dataset

    config: dict[str, Any] = {
        "task": task.name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(task.documents)},
        "test_split": "test",
        "doc_to_text": _prompt,
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [
            {"metric": metric, "aggregation": "mean", "higher_is_better": True}
            for metric in task.metrics
        ],
        "metadata": {"version": 1.0},
    }
    if scoring == "generate":
        return config | {
            "output_type": "generate_until",
            "doc_to_target": lambda document: document["answer"],
            "generation_kwargs": {
                "until": STOPS,
                "do_sample": False,
                "max_gen_toks": max_new_tokens,
            },
            "process_results": partial(_score_reply, task),
        }
    if not task.labels:
        raise ConfigError(f"task {task.name}: there are no labels to choose from by likelihood")
    return config | {
        "output_type": "multiple_choice",
        "doc_to_choice": lambda document: [
            task.template.completion(f"the correct answer is {label}") for label in task.labels
        ],
        "doc_to_target": lambda document: task.labels.index(document["answer"]),
        "process_results": partial(_score_likelihoods, task),
    }


def _prompt(document: Document) -> str:
    return str(document["prompt"])


def _score_reply(task: LocalTask, document: Document, replies: list[str]) -> dict[str, float]:
    return task.marks(document, task.is_right(replies[0], document))


def _score_likelihoods(
    task: LocalTask, document: Document, likelihoods: list[tuple[float, bool]]
) -> dict[str, float]:
    best = max(range(len(likelihoods)), key=lambda i: likelihoods[i][0])
    return task.marks(document, task.labels[best] == document["answer"])


def _matches(kind: Kind, reply: str, document: Document) -> bool:
    answer = str(document["answer"])
    if kind.answer == "number":
        return number_is_right(reply, answer)
    compare = letter_is_right if kind.answer == "letter" else label_is_right
    return compare(reply, answer, kind.labels)


def _verified(source: str, reply: str, document: Document) -> bool:
    """Ask the generator's own verifier; the reply ends with its first line."""
    return verify(source, first_line(reply), json.loads(document["entry"])) == 1.0


def _checked(answer: str, kind: Kind, place: str) -> str:
    """Return the answer as its task writes it: a label in its own letters, whatever the case.

    Raises:
        DataError: no reply could be right: the answer is no number, or none of the labels.
    """
    if kind.labels:
        written = {label.casefold(): label for label in kind.labels}
        if answer.casefold() not in written:
            raise DataError(
                f"{place}: the answer {answer!r} is none of the labels {', '.join(kind.labels)}"
            )
        return written[answer.casefold()]
    if kind.answer == "number" and last_number(answer) is None:
        raise DataError(f"{place}: the answer {answer!r} holds no number")
    return answer


def _unknown(name: str) -> Kind:
    raise ConfigError(f"unknown task {name}; tasks are {', '.join(known_tasks())}")
