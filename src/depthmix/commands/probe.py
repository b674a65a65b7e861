"""`depthmix probe`: what each layer knows of a task before tuning, and how deep to tune."""

from __future__ import annotations

import json
from collections.abc import Sequence

from depthmix.commands.parser import Parser, integer, output_file, require_matplotlib
from depthmix.errors import ConfigError

_SUMMARY = """\
Measure every layer on some rows before tuning, and recommend k and tuned_layers.

One pass over the rows, forward and backward: what each layer predicts by itself, how that agrees
with the last layer, the gradient of the tuning method in it, and what tuning from there on costs.
Nothing is trained. Every option of `depthmix train` that decides on data, loading and the tuning
method is accepted and means the same (`depthmix train --help`).
"""
_EXAMPLES = """\
examples:
  depthmix probe HuggingFaceTB/SmolLM2-135M-Instruct train.jsonl
  depthmix probe HuggingFaceTB/SmolLM2-135M-Instruct train.jsonl --plot probe.png --lora_r 4
  depthmix probe HuggingFaceTB/SmolLM2-135M-Instruct "reasoning_gym:chain_sum?size=200&seed=1"
  depthmix train run.yaml --k auto --tuned_layers auto   probes and takes what is recommended
"""


def run(argv: Sequence[str]) -> int:
    """Probe, print and draw."""
    arguments, options = _parser().parse_with_train_options(argv)
    if arguments.plot:
        require_matplotlib("--plot")
    from depthmix.probe.run import probe
    from depthmix.train.arguments import resolve
    from depthmix.train.given import Given, read_flags

    given = read_flags(options)
    for name in ("model_name_or_path", "dataset", "k", "tuned_layers", "output_dir"):
        if name in given:
            raise ConfigError(f"{given[name].place}: not an option of probe")
    fixed = {"model_name_or_path": arguments.model, "dataset": arguments.data, "preview": "1"}
    settled = resolve({**given, **{n: Given(v, n) for n, v in fixed.items()}})
    found = probe(settled, arguments.rows)
    if arguments.plot:
        found.plot(arguments.plot)
    if arguments.json:
        print(json.dumps(found.as_dict(), indent=1))
        return 0
    found.print()
    if arguments.plot:
        print(f"picture: {arguments.plot}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        "probe", _SUMMARY, _EXAMPLES, "MODEL DATA [DATA ...] [options of probe and of train]"
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or hub name of a base model")
    add("data", metavar="DATA", nargs="+", help="as `depthmix train --dataset` takes it")
    add("--rows", type=integer(2), default=200, help="rows to read, drawn by seed (default: 200)")
    add("--json", action="store_true", help="print JSON instead of the table")
    add("--plot", type=output_file, help="draw the figures to this PNG file (needs matplotlib)")
    return parser
