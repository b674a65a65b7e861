"""What a run's logs say: losses, rates, router weights and entropy by step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from depthmix.carry.run_record import read_json
from depthmix.carry.saved_run import STATE_NAME, SavedRun
from depthmix.model.statistics import ROUTER_WEIGHT


@dataclass(frozen=True)
class Point:
    """A figure that was logged.

    Attributes:
        step: when.
        name: which, as it stands in the logs, without `eval_`.
        value: how much.
        evaluation: whether it is of held-out rows.
    """

    step: int
    name: str
    value: float
    evaluation: bool


@dataclass(frozen=True)
class TrainingLog:
    """The log of a run.

    Attributes:
        points: what was logged in training and evaluations, in order of the steps.
        summary: the figures of the end, such as `train_runtime` in seconds.
    """

    points: Sequence[Point]
    summary: dict[str, float]

    @classmethod
    def read(cls, run: SavedRun) -> TrainingLog | None:
        """Read the log that the Trainer left in a run or its last checkpoint; None: there is none.

        Raises:
            CheckpointError: the file is broken; names it.
        """
        states = [folder / STATE_NAME for folder in (run.folder, *reversed(run.checkpoints))]
        path = next(filter(Path.exists, states), None)
        return None if path is None else cls.of(read_json(path).get("log_history", []))

    @classmethod
    def of(cls, history: Sequence[dict[str, Any]]) -> TrainingLog:
        """Take apart `trainer.state.log_history`."""
        points: list[Point] = []
        summary: dict[str, float] = {}
        for entry in history:
            if "train_runtime" in entry:
                summary = {name: float(v) for name, v in entry.items() if _is_figure(v)}
                continue
            points += _points(entry)
        return cls(points, summary)

    def curve(self, name: str, evaluation: bool = False) -> list[tuple[int, float]]:
        """Return steps and values of one figure."""
        return [
            (point.step, point.value)
            for point in self.points
            if point.name == name and point.evaluation == evaluation
        ]

    @property
    def layers(self) -> list[int]:
        """The late layers whose weights were logged."""
        names = {point.name for point in self.points if point.name.startswith(ROUTER_WEIGHT)}
        return sorted(int(name.removeprefix(ROUTER_WEIGHT)) for name in names)

    def weights(self, evaluation: bool = False) -> list[list[tuple[int, float]]]:
        """Return the curve of each late layer's mean weight."""
        return [self.curve(f"{ROUTER_WEIGHT}{layer}", evaluation) for layer in self.layers]


def _points(entry: dict[str, Any]) -> list[Point]:
    evaluation = any(name.startswith("eval_") for name in entry)
    step = int(entry.get("step", 0))
    return [
        Point(step, name.removeprefix("eval_"), float(value), evaluation)
        for name, value in entry.items()
        if name not in ("step", "epoch", "total_flos") and _is_figure(value)
    ]


def _is_figure(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def router_summary(log: TrainingLog, folder: Path) -> list[str]:
    """Return two lines on what the router did in a run; none for a run without MoDE.

    Args:
        log: of the run.
        folder: where it is saved.
    """
    # A run may be so short that nothing but an evaluation was logged.
    evaluation = not log.curve("router_entropy")
    weights = [[value for _, value in curve] for curve in log.weights(evaluation)]
    if not weights:
        return []
    layers = ", ".join(map(str, log.layers))
    began = f" ({_listed(weights, 0)} at first)" if len(weights[0]) > 1 else ""
    entropy, most = log.curve("router_entropy", evaluation)[-1][1], math.log(len(weights))
    evaluated = any(point.evaluation for point in log.points)
    return [
        f"router: layers {layers} have {_listed(weights, -1)} of the weight{began}; "
        f"entropy {entropy:.2f} nats of at most {most:.2f}",
        f"late layers: divergence from the last one {_went(log.curve('distill_loss', evaluation))} "
        f"nats; see what they do: depthmix report {folder}{'' if evaluated else ' HELD_OUT_ROWS'}",
    ]


def _listed(weights: Sequence[Sequence[float]], place: int) -> str:
    return ", ".join(f"{curve[place]:.2f}" for curve in weights)


def _went(curve: Sequence[tuple[int, float]]) -> str:
    """Return how a figure went, from the first entry of the logs to the last."""
    values = [curve[0][1], curve[-1][1]][: len(curve)]
    return " -> ".join(f"{value:.3g}" for value in values)
