"""The budgets side by side, as `depthmix info` shows them for any model."""

from __future__ import annotations

import copy
from typing import Any

from depthmix.commands.plan import default_lora
from depthmix.errors import ConfigError
from depthmix.tables import print_figures


def side_by_side(model: Any, trust_remote_code: bool = False) -> dict[str, dict[str, Any]]:
    """Return what each budget trains and takes, counted as `depthmix plan` does."""
    from depthmix.model.active import host_of
    from depthmix.plan.methods import OF_BUDGETS
    from depthmix.plan.profile import Setting
    from depthmix.plan.report import count

    methods = OF_BUDGETS
    try:
        bills = count(
            copy.deepcopy(host_of(model).config),
            Setting(rows=1, length=256, trust_remote_code=trust_remote_code),
            methods,
            k=1,
            rank=1,
            adapter=default_lora,
            checkpointing=lambda _: False,
        ).bills
    except ConfigError:  # a model that cannot be counted
        return {}
    full = bills["full"]
    return {
        name: {
            "tuned_layers": bill.tuned_layers,
            "rank": methods[name].rank,
            "trained": bill.trained,
            "share": bill.trained / full.trained,
            "saved_bytes": bill.adapter_bytes,
            "step": bill.flops.step / full.flops.step,
            "cached": bill.flops.cached and bill.flops.cached / full.flops.step,
        }
        for name, bill in bills.items()
    }


def print_budgets(budgets: dict[str, dict[str, Any]]) -> None:
    """Print what `side_by_side` returned."""
    print_figures(
        "budgets; a step by count of products, later epochs from cached depth",
        ("budget", "layers", "rank", "trained", "of full", "MB", "step", "later"),
        [
            [
                name,
                str(row["tuned_layers"]),
                str(row["rank"]),
                f"{row['trained']:,}",
                f"{row['share']:.1%}",
                f"{row['saved_bytes'] / 1e6:.1f}",
                f"{row['step']:.2f}",
                f"{row['cached']:.2f}" if row["cached"] else "-",
            ]
            for name, row in budgets.items()
        ],
    )
