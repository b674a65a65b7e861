"""In words: whether a run shows the failures that arXiv 2410.13077 warns of, and what to change.

Each finding has the figure that says so. The limits are ours: they are where a look is worth it,
not where a run has failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Literal

import numpy as np

from depthmix.analysis.observations import Observations
from depthmix.analysis.predictors import complements, gain_over_last
from depthmix.analysis.training_log import TrainingLog

State = Literal["fine", "look", "unknown"]

_COLLAPSED = 0.98  # mean weight of one layer
_STILL = 0.005  # standard deviation of a weight over tokens
_LEARNED = 0.9  # the divergence at the end, as a share of that at the beginning
_SPIKE = 10.0  # largest gradient norm, in medians
_WORSE = 1.02  # the last evaluation loss, as a multiple of the best
_SURE = 1.96  # standard errors


@dataclass(frozen=True)
class Finding:
    """One failure that was looked for.

    Attributes:
        name: of the failure.
        state: fine; look, where there are signs of it; unknown, where nothing tells.
        figure: what was found, with the figures that say so.
        advice: what to change, where there are signs of it.
    """

    name: str
    state: State
    figure: str
    advice: str = ""


def findings(seen: Observations, log: TrainingLog | None) -> list[Finding]:
    """Return a finding for each failure that such a run can have.

    Args:
        seen: held-out rows.
        log: of the run, if there is one.
    """
    log = log or TrainingLog([], {})
    stable = _stability(log)
    if not seen.late:
        return [stable]
    return [_collapse(seen), _late_layers(seen, log), stable, _gain(seen, log)]


def _collapse(seen: Observations) -> Finding:
    name = "router collapsed"
    learned = seen.where(seen.supervised)
    mean, spread = learned.gate.mean(axis=0), learned.gate.std(axis=0).max()
    most = int(mean.argmax())
    figure = (
        f"layer {seen.late[most]} has {mean[most]:.3f} of the weight on average; entropy "
        f"{learned.entropy.mean():.2f} nats of at most {np.log(len(mean)):.2f}; a weight differs "
        f"by {spread:.3f} from token to token (standard deviation)"
    )
    if mean[most] > _COLLAPSED:
        return Finding(
            name,
            "look",
            figure,
            "one layer predicts nearly alone: begin with a lower router_prior (null: even weights) "
            "or set balance_weight to 0.01; router_warmup_steps lets the late layers learn first",
        )
    if spread < _STILL:
        return Finding(
            name,
            "look",
            figure,
            "every token is weighed alike, so that the mixture is a constant one: raise "
            "router_learning_rate or train for longer",
        )
    return Finding(name, "fine", figure)


def _late_layers(seen: Observations, log: TrainingLog) -> Finding:
    name = "late layers no better than before"
    curve = log.curve("distill_loss")
    learned = int(seen.supervised.sum())
    rescued = len(complements(seen)) / max(learned, 1)
    aside = f"{rescued:.1%} of the tokens are right in a late layer and wrong in the last"
    if len(curve) < 4:
        return Finding(name, "unknown", f"too few logged steps to tell; {aside}")
    part = max(len(curve) // 5, 1)
    begin = float(np.mean([value for _, value in curve[:part]]))
    end = float(np.mean([value for _, value in curve[-part:]]))
    figure = f"divergence of the late layers from the last {begin:.3g} -> {end:.3g} nats; {aside}"
    if end > _LEARNED * begin:
        return Finding(
            name,
            "look",
            figure,
            "the late layers have not learned from the last one: raise norm_learning_rate or "
            "distill_weight, set distill_fraction to 1, or train for longer",
        )
    return Finding(name, "fine", figure)


def _stability(log: TrainingLog) -> Finding:
    name = "unstable adaptation"
    gradients = [value for _, value in log.curve("grad_norm")]
    evaluations = [value for _, value in log.curve("loss", evaluation=True)]
    told, advice = [], []
    if len(gradients) >= 5:
        ratio = max(gradients[1:]) / max(median(gradients), 1e-12)
        told.append(f"largest gradient norm {ratio:.1f} times the median")
        if ratio > _SPIKE:
            advice.append("gradients leap: lower learning_rate, or set warmup_steps")
    if len(evaluations) >= 2:
        told.append(f"evaluation loss {_chain(evaluations)}, best {min(evaluations):.4g}")
        if evaluations[-1] > _WORSE * min(evaluations):
            advice.append(
                "the evaluation loss rises again: fewer epochs, or early_stopping_patience"
            )
    if not told:
        return Finding(name, "unknown", "too few logged steps or evaluations to tell")
    state: State = "look" if advice else "fine"
    return Finding(name, state, "; ".join(told), "; ".join(advice))


def _gain(seen: Observations, log: TrainingLog) -> Finding:
    name = "slower without gain"
    gain, error = gain_over_last(seen)
    least, most = -gain - _SURE * error, -gain + _SURE * error
    figure = (
        f"the ensemble's loss less that of its last layer alone: {-gain:+.4f} nats a token "
        f"(95 % interval {least:+.4f} to {most:+.4f}); below 0 it predicts better"
    )
    runtime = log.summary.get("train_runtime")
    if runtime is not None:
        figure += f"; training took {runtime:.0f} s"
    if not most < 0:
        return Finding(
            name,
            "look",
            figure,
            "the mixture does not predict better than its last layer: see by depthmix compare "
            "whether LoRA alone does as well (with k: 1 the loss stays as lean)",
        )
    return Finding(name, "fine", figure)


def _chain(values: Sequence[float]) -> str:
    """Show how a figure went: first, turns left out, last."""
    turns = [b for (a, b), (_, c) in pairwise(pairwise(values)) if (b - a) * (c - b) < 0]
    shown = [values[0], *turns[:1], values[-1]]
    return " -> ".join(f"{value:.4g}" for value in shown)
