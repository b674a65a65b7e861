"""Budgets by name: how deep and how wide the tuning method is, at what rate.

Their settings were chosen on validation rows, see docs/experiments.md; what each keeps and costs is
in docs/budgets.md.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Settings of LoRA (or DoRA), beside which everything else stays as it is.

    Attributes:
        tuned_layers: how many of the last layers carry it: "all" or "half".
        rank: of its matrices. Its scale stays at 2: alpha is twice the rank.
        rate: its learning rate over that of the full budget; a low rank wants a higher one.
    """

    tuned_layers: str
    rank: int
    rate: float

    def options(self) -> dict[str, str]:
        """Return options of `depthmix train`, as one would write them."""
        return {
            "tuned_layers": self.tuned_layers,
            "lora_r": str(self.rank),
            "lora_alpha": str(2 * self.rank),
        }


BUDGETS = {
    "full": Budget("all", rank=16, rate=1.0),
    "half": Budget("half", rank=16, rate=1.0),
    "light": Budget("half", rank=1, rate=2.0),
}
