"""What TRL's trainers read of a model that computes per-token values itself.

SFTTrainer takes minus the sum of `log_probs` as its loss, so that these are minus the objective.
DPO, GRPO, RLOO and KTO weigh `log_probs` themselves, by preferences and advantages: these are then
the ensemble's log-probabilities, and the distillation is a part of their gradient alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.utils.generic import ModelOutput

from depthmix.method.objective import Objective

IGNORED = -100  # label of a token that is not supervised


@dataclass(eq=False)
class Supervision:
    """The supervised tokens of one forward."""

    targets: Int[Tensor, "b t"]  # the token each position predicts, or IGNORED
    positions: Int[Tensor, " n"]  # of the supervised ones, in the flattened batch
    training: bool
    token_count: Tensor | int | None = None  # `num_items_in_batch`
    fused: bool = False  # called by TRL with `fused_lm_head=True`
    shifted_by_caller: bool = False
    asks_terms: bool = False  # whether the model's own loss is asked for its other terms
    normed: Float[Tensor, "n k d"] | None = None


@dataclass
class FusedLossOutput(ModelOutput):
    """Per-token values, (B, T - 1); zero where nothing is supervised."""

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


def fused_output(
    objective: Objective, supervision: Supervision, output: Any, beyond: bool, signed: bool
) -> FusedLossOutput:
    """Return what a trainer of TRL reads.

    Args:
        objective: of the supervised tokens.
        supervision: where they are.
        output: what the model gave.
        beyond: whether the trainer weighs the log-probabilities itself.
        signed: whether the distillation follows the sign of these weights.
    """
    targets, positions, loss = supervision.targets, supervision.positions, objective.loss

    def spread(values: Tensor) -> Tensor:
        """Put one value a supervised token back to its place in the batch."""
        flat = values.new_zeros(targets.numel())
        return flat.index_copy(0, positions.to(values.device), values).view(targets.shape)

    fields = {
        "log_probs": -spread(objective.per_token),
        "entropy": spread(loss.entropy),
        "is_top1": spread(loss.correct),
        "label_mask": targets != IGNORED,
    }
    if beyond:
        fields["log_probs"] = spread(weighed_by_the_caller(objective, signed))
        fields["mean_logits"] = spread(loss.mean_logits)
        fields["log_sum_sq_probs"] = spread(loss.log_sum_sq_probs)
    if not supervision.shifted_by_caller:
        fields = {name: value[:, :-1] for name, value in fields.items()}
    return FusedLossOutput(aux_loss=output.get("aux_loss"), **fields)


def weighed_by_the_caller(objective: Objective, signed: bool) -> Float[Tensor, " n"]:
    """Return the ensemble's log-probabilities, whose gradient carries the rest of the objective.

    A caller that takes `-A_t log p_t` as its loss then adds `A_t distillation_t` if it is signed:
    late layers are pulled towards the last one on tokens of good answers and pushed away on those
    of bad ones (OISD, arXiv 2605.29089). Otherwise every token's distillation, like the balance of
    the router, weighs what tokens weigh on average.
    """
    loss = objective.loss
    log_p, balance = -loss.cross_entropy, objective.per_token - loss.per_token
    if not signed:
        return _Beside.apply(log_p, loss.distillation + balance)  # type: ignore[no-untyped-call,no-any-return]
    log_p = log_p - (loss.distillation - loss.distillation.detach())
    return _Beside.apply(log_p, balance)  # type: ignore[no-untyped-call,no-any-return]


class _Beside(torch.autograd.Function):
    """Return the first; the backward minimises the second too, at the mean size of the weights."""

    @staticmethod
    def forward(_ctx: Any, log_p: Tensor, beside: Tensor) -> Tensor:
        return log_p.clone()

    @staticmethod
    def backward(_ctx: Any, weights: Tensor) -> tuple[Tensor, Tensor]:
        size = weights.abs().mean() if len(weights) else weights.sum()
        return weights, size.expand_as(weights)
