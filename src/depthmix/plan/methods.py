"""The methods that `depthmix plan` sets side by side: what is tuned, how deep, MoDE or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from depthmix.budgets import BUDGETS
from depthmix.carry.depth import TunedLayers, count_of

Tuning = Literal["lora", "full", "none"]


@dataclass(frozen=True)
class Method:
    """One row of the plan.

    Attributes:
        tuning: what is trained in the layers.
        depth: how many of the last layers carry it, or "k" for MoDE's late layers.
        mode: whether MoDE is attached; the loss is the fused one either way.
        rank: of LoRA; None for the one that is asked for.
    """

    tuning: Tuning
    depth: TunedLayers = "all"
    mode: bool = False
    rank: int | None = None

    def tuned(self, layers: int, k: int) -> int:
        """Return how many of a model's layers are tuned.

        Raises:
            ConfigError: the model has not that many.
        """
        if self.tuning == "none":
            return 0
        return count_of(k if self.depth == "k" else self.depth, layers)


OF_BUDGETS = {name: Method("lora", b.tuned_layers, rank=b.rank) for name, b in BUDGETS.items()}

METHODS: dict[str, Method] = {
    "lora": Method("lora"),
    "lora+mode": Method("lora", mode=True),
    "half": Method("lora", BUDGETS["half"].tuned_layers),
    "light": OF_BUDGETS["light"],
    "late-lora+mode": Method("lora", "k", mode=True),
    "mode": Method("none", mode=True),
    "full": Method("full"),
}
