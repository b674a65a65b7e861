"""Running means of what MoDE did in training or evaluation, for the trainer's logs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

ROUTER_WEIGHT = "router_weight/layer_"  # and the layer, counted from 0


class Statistics:
    """Sums over supervised tokens (rows, of a classifier) since the last `take`.

    They are tensors on the model's device: adding never waits for the device.
    """

    def __init__(self, layers: tuple[int, ...]) -> None:
        self._layers = layers
        # A device each: the replicas of DataParallel add from threads of their own.
        self._sums: dict[torch.device, Tensor] = {}
        self.forwards = 0  # those with a graph

    def clear(self) -> None:
        """Forget everything: a run begins."""
        self._sums, self.forwards = {}, 0

    def add(
        self,
        gate: Float[Tensor, "n k"],
        cross_entropy: Float[Tensor, " n"],
        divergence: Float[Tensor, " n"],
    ) -> None:
        """Add the tokens of one forward."""
        self.forwards += torch.is_grad_enabled()
        parts = [
            torch.full_like(gate[:, 0], 1.0),
            cross_entropy.detach(),
            divergence.detach(),
            -(gate * gate.clamp_min(1e-30).log()).sum(dim=-1),
            *gate.unbind(dim=-1),
        ]
        sums = torch.stack([part.sum(dtype=torch.float64) for part in parts])
        before = self._sums.get(sums.device)
        self._sums[sums.device] = sums if before is None else before + sums

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Forget what the block adds."""
        sums, forwards = dict(self._sums), self.forwards
        try:
            yield
        finally:
            self._sums, self.forwards = sums, forwards

    def are_finite(self) -> bool:
        """Tell whether no loss since the last `take` was infinite or NaN. Waits for the device."""
        return all(bool(sums.isfinite().all()) for sums in self._sums.values())

    def take(self) -> Tensor | None:
        """Return the sums, which processes may add up, and start anew; None if there are none."""
        parts, self._sums = list(self._sums.values()), {}
        return sum((part.to(parts[0].device) for part in parts[1:]), parts[0]) if parts else None

    def summarize(self, sums: Tensor) -> dict[str, float]:
        """Turn sums into means a token, named as they appear in the logs; none of no token."""
        count, *totals = sums.tolist()
        if count == 0:
            return {}
        names = [
            "ce_loss",
            "distill_loss",
            "router_entropy",
            *(f"{ROUTER_WEIGHT}{layer}" for layer in self._layers),
        ]
        return {name: total / count for name, total in zip(names, totals, strict=True)}
