"""`depthmix bench`: time and memory as ratios to what one would use instead."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from depthmix.commands.model_options import add_base_options, base_config, loading
from depthmix.commands.parser import (
    Parser,
    file,
    integer,
    name_or_folder,
    output_file,
    require_matplotlib,
)
from depthmix.errors import ConfigError
from depthmix.files import write_text
from depthmix.provenance import command, versions

if TYPE_CHECKING:
    from depthmix.bench.training import Setting

PARTS = ("step", "loss", "decode", "cache", "shares", "growth")

_EXAMPLES = """\
parts:
  step    a training step of LoRA, of LoRA + MoDE and of what lies between: time, peak memory,
          states multiplied with the LM head's weight, gradients pulled back through it
  loss    the loss of MoDE alone against the naive one, 1,024 tokens at V = 49,152
  decode  prefill (time, peak memory) and one token: base, merged LoRA, the same with MoDE, k
          naive heads; a prompt of --longest tokens, 256 unless given
  cache   an epoch of half, light and late-layer LoRA + MoDE, from cached states, against LoRA's
  shares  what part of a step, a prefill and a token is depthmix's own work, by the profiler
  growth  the loss as vocabulary, k and tokens grow

examples:
  depthmix bench --model HuggingFaceTB/SmolLM2-135M-Instruct
  depthmix bench --model out/base --parts step decode --json bench.json --plot bench.png
"""


def run(argv: Sequence[str]) -> int:
    """Measure, print and write."""
    arguments = _parser().parse_args(argv)
    if arguments.plot:
        require_matplotlib("--plot")
    from depthmix.bench.report import plot, print_ratios, require_markers, write_table

    if arguments.table:
        if "step" not in arguments.parts:
            raise ConfigError("--table is of part step")
        require_markers(arguments.table)
    _require_layers(arguments)
    results = _measure(arguments)
    print_ratios(results["ratios"])
    if arguments.json:
        write_text(arguments.json, json.dumps(results, indent=1, default=str))
    if arguments.plot:
        plot(results, arguments.plot)
    if arguments.table:
        write_table(arguments.table, results["step"], "lora")
    return 0


def _parser() -> Parser:
    parser = Parser(
        "bench",
        "Measure time and memory in one run, as ratios to what one would use instead.",
        _EXAMPLES,
    )
    parser.add_argument(
        "--model", type=name_or_folder, required=True, help="base model: folder or hub name"
    )
    add_base_options(parser)
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        metavar="PART",
        default=list(PARTS),
        help="default: all of them",
    )
    parser.add_argument("--k", type=integer(1), default=3, help="late layers (default: 3)")
    parser.add_argument("--rows", type=integer(1), default=8, help="rows of a batch (default: 8)")
    parser.add_argument(
        "--longest", type=integer(2), help="most tokens of a row (default: as GSM8K's)"
    )
    parser.add_argument(
        "--repeats", type=integer(1), default=5, help="medians of so many (default: 5)"
    )
    parser.add_argument(
        "--steps", type=integer(2), default=2, help="of an epoch of part cache (default: 2)"
    )
    parser.add_argument("--full", action="store_true", help="larger shapes in part growth")
    parser.add_argument("--json", type=output_file, help="write all figures to this file")
    parser.add_argument(
        "--plot", type=output_file, help="draw the figures to this PNG file (needs matplotlib)"
    )
    parser.add_argument(
        "--table", type=file, help="write the steps' ratios into this Markdown file"
    )
    return parser


def _require_layers(arguments: argparse.Namespace) -> None:
    """Find out that there is such a model, with so many layers, before the first part runs."""
    layers = base_config(arguments).get_text_config().num_hidden_layers
    if arguments.k > layers:
        raise ConfigError(f"--k {arguments.k}: the model has {layers} layers")


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen parts, printing each one's table as it is done."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells when it starts and stops
    import torch
    from transformers.utils import logging

    from depthmix.bench.report import print_table

    logging.disable_progress_bar()
    results: dict[str, Any] = {"made_by": _made_by(arguments, torch.get_num_threads())}
    ratios: dict[str, float] = {}
    for part in arguments.parts:
        title, figures, baseline, part_ratios = _RUN[part](arguments)
        results[part] = figures
        ratios |= part_ratios
        if baseline:
            print_table(title, figures, baseline)
    return {**results, "ratios": ratios}


def _setting(arguments: argparse.Namespace, rows: int) -> Setting:
    from depthmix.bench.batch import real_lengths
    from depthmix.bench.training import Setting

    lengths = real_lengths(rows, arguments.longest)
    return Setting(arguments.model, lengths, arguments.k, loading(arguments))


Measured = tuple[str, Any, str | None, dict[str, float]]


def _step(arguments: argparse.Namespace) -> Measured:
    from depthmix.bench.ratios import step_ratios
    from depthmix.bench.training import LORA, VARIANTS, measure_steps

    figures = measure_steps(_setting(arguments, arguments.rows), list(VARIANTS), arguments.repeats)
    title = f"one training step, {arguments.rows} rows of GSM8K's lengths"
    return title, figures, LORA, step_ratios(figures)


def _loss(arguments: argparse.Namespace) -> Measured:
    from depthmix.bench.loss import NAIVE, Shape, measure_loss
    from depthmix.bench.ratios import loss_ratios

    shape = Shape(k=arguments.k)
    figures = measure_loss(shape, arguments.repeats)
    title = f"the loss, {shape.tokens} tokens, V = {shape.vocabulary}, d = {shape.width}"
    return title, figures, NAIVE, loss_ratios(figures)


def _decode(arguments: argparse.Namespace) -> Measured:
    from depthmix.bench.decoding import MERGED, measure_decoding
    from depthmix.bench.ratios import decoding_ratios

    prompt, tokens = arguments.longest or 256, 16
    # More of them, since they are short and the ratio is close to one.
    repeats = 3 * arguments.repeats
    figures = measure_decoding(_setting(arguments, arguments.rows), prompt, tokens, repeats)
    title = f"prefill of {prompt} tokens, then one token at a time"
    return title, figures, MERGED, decoding_ratios(figures)


def _growth(arguments: argparse.Namespace) -> Measured:
    from depthmix.bench.growth import measure_growth

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return "", measure_growth(arguments.full, memory // 3), None, {}


def _cache(arguments: argparse.Namespace) -> Measured:
    from depthmix.bench.epoch import LORA_EPOCH, measure_epochs
    from depthmix.bench.ratios import epoch_ratios

    rows = arguments.steps * arguments.rows
    figures = measure_epochs(_setting(arguments, rows), arguments.rows, 1 + arguments.repeats)
    title = f"an epoch of {rows} rows, from cached depth, against LoRA's"
    return title, figures, LORA_EPOCH, epoch_ratios(figures)


def _shares(arguments: argparse.Namespace) -> Measured:
    from depthmix.bench.shares import measure_shares

    setting = _setting(arguments, arguments.rows)
    figures = measure_shares(setting, arguments.longest or 256, tokens=8)
    return "what is depthmix's own", figures, "training step", {}


_RUN = {
    "step": _step,
    "loss": _loss,
    "decode": _decode,
    "cache": _cache,
    "shares": _shares,
    "growth": _growth,
}


def _made_by(arguments: argparse.Namespace, threads: int) -> dict[str, Any]:
    return {
        "command": command(),
        "options": vars(arguments),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": threads,
        "versions": versions("accelerate"),
    }
