"""Parameter groups: router, norms and the tuning method each learn at a rate of their own."""

from __future__ import annotations

from typing import Any

from torch import nn

from depthmix.method.mixture import MODULE_NAME

# Chosen by experiment, see docs/experiments.md.
ROUTER_LR = 1e-2
NORM_LR = 3e-3


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    router_lr: float = ROUTER_LR,
    norm_lr: float = NORM_LR,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Return optimiser parameter groups, empty ones left out.

    For an unmodified Trainer or SFTTrainer::

        groups = depthmix.param_groups(model, lr=2e-4)
        Trainer(..., optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups, "lr": 2e-4}))

    Args:
        model: the attached model.
        lr: learning rate of everything that is not MoDE's.
        router_lr: of the router, whose input has length 1.
        norm_lr: of the late layers' own norms (and maps); a norm at a LoRA's rate learns nothing.
        weight_decay: for the tuning method's matrices. MoDE's parameters have none.
    """
    rates = {"router": router_lr, "norm": norm_lr}
    members: dict[tuple[str | None, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = _part(name)
        decay = weight_decay if part is None and parameter.ndim > 1 else 0.0
        members.setdefault((part, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rates.get(part or "", lr), "weight_decay": decay}
        for (part, decay), parameters in members.items()
    ]


def shares_rate(model: nn.Module, groups: list[dict[str, Any]]) -> bool:
    """Tell whether some group holds parameters of MoDE beside those of the tuning method."""
    own = {id(p) for name, p in model.named_parameters() if _part(name)}
    mixed = [{id(p) in own for p in group["params"]} for group in groups]
    return any(len(kinds) == 2 for kinds in mixed)


def _part(name: str) -> str | None:
    """Return the part of MoDE that a parameter belongs to, or None."""
    path = name.split(".")
    if MODULE_NAME not in path:
        return None
    return next((part for part in path if part in ("router", "norm")), None)
