"""The training objective: cross-entropy of the ensemble, distillation, balance of the router."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from depthmix.head import HeadProjection, LogitTransform
from depthmix.losses import EnsembleLoss, ensemble_loss
from depthmix.mixture import DepthMixture, mix


@dataclass(frozen=True)
class Objective:
    """The objective of n supervised tokens; see `EnsembleLoss` for the parts.

    Attributes:
        total: sum over the tokens, with the graph.
        per_token: (n,) the same, a token each, detached.
        loss: cross-entropy, divergence, entropy and correctness a token.
        gate: (n, k) weights of the late layers, detached.
        balance: (n,) KL(gate || uniform) in nats, detached.
    """

    total: Float[Tensor, ""]
    per_token: Float[Tensor, " n"]
    loss: EnsembleLoss
    gate: Float[Tensor, "n k"]
    balance: Float[Tensor, " n"]


def training_objective(
    mixture: DepthMixture,
    normed: Float[Tensor, "n k d"],
    labels: Int[Tensor, " n"],
    head: HeadProjection,
    head_scale: float,
    transform: LogitTransform,
    hold_router: bool,
) -> Objective:
    """Return the objective of the supervised tokens.

        sum over tokens of CE(ensemble, y) + lambda mean_{j<N} D(sg[p_N] || p_j)
                           + balance_weight KL(gate || uniform)

    Args:
        mixture: the norms and the router.
        normed: output of the model's final norm for each late layer, the last layer last.
        labels: the token that each position must predict.
        head: the LM head.
        head_scale: constant between the final norm and the head.
        transform: what the model does to the head's output.
        hold_router: give the router a zero gradient (warm-up phase).
    """
    config = mixture.config
    states, gate = mixture.weigh(normed)
    if hold_router:
        # Zero, not none: data-parallel training waits for the gradient of every parameter.
        gate = gate.detach() + 0.0 * gate
    if head_scale != 1.0:
        states = states * head_scale
    loss = _loss(mixture, states.to(head.dtype), gate, labels, head, transform)
    balance = (gate * gate.clamp_min(1e-30).log()).sum(dim=-1) + math.log(config.k)
    total = loss.total + config.balance_weight * balance.sum()
    per_token = (
        loss.cross_entropy
        + config.distill_weight * loss.divergence
        + config.balance_weight * balance.detach()
    )
    return Objective(total, per_token, loss, gate.detach(), balance.detach())


def _loss(
    mixture: DepthMixture,
    states: Float[Tensor, "n k d"],
    gate: Float[Tensor, "n k"],
    labels: Int[Tensor, " n"],
    head: HeadProjection,
    transform: LogitTransform,
) -> EnsembleLoss:
    """Project k states of the tokens that are distilled on, and the mixture of the others."""
    config = mixture.config
    fraction = config.distill_fraction if config.distill_weight > 0 else 0.0
    if fraction == 1.0:
        return ensemble_loss(
            states, gate, labels, head, transform, config.distill_weight, config.divergence
        )
    order = torch.randperm(len(labels), device=labels.device)
    count = min(len(labels), max(1, round(fraction * len(labels)))) if fraction else 0
    distilled, others = order[:count], order[count:]
    weight = config.distill_weight * len(labels) / count if count else 0.0
    with_layers = ensemble_loss(
        states[distilled],
        gate[distilled],
        labels[distilled],
        head,
        transform,
        weight,
        config.divergence,
    )
    mixed = mix(states[others], gate[others]).to(head.dtype).unsqueeze(1)
    without = ensemble_loss(
        mixed, torch.ones_like(gate[others, :1]), labels[others], head, transform, 0.0
    )
    return _join(with_layers, without, order, scale=len(labels) / count if count else 0.0)


def _join(
    distilled: EnsembleLoss, others: EnsembleLoss, order: Int[Tensor, " n"], scale: float
) -> EnsembleLoss:
    """Put the tokens back in order; the sampled divergences stand for all tokens."""
    back = order.argsort()
    return EnsembleLoss(
        distilled.total + others.total,
        torch.cat([distilled.cross_entropy, others.cross_entropy])[back],
        torch.cat([distilled.divergence * scale, others.divergence])[back],
        torch.cat([distilled.entropy, others.entropy])[back],
        torch.cat([distilled.correct, others.correct])[back],
    )
