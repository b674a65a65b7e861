"""`probe`: from the options of a training run to figures by layer and a recommendation."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from depthmix.config import MoDEConfig
from depthmix.data.batches import TokenRow, cut
from depthmix.errors import ConfigError, DataError
from depthmix.model.discovery import discover
from depthmix.model.runtime import runtime_of
from depthmix.pretrained import load_base, to_device
from depthmix.probe.choice import choose
from depthmix.probe.cost import bills
from depthmix.probe.lens import predictions
from depthmix.probe.observe import observe
from depthmix.probe.report import Probe
from depthmix.train.arguments import TrainArguments
from depthmix.train.data import TrainingData, prepare_data, require_rows
from depthmix.train.fit import loading_options
from depthmix.train.methods import tune
from depthmix.train.run_options import RESTRICTABLE

ROWS = 200


def probe(arguments: TrainArguments, rows: int = ROWS) -> Probe:
    """Measure every layer on rows of a run's training data, drawn by its seed.

    The base model is loaded as the run loads it, on the accelerator if there is one, with the run's
    tuning method on all layers, which changes nothing yet. Nothing is trained, nothing written.

    Args:
        arguments: of the run.
        rows: at most so many are read.

    Raises:
        DataError: as `prepare_data`, or there are fewer than two rows.
        ConfigError: the model has one layer, or the tuning method does not go onto it.
        DiscoveryError: as `attach`.
    """
    data = prepare_data(arguments)
    require_rows(data, arguments)
    chosen = _rows(data, arguments, rows)
    model = _model(arguments)
    runtime = runtime_of(model)
    seen = observe(model, chosen)
    alone, fitted = predictions(runtime, seen)
    layers = runtime.anatomy.layer_count
    return Probe(
        model=str(arguments.model.model_name_or_path),
        data=list(arguments.run.dataset or []),
        method=arguments.run.method,
        rows=len(chosen),
        tokens=seen.tokens,
        scored=int((~seen.fitting).sum()),
        alone=alone,
        fitted=fitted,
        gradients=seen.gradients,
        bills=bills(runtime.host, arguments, chosen, layers) if seen.gradients else None,
        choice=choose(fitted.loss, seen.gradients),
    )


def _rows(data: TrainingData, arguments: TrainArguments, count: int) -> list[TokenRow]:
    """Return rows with something to learn, cut as training cuts them."""
    training = arguments.training
    keep_end = training.truncation_mode == "keep_end"
    left = [int(place) for place in data.counts.left.nonzero()[0]]
    if len(left) < 2:
        raise DataError("the probe needs two rows or more: one to fit on, one to score")
    drawn = data.train.select(left).shuffle(seed=training.seed)
    return [
        cut(row, training.max_length, keep_end)
        for row in drawn.select(range(min(count, len(left))))
    ]


def _model(arguments: TrainArguments) -> Any:
    """Return the base model with MoDE on all layers, and with the tuning method if layers carry it.

    Raises:
        ConfigError: the model has one layer, or the method does not go onto it.
    """
    from transformers import set_seed

    set_seed(arguments.training.seed)  # adapters begin with random numbers
    own = dataclasses.replace(arguments, training=copy.copy(arguments.training))
    base = load_base(str(own.model.model_name_or_path), **loading_options(own))
    found = discover(base, dataclasses.replace(own.mode, k=1, router_top_k=None))
    if found.layer_count == 1:
        raise ConfigError(f"{own.model.model_name_or_path} has one layer: nothing to choose")
    all_layers = MoDEConfig(
        k=found.layer_count,
        adaptation="none",
        layers_path=own.mode.layers_path,
        norm_path=own.mode.norm_path,
    )
    method = own.run.method if own.run.method in RESTRICTABLE else "none"
    run = dataclasses.replace(
        own.run, method=method, mode=True, late_layers_only=False, tuned_layers=None
    )
    return to_device(tune(base, run, all_layers, own.model))
