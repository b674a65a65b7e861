"""The rule: from what the probe has measured to `k` and `tuned_layers`.

**tuned_layers** is the smallest number of last layers that hold a third of the gradient: of the sum
over the layers of the norm of the task's gradient with respect to what is tuned. The gradient tells
where a small step would do most; it is spread over all layers, and a third of it has been enough:
see docs/probe.md for how much each share kept.

**k** counts the last layers that predict, through their fitted map, at a loss no more than a
twentieth above the last layer's, without a gap and at most four: the loss takes a product with the
head for each, and more than the paper's three has never helped here. Where not even the layer below
the last one does, k is 1, and there is no mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

GRADIENT_SHARE = 1 / 3
LOSS_RATIO = 1.05
MOST_K = 4


@dataclass(frozen=True)
class Choice:
    """What is recommended, and why.

    Attributes:
        k: late layers.
        tuned_layers: last layers that carry the tuning method; None where none can be restricted.
        reasons: a line for each.
    """

    k: int
    tuned_layers: int | None
    reasons: tuple[str, ...]


def choose(fitted_loss: Sequence[float], gradients: Sequence[float]) -> Choice:
    """Apply the rule.

    Args:
        fitted_loss: of each layer through its fitted map, the last layer last, in nats.
        gradients: norm of the gradient of each layer; empty where nothing is tuned.
    """
    k, why_k = _late(fitted_loss)
    if not gradients:
        return Choice(k, None, (why_k,))
    depth, why_depth = _depth(gradients)
    return Choice(k, depth, (why_k, why_depth))


def shares(gradients: Sequence[float]) -> list[float]:
    """Return the share of the gradient that each layer and those above it hold."""
    total = sum(gradients)
    return [sum(gradients[layer:]) / total if total else 0.0 for layer in range(len(gradients))]


def _late(losses: Sequence[float]) -> tuple[int, str]:
    *below, last = losses
    limit = last * LOSS_RATIO
    good = takewhile(lambda loss: loss <= limit, reversed(below))
    k = min(MOST_K, 1 + sum(1 for _ in good))
    if k == 1:
        return 1, (
            "k = 1: no layer below the last predicts within 5 % of its loss "
            f"({_listed(losses[-2:])}): nothing to mix"
        )
    return k, f"k = {k}: the last layers, fitted, stand within 5 %: {_listed(losses[-k:])}"


def _depth(gradients: Sequence[float]) -> tuple[int, str]:
    held = shares(gradients)
    total = len(gradients)
    depth = next((n for n in range(1, total) if held[-n] >= GRADIENT_SHARE), total)
    return depth, (
        f"tuned_layers = {depth} of {total}: the last {depth} hold {held[-depth]:.0%} of the "
        "gradient's norm"
    )


def _listed(losses: Sequence[float]) -> str:
    return ", ".join(f"{loss:.3f}" for loss in losses)
