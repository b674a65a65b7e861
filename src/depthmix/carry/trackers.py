"""The router's weights as one chart in trackers, which draw every logged figure by itself.

TensorBoard: a chart of all late layers under *Custom scalars*. trackio, which has no chart of
several figures: bars by layer, with a slider over the steps.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
    TrackioCallback,
)

from depthmix.model.runtime import find_runtime
from depthmix.model.statistics import ROUTER_WEIGHT

WEIGHTS = "router_weights"  # the chart of trackio


class RouterTensorBoard(TensorBoardCallback):
    """The Trainer's own callback, and a layout with a chart of the router's weights."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the log, and say which figures share a chart."""
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        runtime = find_runtime(kwargs["model"])
        if self.tb_writer is None or runtime is None or len(runtime.anatomy.layer_indices) == 1:
            return
        charts = {
            f"router weights, {of}": [
                "Multiline",
                [f"{of}/{ROUTER_WEIGHT}{layer}" for layer in runtime.anatomy.layer_indices],
            ]
            for of in ("train", "eval")
        }
        self.tb_writer.add_custom_scalars({"MoDE": charts})


class RouterTrackio(TrackioCallback):
    """The Trainer's own callback, and the router's weights as bars."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Log what there is, and the weights together once more."""
        bars = {}
        for prefix in ("", "eval_"):
            weights = _weights(logs or {}, prefix)
            if weights:
                histogram = (list(weights.values()), _edges(list(weights)))
                bars[prefix + WEIGHTS] = self._trackio.Histogram(np_histogram=histogram)
        logs = {**(logs or {}), **bars}
        super().on_log(args, state, control, model=model, logs=logs, **kwargs)  # type: ignore[no-untyped-call]


def chart_router_weights() -> None:
    """Have every Trainer made from now on use these in place of the Trainer's own."""
    INTEGRATION_TO_CALLBACK.update({"tensorboard": RouterTensorBoard, "trackio": RouterTrackio})


def _weights(logs: dict[str, Any], prefix: str) -> dict[int, float]:
    """Return the weights in an entry of the logs, by layer."""
    begin = prefix + ROUTER_WEIGHT
    names = (name for name in logs if name.startswith(begin))
    return {layer: logs[f"{begin}{layer}"] for layer in sorted(int(n[len(begin) :]) for n in names)}


def _edges(layers: list[int]) -> list[float]:
    """Return the limits of the bars of neighbouring layers."""
    return [*(layer - 0.5 for layer in layers), layers[-1] + 0.5]
