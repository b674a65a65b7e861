"""`depthmix eval`: score a base model or a tuned one with lm-eval."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmix.carry.saved_run import SavedRun
from depthmix.commands.model_options import add_model_options, find_run, loading
from depthmix.commands.parser import Parser, integer, output_file, require_matplotlib
from depthmix.data.template import TEMPLATES
from depthmix.errors import ConfigError, nearest
from depthmix.files import write_text
from depthmix.inference.form import Form, require_chat_template
from depthmix.provenance import command, versions

if TYPE_CHECKING:
    from depthmix.evaluate.tasks import LocalTask

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
    if arguments.plot:
        require_matplotlib("--plot")
    if find_spec("lm_eval") is None:
        raise ConfigError("depthmix eval needs lm-eval: pip install 'depthmix[eval]'")
    _require_distinct(arguments.tasks)
    saved = find_run(arguments.target, arguments.revision)
    form = Form.of(saved)
    template = arguments.template or _template(saved, form)
    tasks = [_task(text, template, arguments) for text in arguments.tasks]
    from transformers.utils import logging

    from depthmix.evaluate.harness import evaluate
    from depthmix.evaluate.tasks import CHAT_NAME
    from depthmix.inference.loading import load_for_use

    logging.disable_progress_bar()
    chat = template == CHAT_NAME
    asked = Form("messages") if chat else form
    model, tokenizer = load_for_use(saved, asked, arguments.model, loading(arguments))
    if chat:
        require_chat_template(tokenizer)
    figures, samples = evaluate(
        model,
        tokenizer,
        tasks,
        batch_size=arguments.batch_size,
        limit=arguments.limit,
        scoring=arguments.scoring,
        max_new_tokens=arguments.max_new_tokens,
        cache=_cache(saved, arguments) if arguments.output else None,
        chat=chat,
    )
    if arguments.json:
        print(json.dumps(figures, indent=1))
    else:
        _print(figures)
    if arguments.plot:
        _draw(arguments.plot, samples)
    if arguments.output:
        _write(Path(arguments.output), arguments, figures, samples)
    return 0


def _parser() -> Parser:
    parser = Parser("eval", "Score a model with lm-eval.", _EXAMPLES)
    add = parser.add_argument
    add_model_options(parser)
    add(
        "--tasks",
        nargs="+",
        action="extend",
        required=True,
        metavar="TASK",
        help="what to score on",
    )
    add(
        "--train-data",
        nargs="+",
        action="extend",
        metavar="FILE",
        help="find test questions that stand in there",
    )
    add(
        "--template",
        choices=[*TEMPLATES, "chat"],
        help="prompts (default: as in training); chat: the tokenizer's chat template",
    )
    add("--scoring", choices=["generate", "likelihood"], default="generate", help="of local files")
    add("--batch-size", type=integer(1), default=8, help="questions at a time (default: 8)")
    add("--limit", type=integer(1), help="questions of each task (default: all)")
    add("--max-new-tokens", type=integer(1), default=128, help="of a reply (default: 128)")
    add("--json", action="store_true", help="print the figures as JSON")
    add("--plot", type=output_file, help="draw a reliability diagram of the answers to this PNG")
    add("--output", metavar="FOLDER", help="write figures and every reply there")
    return parser


def _require_distinct(tasks: Sequence[str]) -> None:
    """Refuse a task that is named twice: the figures of one would replace those of the other."""
    from depthmix.data.gym import is_gym

    names = [text if is_gym(text) else text.partition("=")[0] for text in tasks]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--tasks: {name} is named {names.count(name)} times: one run each")


def _template(saved: SavedRun, form: Form) -> str | None:
    """Return the template that the model was tuned with, if it was."""
    from depthmix.data.formats import FORMATS
    from depthmix.evaluate.tasks import CHAT_NAME

    if form.is_chat:
        return CHAT_NAME
    return form.template or FORMATS[form.row_format].template


def _task(text: str, template: str | None, arguments: argparse.Namespace) -> LocalTask | str:
    """Return a local task, or the name of lm-eval's own."""
    from depthmix.data.gym import is_gym
    from depthmix.evaluate.tasks import known_tasks, local_task

    name, _, source = text.partition("=")
    if is_gym(text):
        return local_task(text, text, template, None)
    if source:
        task = local_task(name, source, template, arguments.train_data)
        if arguments.train_data:
            shared = sum(not document["clean"] for document in task.documents)
            found = f"{shared} of {len(task.documents)} questions stand in the training data"
            print(f"{name}: {found}", file=_aside(arguments))
        return task
    known = known_tasks().get(name)
    if known is not None and known.harness is None:
        raise ConfigError(f"task {name}: lm-eval has no such task; give a file: {name}=FILE")
    return known.harness if known and known.harness else _of_harness(name)


def _of_harness(name: str) -> str:
    """Return the name of a task of lm-eval's, once it is known to be one."""
    from depthmix.evaluate.harness import harness_tasks
    from depthmix.evaluate.tasks import known_tasks

    names = {*harness_tasks(), *known_tasks()}
    if name in names:
        return name
    raise ConfigError(
        f"task {name}: neither lm-eval nor depthmix has such a task{nearest(name, names)}"
    )


def _cache(saved: SavedRun, arguments: argparse.Namespace) -> Path:
    """Return a file that belongs to these weights, loaded like this."""
    weights = saved.digest(arguments.model, arguments.revision)
    identity = json.dumps([weights, arguments.dtype, arguments.load_in_4bit])
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


def _draw(path: Path, samples: dict[str, list[dict[str, Any]]]) -> None:
    from depthmix.calibration.reliability import reliability_figure
    from depthmix.evaluate.confidence import reliability_of

    found = {task: reliability_of(rows) for task, rows in samples.items()}
    known = {task: sums for task, sums in found.items() if sums is not None}
    reliability_figure(known, "answers, by the probability of each").savefig(path, dpi=120)


def _write(
    folder: Path,
    arguments: argparse.Namespace,
    figures: dict[str, dict[str, Any]],
    samples: dict[str, list[dict[str, Any]]],
) -> None:
    made_by = {
        "command": command(),
        "options": {name: value for name, value in vars(arguments).items() if name != "plot"},
        "versions": versions("lm_eval"),
    }
    for task, rows in samples.items():
        name = "".join(letter if letter.isalnum() else "_" for letter in task)
        write_text(folder / f"samples-{name}.jsonl", "\n".join(map(json.dumps, rows)))
    write_text(
        folder / "results.json", json.dumps({"results": figures, "made_by": made_by}, indent=1)
    )
    print(f"figures and replies: {folder}", file=_aside(arguments))


def _aside(arguments: argparse.Namespace) -> Any:
    """Return where to print what is no figure: beside the JSON, if there is any."""
    return sys.stderr if arguments.json else sys.stdout
