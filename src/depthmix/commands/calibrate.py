"""`depthmix calibrate`: fit one temperature to a tuned model, on rows that were held out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from depthmix.carry.saved_run import Holds, SavedRun
from depthmix.commands.model_options import add_model_options, find_run, loading
from depthmix.commands.parser import Parser, output_file, require_matplotlib
from depthmix.errors import ConfigError

if TYPE_CHECKING:
    from depthmix.calibration.fit import Calibration
    from depthmix.train.arguments import TrainArguments

_SUMMARY = """\
Fit one temperature to a tuned model, on rows that it was not trained on.

It is written into the folder of the run and applied wherever the run is loaded: generate, chat,
eval. What enters the LM head is divided by it, so that the likeliest token stays the likeliest.
Rows are read as the run reads its own; of the options of `depthmix train`, those that say how are
accepted (--dataset_split, --dataset_format, --supervise, --max_length ...).
"""
_EXAMPLES = """\
examples:
  depthmix calibrate out validation.jsonl
  depthmix calibrate out validation.jsonl --plot reliability.png
  depthmix train run.yaml --validation_split 0.1 --calibrate   the same, right after training
"""

# What a run's own options say of how rows are read.
_AS_IN_TRAINING = (
    *("dataset_format", "dataset_template", "supervise", "prompt_column", "completion_column"),
    *("messages_column", "dataset_text_field", "max_length", "truncation_mode", "eos_token"),
    *("chat_template_path", "trust_remote_code", "model_revision"),
)


def run(argv: Sequence[str]) -> int:
    """Fit, write, print and draw."""
    arguments, options = _parser().parse_with_train_options(argv)
    if arguments.plot:
        require_matplotlib("--plot")
    saved = find_run(arguments.target, arguments.revision)
    _require_place(saved)
    settled = _arguments(saved, arguments.model, arguments.data, options)
    from depthmix.pretrained import load_saved, to_device
    from depthmix.train.calibrate import calibrate, told
    from depthmix.train.data import prepare_data, require_rows

    data = prepare_data(settled)
    require_rows(data, settled)
    model = load_saved(saved, arguments.model, loading(arguments), calibrated=False)
    found = calibrate(to_device(model), saved, data.train, settled)
    if arguments.json:
        print(json.dumps(_as_dict(found)))
    else:
        print(told(found))
    if arguments.plot:
        _draw(found).savefig(arguments.plot, dpi=120)
    return 0


def _parser() -> Parser:
    parser = Parser(
        "calibrate", _SUMMARY, _EXAMPLES, "MODEL DATA [DATA ...] [options of it and of train]"
    )
    add_model_options(parser)
    add = parser.add_argument
    add("data", metavar="DATA", nargs="+", help="as `depthmix train --dataset` takes it")
    add("--json", action="store_true", help="print JSON instead of a line")
    add("--plot", type=output_file, help="draw a reliability diagram to this PNG file")
    return parser


def _require_place(saved: SavedRun) -> None:
    """Raise unless a temperature can be written beside the model."""
    if saved.commit:
        raise ConfigError(f"{saved.name} is on the hub: fetch it into a folder first")
    if saved.holds is Holds.EXPORT:
        raise ConfigError(f"{saved.name} is an export: calibrate the run and export it again")


def _arguments(
    saved: SavedRun, base: str | None, data: list[str], options: list[str]
) -> TrainArguments:
    """Return the options of a run that would train on these rows."""
    from depthmix.train.arguments import resolve
    from depthmix.train.given import Given, read_flags

    recorded = {
        name: Given(str(value), f"{saved.name}: {name}")
        for name, value in saved.record.options.items()
        if name in _AS_IN_TRAINING and value is not None
    }
    if "max_length" in saved.record.options:
        recorded.setdefault("max_length", Given(None, "max_length"))
    fixed = {"model_name_or_path": base or saved.base, "dataset": data, "preview": "1"}
    given = read_flags(options)
    for name in given:
        if name in fixed or name == "output_dir":
            raise ConfigError(f"{given[name].place}: not an option of calibrate")
    return resolve({**recorded, **given, **{n: Given(v, n) for n, v in fixed.items()}})


def _as_dict(found: Calibration) -> dict[str, object]:
    figures = {"before": found.before, "after": found.after}
    return {
        "temperature": found.temperature,
        "tokens": found.tokens,
        **{n: {"loss": f.loss, "ece": f.reliability.error} for n, f in figures.items()},
    }


def _draw(found: Calibration) -> Any:
    from depthmix.calibration.reliability import reliability_figure

    names = {"before": found.before, f"T = {found.temperature:.2f}": found.after}
    figures = {name: figures.reliability for name, figures in names.items()}
    return reliability_figure(figures, f"likeliest tokens, {found.tokens:,} of them")
