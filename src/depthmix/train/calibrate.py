"""A temperature for a saved run, fitted on rows as the run reads them, beside its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmix.calibration.fit import Calibration, fit_calibration
from depthmix.carry.run_record import CALIBRATION_NAME
from depthmix.carry.saved_run import SavedRun
from depthmix.data.batches import TokenRow, cut
from depthmix.errors import DataError
from depthmix.files import write_text
from depthmix.provenance import command, versions
from depthmix.train.arguments import TrainArguments
from depthmix.train.data import prepare_data
from depthmix.train.record import digest_of

if TYPE_CHECKING:
    from datasets import Dataset


def calibrate(model: Any, run: SavedRun, rows: Dataset, arguments: TrainArguments) -> Calibration:
    """Fit a temperature to the model of a saved run and write it there.

    Args:
        model: the model, as it was saved.
        run: where it was saved, in a local folder.
        rows: tokenised, that it was not trained on.
        arguments: by which rows are cut.

    Raises:
        DepthmixError: as `fit_calibration`.
    """
    training = arguments.training
    keep_end = training.truncation_mode == "keep_end"
    cut_rows: list[TokenRow] = [cut(row, training.max_length, keep_end) for row in rows]
    found = fit_calibration(model, cut_rows)
    facts = {
        "temperature": found.temperature,
        "tokens": found.tokens,
        "rows": {"rows": len(rows), "digest": digest_of(rows)},
        **{
            name: {
                "loss": figures.loss,
                "ece": figures.reliability.error,
                "reliability": figures.reliability.as_dict(),
            }
            for name, figures in (("before", found.before), ("after", found.after))
        },
        "weights": run.weights_digest(),
        "command": command(),
        "versions": versions(),
    }
    write_text(run.folder / CALIBRATION_NAME, json.dumps(facts, indent=1))
    return found


def calibrate_trained(model: Any, arguments: TrainArguments) -> Calibration:
    """Fit a temperature to what a run has just saved, on its evaluation rows.

    Raises:
        DepthmixError: as `fit_calibration`.
    """
    folder = Path(str(arguments.training.output_dir))
    rows = prepare_data(arguments).evaluation
    if rows is None:
        raise DataError("there are no evaluation rows to fit a temperature on")
    return calibrate(model, SavedRun(str(folder), folder), rows, arguments)


def told(found: Calibration) -> str:
    """Return a calibration in one line."""
    losses, errors = zip(
        *((figures.loss, figures.reliability.error) for figures in (found.before, found.after)),
        strict=True,
    )
    return (
        f"temperature {found.temperature:.3f} on {found.tokens:,} tokens: loss {losses[0]:.4f} -> "
        f"{losses[1]:.4f}, calibration error {errors[0]:.4f} -> {errors[1]:.4f}"
    )
