"""`depthmix compare`: methods x seeds x tasks, cached and resumable, with paired intervals."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmix.commands.model_options import add_base_options, find_run
from depthmix.commands.parser import Parser, file, integer, number, output_file, require_matplotlib
from depthmix.errors import ConfigError
from depthmix.files import write_text

if TYPE_CHECKING:
    from depthmix.train.given import Given

_EXAMPLES = """\
An experiment file names a model, methods (options of `depthmix train` each), seeds and tasks; see
docs/comparing.md. A run that is done is not run again; one that was stopped begins anew.

examples:
  depthmix compare experiment.yaml
  depthmix compare experiment.yaml --report docs/results.md
  depthmix compare experiment.yaml --dtype bfloat16
"""


def run(argv: Sequence[str]) -> int:
    """Run what is not done, then print and write what there is."""
    arguments = _parser().parse_args(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("compare starts its runs itself: call it once, with --workers or --ray")
    require_matplotlib("compare draws its figures, which")
    if arguments.ray and find_spec("ray") is None:
        raise ConfigError("--ray needs Ray: pip install 'depthmix[ray]'")
    from depthmix.compare.engine import collect, prepare, run_all
    from depthmix.compare.experiment import read_experiment
    from depthmix.compare.report import print_tables
    from depthmix.compare.spread import run_here, run_on_ray

    experiment = read_experiment(arguments.experiment).given(_flags(arguments))
    if arguments.revision:
        find_run(experiment.model_name_or_path, arguments.revision)  # a folder has none
    cells = prepare(experiment)
    if arguments.ray:
        run = partial(run_on_ray, address=arguments.ray, gpus=arguments.gpus)
    else:
        run = partial(run_here, workers=arguments.workers)
    failed = run_all(cells, run)
    results = collect(experiment, cells)
    folder = Path(experiment.output_dir)
    write_text(folder / "results.json", json.dumps(results, indent=1))
    print_tables(results)
    _report(results, arguments.report or folder / "results.md")
    for line in failed:
        print(f"depthmix: failed: {line}", file=sys.stderr)
    return 1 if failed else 0


def _parser() -> Parser:
    parser = Parser(
        "compare", "Compare tuning methods over seeds and tasks.", _EXAMPLES, "EXPERIMENT.yaml"
    )
    parser.add_argument("experiment", metavar="EXPERIMENT.yaml", type=file, help="what to compare")
    add_base_options(parser)
    parser.add_argument("--workers", type=integer(1), default=1, help="runs at a time (default: 1)")
    parser.add_argument("--ray", metavar="ADDRESS", help="spread over a Ray cluster; or: local")
    parser.add_argument("--gpus", type=number(0), default=1, help="of a run on Ray (default: 1)")
    parser.add_argument(
        "--report", type=output_file, help="Markdown file (default: results.md in output_dir)"
    )
    return parser


def _flags(arguments: argparse.Namespace) -> dict[str, Given]:
    """Return what is said of loading, as options of `depthmix train`."""
    from depthmix.train.given import Given

    trust = arguments.trust_remote_code
    said = {
        "model_revision": Given(arguments.revision, "--revision"),
        "trust_remote_code": Given(None if trust is None else str(trust), "--trust-remote-code"),
        "dtype": Given(arguments.dtype, "--dtype"),
    }
    return {name: given for name, given in said.items() if given.text is not None}


def _report(results: dict[str, Any], path: Path) -> None:
    """Write the tables as Markdown, and the plots beside them."""
    from depthmix.compare.over_time import has_curves, plot_over_time
    from depthmix.compare.report import markdown, plot

    if not results["runs"]:
        return
    picture = path.with_suffix(".png")
    plot(results, picture)
    command = " ".join(["depthmix", *sys.argv[1:]])
    text = f"Made by `{command}`.\n\n{markdown(results, picture.name)}"
    write_text(path, text)
    print(f"figures: {path}, {picture}")
    if has_curves(results):
        over_time = path.with_name(f"{path.stem}-time.png")
        plot_over_time(results, over_time)
        print(f"over time: {over_time}")
