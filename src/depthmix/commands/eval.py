"""`depthmix eval`: score a base model or a tuned one with lm-eval."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmix.commands.parser import Parser
from depthmix.errors import ConfigError
from depthmix.files import write_text
from depthmix.pretrained import (
    is_saved,
    load_base_for_use,
    load_tuned,
    trained_on,
    weight_files,
)

if TYPE_CHECKING:
    from depthmix.evaluate.tasks import LocalTask

PACKAGES = ("depthmix", "lm_eval", "torch", "transformers", "peft")

_EXAMPLES = """\
A task is NAME=SOURCE, a local file in the format of LLM-Adapters, GSM8K or MAWPS; NAME alone, which
lm-eval loads from the hub; or a generator of reasoning-gym, scored by its own verifier.

examples:
  depthmix eval out --tasks mawps=mawps_test.json --train-data mawps_train.json
  depthmix eval out --tasks boolq=boolq_test.json --scoring likelihood --limit 200
  depthmix eval out --tasks "reasoning_gym:chain_sum?size=200&seed=9000000"
  depthmix eval HuggingFaceTB/SmolLM2-135M-Instruct --tasks gsm8k arc_easy

With --output, what was scored stays when the run is stopped, and the next run goes on from there.
"""


def run(argv: Sequence[str]) -> int:
    """Score, print and write."""
    arguments = _parser().parse_args(argv)
    if find_spec("lm_eval") is None:
        raise ConfigError("depthmix eval needs lm-eval: pip install 'depthmix[eval]'")
    template = _template(arguments)
    tasks = [_task(text, template, arguments.train_data) for text in arguments.tasks]
    from transformers.utils import logging

    from depthmix.evaluate.harness import evaluate

    load = load_tuned if is_saved(arguments.target) else load_base_for_use
    logging.disable_progress_bar()
    model, tokenizer = load(arguments.target, arguments.model)
    figures, samples = evaluate(
        model,
        tokenizer,
        tasks,
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        scoring=arguments.scoring,
        max_new_tokens=arguments.max_new_tokens,
        cache=_cache(arguments) if arguments.output else None,
    )
    _print(figures)
    if arguments.output:
        _write(Path(arguments.output), arguments, figures, samples)
    return 0


def _parser() -> Parser:
    parser = Parser("eval", "Score a model with lm-eval.", _EXAMPLES)
    add = parser.add_argument
    add("target", metavar="TARGET", help="base model, or output folder of `depthmix train`")
    add("--tasks", nargs="+", required=True, metavar="TASK", help="what to score on")
    add("--model", metavar="NAME", help="base model (default: the one that the adapter names)")
    add("--train-data", nargs="+", metavar="FILE", help="find test questions that stand in there")
    add("--template", choices=["alpaca", "question"], help="prompts (default: as in training)")
    add("--scoring", choices=["generate", "likelihood"], default="generate", help="of local files")
    add("--batch-size", type=int, default=8, help="questions at a time (default: 8)")
    add("--limit", type=int, help="questions of each task (default: all)")
    add("--max-new-tokens", type=int, default=128, help="of a reply (default: 128)")
    add("--output", metavar="FOLDER", help="write figures and every reply there")
    return parser


def _template(arguments: argparse.Namespace) -> str | None:
    """Return the template asked for, or the one that the target was tuned with."""
    if arguments.template or not is_saved(arguments.target):
        return arguments.template  # type: ignore[no-any-return]
    from depthmix.data.formats import FORMATS

    row_format, template = trained_on(arguments.target)
    return template or FORMATS[row_format].template


def _task(text: str, template: str | None, train_data: list[str] | None) -> LocalTask | str:
    """Return a local task, or the name of lm-eval's own."""
    from depthmix.data.gym import is_gym
    from depthmix.evaluate.tasks import known_tasks, local_task

    name, _, source = text.partition("=")
    if is_gym(text):
        return local_task(text, text, template, None)
    if source:
        task = local_task(name, source, template, train_data)
        if train_data:
            shared = sum(not document["clean"] for document in task.documents)
            print(f"{name}: {shared} of {len(task.documents)} questions stand in the training data")
        return task
    known = known_tasks().get(name)
    if known is not None and known.harness is None:
        raise ConfigError(f"task {name}: lm-eval has no such task; give a file: {name}=FILE")
    return name if known is None or known.harness is None else known.harness


def _cache(arguments: argparse.Namespace) -> Path:
    """Return a file that belongs to this target as it is now."""
    stamps = [[path.name, path.stat().st_mtime_ns] for path in weight_files(arguments.target)]
    identity = json.dumps([arguments.target, arguments.model, stamps])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:12]
    return Path(arguments.output) / "cache" / f"{digest}.jsonl"


def _print(figures: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("task", "metric", "value", "± standard error", "questions")
    for task, row in figures.items():
        for name, value in row.items():
            if name in ("questions", "clean_questions", "sample_len") or name.endswith("_stderr"):
                continue
            count = row["clean_questions" if name.startswith("clean_") else "questions"]
            error = row.get(f"{name}_stderr")
            shown = f"{error:.4f}" if isinstance(error, float) else ""
            table.add_row(task, name, f"{value:.4f}", shown, str(count))
    Console().print(table)


def _write(
    folder: Path,
    arguments: argparse.Namespace,
    figures: dict[str, dict[str, Any]],
    samples: dict[str, list[dict[str, Any]]],
) -> None:
    made_by = {
        "command": " ".join(["depthmix", *sys.argv[1:]]),
        "options": vars(arguments),
        "versions": {name: version(name) for name in PACKAGES},
    }
    for task, rows in samples.items():
        name = "".join(letter if letter.isalnum() else "_" for letter in task)
        write_text(folder / f"samples-{name}.jsonl", "\n".join(map(json.dumps, rows)))
    write_text(
        folder / "results.json", json.dumps({"results": figures, "made_by": made_by}, indent=1)
    )
    print(f"figures and replies: {folder}")
