"""`depthmix export`: a folder that transformers and engines load without depthmix."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from depthmix.carry.run_record import CONFIG_NAME
from depthmix.carry.saved_run import Holds, SavedRun
from depthmix.commands.model_options import add_model_options, find_run, loading
from depthmix.commands.parser import Parser, integer, number
from depthmix.errors import CheckpointError, ConfigError, DataError
from depthmix.files import write_text

if TYPE_CHECKING:
    from depthmix.pretrained import Loading

_EXAMPLES = """\
examples:
  depthmix export tuned exported
  python -c "from transformers import AutoModelForCausalLM as A; \\
      A.from_pretrained('exported', trust_remote_code=True)"
  depthmix export tuned plain --plain --dataset train.jsonl --steps 100

The tuning method is merged into the weights. vLLM serves the folder; llama.cpp and TensorRT-LLM,
which do not run a model's own code, load --plain alone: see docs/serving.md.
"""
_HELD_OUT = 0.2  # of the rows


def run(argv: Sequence[str]) -> int:
    """Load, merge and write."""
    arguments = _parser().parse_args(argv)
    saved, out = find_run(arguments.target, arguments.revision), Path(arguments.out)
    if arguments.plain:
        export_plain(saved, arguments, out)
        print(f"exported plain weights to {out}")
        return 0
    if arguments.dataset:
        raise ConfigError("--dataset: rows are for --plain, which distils the mixture")
    export(saved, arguments.model, loading(arguments), out)
    print(
        f"exported to {out}; load it with "
        f"AutoModelForCausalLM.from_pretrained({str(out)!r}, trust_remote_code=True)"
    )
    return 0


def export(saved: SavedRun, base: str | None, how: Loading, out: Path) -> None:
    """Write the folder of a tuned model, with the record by which it is asked as it was trained.

    Raises:
        CheckpointError: it is an export, or holds no MoDE.
        DepthmixError: it cannot be exported; see `export_model`.
    """
    _require_mode(saved)
    from depthmix.export.folder import export_model
    from depthmix.inference.form import Form
    from depthmix.inference.loading import load_for_use

    model, tokenizer = load_for_use(saved, Form.of(saved), base, how)
    export_model(model, tokenizer, out)
    _write_record(saved, out)


def export_plain(saved: SavedRun, arguments: argparse.Namespace, out: Path) -> None:
    """Write plain weights; where rows are given, distil the mixture first and say what it costs.

    Raises:
        CheckpointError: it is an export, or holds no MoDE.
        DepthmixError: the tuning method cannot be merged, or a row is broken.
    """
    _require_mode(saved)
    import depthmix
    from depthmix.export.plain import write_plain
    from depthmix.inference.form import Form
    from depthmix.inference.loading import load_for_use
    from depthmix.model.active import host_of
    from depthmix.model.temperature import temperature_of
    from depthmix.pretrained import load_saved, to_device

    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty")  # before a long run
    form, how = Form.of(saved), loading(arguments)
    rows = _rows(saved, arguments.dataset) if arguments.dataset else None
    teacher, tokenizer = load_for_use(saved, form, arguments.model, how)
    student = depthmix.detach(to_device(load_saved(saved, arguments.model, how, is_trainable=True)))
    host_of(student).generation_config = teacher.generation_config
    if rows is None:
        print("note: the mixture is left out; --dataset distils it first and says what that costs")
        temperature = temperature_of(teacher)
        if temperature != 1:
            print(f"note: so is the run's temperature: draw at {temperature:.3g} times yours")
    else:
        _distil(student, teacher, tokenizer, rows, arguments)
    write_plain(student, tokenizer, out)
    _write_record(saved, out)


def _require_mode(saved: SavedRun) -> None:
    if saved.holds is Holds.EXPORT:
        raise CheckpointError(f"{saved.name}: is an export already")
    if not saved.has_mode:
        raise CheckpointError(f"{saved.name}: holds no MoDE")


def _write_record(saved: SavedRun, out: Path) -> None:
    """Write by what generate, chat and eval ask the model as it was trained."""
    if saved.record.options:
        write_text(out / CONFIG_NAME, yaml.safe_dump(saved.record.options, sort_keys=False))


def _rows(saved: SavedRun, names: list[str]) -> tuple[Any, str]:
    """Load rows of the run's form, and their format."""
    from depthmix.data.load import Source, load_source

    options = saved.record.options
    source = Source(
        names,
        format=options.get("dataset_format", "auto"),
        template=options.get("dataset_template"),
    )
    rows, row_format = load_source(source)
    if len(rows) < 3:
        raise DataError(
            f"{', '.join(names)}: {len(rows)} rows are too few: one in five is held out"
        )
    return rows, row_format


def _distil(
    student: Any, teacher: Any, tokenizer: Any, loaded: tuple[Any, str], arguments: Any
) -> None:
    """Distil, and print what the model without its mixture gives on held-out rows."""
    from depthmix.data.splits import held_out
    from depthmix.data.tokens import tokenised
    from depthmix.export.plain import batches_of, cost, distil

    rows, row_format = loaded
    train, test = held_out(rows, _HELD_OUT, seed=0)
    how = (arguments.batch_size, arguments.max_length, teacher.device)
    tests = list(batches_of(tokenised(test, row_format, tokenizer), *how))
    once = list(batches_of(tokenised(train, row_format, tokenizer), *how))
    repeated = once * math.ceil(arguments.steps / len(once))
    found = {"mixture": cost(teacher, teacher, tests), "left out": cost(student, teacher, tests)}
    distil(student, teacher, repeated[: arguments.steps], arguments.learning_rate)
    found[f"distilled, {arguments.steps} steps"] = cost(student, teacher, tests)
    print(f"{f'on {len(test)} held-out rows':<24}  loss a token  accuracy  agreement")
    for name, figures in found.items():
        shares = f"{figures.accuracy:8.1%}  {figures.agreement:9.1%}"
        print(f"{name:<24}  {figures.loss:12.4f}  {shares}")


def _parser() -> Parser:
    summary = "Write a folder that transformers and engines load without depthmix."
    parser = Parser("export", summary, _EXAMPLES)
    add_model_options(parser)
    parser.add_argument("out", metavar="OUT", help="folder to write; new or empty")
    group = parser.add_argument_group("plain weights")
    add = group.add_argument
    add("--plain", action="store_true", help="leave the mixture out: weights for every engine")
    add("--dataset", nargs="+", metavar="ROWS", help="distil the mixture into them on these rows")
    add("--steps", type=integer(1), default=50, metavar="N", help="of distilling (default: 50)")
    add("--batch-size", type=integer(1), default=8, metavar="N", help="rows a step (default: 8)")
    add("--max-length", type=integer(2), default=1024, metavar="N", help="tokens (default: 1024)")
    rate = number(0.0, above=True)
    add("--learning-rate", type=rate, default=1e-4, metavar="R", help="at first (default: 1e-4)")
    return parser
