"""The training objective: cross-entropy of the ensemble, distillation, balance of the router."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from depthmix.config import MoDEConfig
from depthmix.method.fused_loss import EnsembleLoss, ensemble_loss
from depthmix.method.head import HeadProjection, LogitTransform
from depthmix.method.mixture import DepthMixture, mix


@dataclass(frozen=True)
class Objective:
    """The objective of n supervised tokens; see `EnsembleLoss` for the parts.

    Attributes:
        per_token: (n,) with the graph, token by token.
        loss: cross-entropy, divergence, entropy and correctness a token.
        gate: (n, k) weights of the late layers, detached.
        balance: (n,) KL(gate || uniform) in nats, detached.
    """

    per_token: Float[Tensor, " n"]
    loss: EnsembleLoss
    gate: Float[Tensor, "n k"]
    balance: Float[Tensor, " n"]

    @property
    def total(self) -> Float[Tensor, ""]:
        """The sum over the tokens."""
        return self.per_token.sum()


def training_objective(
    mixture: DepthMixture,
    normed: Float[Tensor, "n k d"],
    labels: Int[Tensor, " n"],
    head: HeadProjection,
    head_scale: float,
    transform: LogitTransform,
    hold_router: bool,
    further: bool = False,
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
        further: see `ensemble_loss`.
    """
    config = mixture.config
    states, gate = mixture.adapt(normed, hold_router)
    if head_scale != 1.0:
        states = states * head_scale
    late_states = states[:, :-1]
    if config.distill_into == "adaptation":
        # The same values by a graph that ends at the model's own states.
        late_states = mixture.adapt(normed.detach())[0][:, :-1] * head_scale
    tokens = _Tokens(states.to(head.dtype), late_states.to(head.dtype), gate, labels)
    loss = _loss(config, tokens, _Readout(head, transform, further))
    balance = (gate * gate.clamp_min(1e-30).log()).sum(dim=-1) + math.log(config.k)
    per_token = loss.per_token + config.balance_weight * balance
    return Objective(per_token, loss, gate.detach(), balance.detach())


@dataclass(frozen=True)
class _Tokens:
    """What the loss takes of n tokens."""

    states: Float[Tensor, "n k d"]
    late_states: Float[Tensor, "n l d"]
    gate: Float[Tensor, "n k"]
    labels: Int[Tensor, " n"]

    def __getitem__(self, rows: Int[Tensor, " m"]) -> _Tokens:
        return _Tokens(
            self.states[rows], self.late_states[rows], self.gate[rows], self.labels[rows]
        )


@dataclass(frozen=True)
class _Readout:
    """What makes logits of states, and what is measured of them."""

    head: HeadProjection
    transform: LogitTransform
    further: bool


def _loss(config: MoDEConfig, tokens: _Tokens, readout: _Readout) -> EnsembleLoss:
    """Distil on a random fraction of the tokens; the others need their mixture projected alone.

    Without gradients on all of them: an evaluation draws no random number.
    """
    count = len(tokens.labels)
    if config.distill_weight == 0 or config.k == 1:
        return _mixture_loss(tokens, readout)
    if config.distill_fraction == 1.0 or not torch.is_grad_enabled():
        return _layers_loss(config, tokens, config.distill_weight, readout)
    order = torch.randperm(count, device=tokens.labels.device)
    sampled = min(count, max(1, round(config.distill_fraction * count)))
    scale = count / max(sampled, 1)
    weight = config.distill_weight * scale
    distilled = _layers_loss(config, tokens[order[:sampled]], weight, readout)
    return _join(distilled, _mixture_loss(tokens[order[sampled:]], readout), order, scale)


def _layers_loss(
    config: MoDEConfig, tokens: _Tokens, weight: float, readout: _Readout
) -> EnsembleLoss:
    """Cross-entropy and distillation: the head runs on all k states of a token."""
    return ensemble_loss(
        tokens.states,
        tokens.gate,
        tokens.labels,
        readout.head,
        readout.transform,
        weight,
        config.divergence,
        tokens.late_states,
        config.distill_into == "layers",
        readout.further,
    )


def _mixture_loss(tokens: _Tokens, readout: _Readout) -> EnsembleLoss:
    """Cross-entropy alone: the head runs once a token, on the mixture."""
    head, transform = readout.head, readout.transform
    mixed = mix(tokens.states, tokens.gate).to(head.dtype).unsqueeze(1)
    whole = torch.ones_like(tokens.gate[:, :1])
    return ensemble_loss(
        mixed, whole, tokens.labels, head, transform, distill_weight=0.0, further=readout.further
    )


def _join(
    distilled: EnsembleLoss, others: EnsembleLoss, order: Int[Tensor, " n"], scale: float
) -> EnsembleLoss:
    """Put the tokens back in order; the sampled divergences stand for all tokens."""
    back = order.argsort()
    parts = {
        field.name: torch.cat([getattr(distilled, field.name), getattr(others, field.name)])[back]
        for field in dataclasses.fields(EnsembleLoss)
    }
    return EnsembleLoss(**{**parts, "divergence": parts["divergence"] * scale})
