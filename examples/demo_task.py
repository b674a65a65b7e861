"""The demo's tasks: questions from reasoning-gym, as rows to train on and to score.

Every question has one prompt, made here, for training and scoring alike. A reply is judged by
the verifier of the generator that made the question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import reasoning_gym

Row = dict[str, Any]

# reasoning-gym draws question i of a data set from the seed s + i: seeds 1 and 2 share all but one
# question. So the test seeds begin where no training set of this demo can reach.
_FIRST_TEST_SEED = 10_000_000


def _first_line(reply: str) -> str:
    return reply.strip().split("\n")[0].strip()


def _last_number(reply: str) -> str:
    """Return the last number of the first line: "2 + 3 = 5" counts as 5."""
    numbers = re.findall(r"-?\d+", _first_line(reply).replace(",", ""))
    return numbers[-1] if numbers else ""


@dataclass(frozen=True)
class Task:
    """A generator of reasoning-gym, its options, and how to read the answer in a reply."""

    generator: str
    options: dict[str, int]
    read: Callable[[str], str]

    def correct(self, reply: str, entry: Row) -> bool:
        """Whether the generator's verifier gives the reply full marks."""
        verify = reasoning_gym.get_score_answer_fn(self.generator)
        return bool(verify(self.read(reply), entry) == 1.0)


TASKS = {
    "sums": Task(
        "chain_sum",
        {"min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2},
        _last_number,
    ),
    "reversal": Task("word_sequence_reversal", {"min_words": 3, "max_words": 5}, _first_line),
}


def make_rows(task: Task, train: int, test: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Return training and test rows; no question stands twice, in either or in both."""
    seen: set[str] = set()
    training = list(islice(_new_rows(task, train, seed, seen), train))
    testing = list(islice(_new_rows(task, test, _FIRST_TEST_SEED + seed, seen), test))
    return training, testing


def write_rows(rows: Iterable[Row], path: Path) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def read_rows(path: Path) -> list[Row]:
    """Read JSON lines."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _new_rows(task: Task, count: int, seed: int, seen: set[str]) -> Iterator[Row]:
    """Yield rows whose question is not in `seen`, and add it there; enough to take `count`."""
    size = 3 * count + 100
    for entry in reasoning_gym.create_dataset(task.generator, size=size, seed=seed, **task.options):
        if entry["question"] not in seen:
            seen.add(entry["question"])
            # The blank goes with the answer, as it does where running text is tokenised.
            yield {
                "prompt": f"Question: {entry['question']}\nAnswer:",
                "completion": f" {entry['answer']}",
                "entry": entry,
            }
