"""One run of a comparison, in a process of its own: train as `depthmix train` does, then score.

    python -m depthmix.compare.run FOLDER

FOLDER holds train.yaml, train.jsonl and score.jsonl; result.json appears when all is done.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from depthmix.analysis.layers import score_rows
from depthmix.compare.curve import Curve
from depthmix.compare.engine import RESULT, SCORED_ROWS, TRAIN
from depthmix.errors import DepthmixError, Stopped
from depthmix.files import write_text
from depthmix.model.temperature import set_temperature, temperature_of
from depthmix.pretrained import ignore_renamed_properties
from depthmix.probe.settle import settled
from depthmix.provenance import versions
from depthmix.train import output
from depthmix.train.arguments import parse
from depthmix.train.calibrate import calibrate_trained
from depthmix.train.fit import fit
from depthmix.train.run_options import Objective


def run(folder: Path) -> int:
    """Train and score; return 0, or what a shell gives for the signal that stopped it."""
    arguments = parse([str(folder / TRAIN)])
    rows = [json.loads(line) for line in (folder / SCORED_ROWS).read_text("utf-8").splitlines()]
    curve = Curve(rows)
    try:
        trainer = fit(settled(arguments), [curve])
    except Stopped as stop:
        return stop.status
    model: Any = trainer.model
    figures = {
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "peak_bytes": curve.peak_bytes,
        "seconds": curve.seconds,
        **_curves(arguments.run.objective, trainer.state.log_history),
    }
    output.save(Path(str(arguments.training.output_dir)), trainer)
    if arguments.run.calibrate:
        set_temperature(model, calibrate_trained(model, arguments).temperature)
    scores = score_rows(model, trainer.processing_class, rows)
    curve.add(float(trainer.state.epoch or 0), scores)
    per_row = {name: values for name, values in vars(scores).items() if name != "reliability"}
    metrics = {
        "loss": scores.mean_loss,
        "accuracy": scores.accuracy,
        "ece": scores.reliability.error,
        "reliability": scores.reliability.as_dict(),
        "temperature": temperature_of(model),
        **{name: per_row.pop(name) for name in _MEANS},
        "curve": curve.points,
        **figures,
    }
    result = {
        "metrics": metrics,
        "rows": per_row,
        "versions": versions(),
        "command": " ".join(["python", "-m", "depthmix.compare.run", str(folder)]),
    }
    write_text(folder / RESULT, json.dumps(result))
    return 0


def _curves(objective: Objective, logs: list[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Return loss by step, or rewards: the loss of a policy's gradient tells nothing."""

    def curve(name: str) -> list[list[float]]:
        return [[entry["step"], entry[name]] for entry in logs if name in entry]

    if objective == "sft":
        return {"loss_curve": curve("loss")}
    return {"loss_curve": [], "reward_curve": curve("reward")}


_MEANS = ("layer_loss", "layer_accuracy", "gate", "entropy", "rescued")


def main(folder: Path) -> int:
    """Run; what the user can mend is the last line of the log."""
    ignore_renamed_properties()
    try:
        return run(folder)
    except (DepthmixError, OSError) as error:
        print(f"depthmix: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
