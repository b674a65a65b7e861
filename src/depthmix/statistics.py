"""Running means of what MoDE did in training, for the trainer's logs."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class TrainingStatistics:
    """Sums over supervised tokens (rows, of a classifier) since the last `take`.

    They are tensors on the model's device: adding never waits for the device.
    """

    def __init__(self, layers: tuple[int, ...]) -> None:
        self._layers = layers
        self._sums: Tensor | None = None

    def add(
        self,
        gate: Float[Tensor, "n k"],
        cross_entropy: Float[Tensor, " n"],
        divergence: Float[Tensor, " n"],
    ) -> None:
        """Add the tokens of one forward."""
        parts = [
            torch.full_like(gate[:, 0], 1.0),
            cross_entropy,
            divergence,
            -(gate * gate.clamp_min(1e-30).log()).sum(dim=-1),
            *gate.unbind(dim=-1),
        ]
        sums = torch.stack([part.sum(dtype=torch.float64) for part in parts])
        self._sums = sums if self._sums is None else self._sums + sums

    def are_finite(self) -> bool:
        """Tell whether no loss since the last `take` was infinite or NaN. Waits for the device."""
        return self._sums is None or bool(self._sums.isfinite().all())

    def take(self) -> Tensor | None:
        """Return the sums, which processes may add up, and start anew; None if there are none."""
        sums, self._sums = self._sums, None
        return sums

    def summarize(self, sums: Tensor) -> dict[str, float]:
        """Turn sums into means a token, named as they appear in the logs."""
        count, *totals = sums.tolist()
        names = [
            "ce_loss",
            "distill_loss",
            "router_entropy",
            *(f"router_weight/layer_{layer}" for layer in self._layers),
        ]
        return {name: total / max(count, 1) for name, total in zip(names, totals, strict=True)}
