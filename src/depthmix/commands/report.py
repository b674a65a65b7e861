"""`depthmix report`: a page that shows what a run's layers and router do."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from depthmix.carry.saved_run import SavedRun
from depthmix.charts import require_charts
from depthmix.commands.model_options import add_model_options, find_run, loading
from depthmix.commands.parser import MOST_SEED, Parser, folder, integer
from depthmix.errors import ConfigError

if TYPE_CHECKING:
    from depthmix.report.report import Options, Report

_EXAMPLES = """\
Writes report.html, one file that opens without a network, tables.json, and every figure as PNG and
JSON (Vega-Lite). Without DATA, it looks at the rows that the run was evaluated on.

examples:
  depthmix report tuned
  depthmix report tuned heldout.jsonl --rows 200
  depthmix report tuned mawps_test.json "reasoning_gym:chain_sum?size=100&seed=9" --all-layers
"""


def run(argv: Sequence[str]) -> int:
    """Look, write and say where."""
    arguments = _parser().parse_args(argv)
    require_charts("depthmix report")
    saved = find_run(arguments.target, arguments.revision)
    where = _where(saved, arguments)
    report = _look(saved, arguments)
    from depthmix.report.page import write_report

    page = write_report(report, where)
    for finding in report.findings:
        print(f"{finding.state:<7}  {finding.name}: {finding.figure}")
    print(f"report: {page}")
    return 0


def _look(saved: SavedRun, arguments: argparse.Namespace) -> Report:
    from transformers.utils import logging

    from depthmix.inference.form import Form
    from depthmix.inference.loading import load_for_use
    from depthmix.report.report import make_report, require_reportable

    require_reportable(saved)
    logging.disable_progress_bar()
    model, tokenizer = load_for_use(saved, Form.of(saved), arguments.model, loading(arguments))
    return make_report(saved, model, tokenizer, _options(arguments))


def _options(arguments: argparse.Namespace) -> Options:
    from depthmix.report.report import Options

    return Options(
        sources=arguments.data,
        split=arguments.split,
        format=arguments.format,
        rows=arguments.rows,
        shown=arguments.show,
        generate=arguments.generate,
        max_new_tokens=arguments.max_new_tokens,
        all_layers=arguments.all_layers,
        permutations=arguments.permutations,
        seed=arguments.seed,
        pos=arguments.pos,
    )


def _where(saved: SavedRun, arguments: argparse.Namespace) -> Path:
    """Return the folder that is written into: one in the run, unless another is named."""
    if arguments.output is not None:
        return Path(arguments.output)
    if saved.commit:
        raise ConfigError(f"--output: {saved.name} is on the hub: name a folder for the report")
    return saved.folder / "report"


def _parser() -> Parser:
    from depthmix.data.formats import FORMATS

    summary = "Show what the late layers and the router of a run do, on one page."
    parser = Parser("report", summary, _EXAMPLES)
    add_model_options(parser)
    parser.add_argument(
        "data",
        nargs="*",
        metavar="DATA",
        help="held-out rows: files, hub names or generators, each shown as a data set of its own "
        "(default: the rows that the run was evaluated on)",
    )
    parser.add_argument(
        "--output", type=folder, metavar="FOLDER", help="(default: report, in the run's folder)"
    )
    rows = parser.add_argument_group("rows")
    rows.add_argument("--split", default="test", help="of DATA (default: test)")
    rows.add_argument(
        "--format",
        default="auto",
        choices=["auto", *FORMATS],
        metavar="FORM",
        help="of DATA (default: told from its columns)",
    )
    counted = {
        "rows": (1, 100, "rows of each data set"),
        "show": (0, 20, "rows shown token by token"),
        "generate": (0, 4, "prompts of these that the model answers"),
        "max-new-tokens": (1, 64, "of an answer"),
    }
    for name, (least, default, text) in counted.items():
        rows.add_argument(
            f"--{name}",
            type=integer(least),
            default=default,
            metavar="N",
            help=f"{text} (default: {default})",
        )
    look = parser.add_argument_group("what is looked at")
    look.add_argument(
        "--all-layers",
        action="store_true",
        help="all layers by themselves, not the late ones alone",
    )
    look.add_argument(
        "--permutations",
        type=integer(99),
        default=9_999,
        metavar="N",
        help="of each test against chance (default: 9999)",
    )
    look.add_argument(
        "--seed", type=integer(0, MOST_SEED), default=0, metavar="N", help="of these (default: 0)"
    )
    look.add_argument(
        "--pos",
        metavar="PIPELINE",
        help="of spaCy, such as en_core_web_sm: routing by part of speech (default: left out)",
    )
    return parser
