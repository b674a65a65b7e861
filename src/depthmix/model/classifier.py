"""`ClassifierTask`: a model that classifies sequences.

The model computes its own loss, on the scores of the mixture; distillation and balance are added
to it. What the head gets of each late layer is mixed before the model picks a token (decoders) or
after (encoders), which is the same to a linear head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.profiler import record_function
from transformers.utils.generic import ModelOutput

from depthmix.config import Divergence
from depthmix.method.divergences import DIVERGENCES
from depthmix.model.active import require_trainable
from depthmix.model.forward import Forward
from depthmix.model.language import LOSS_LABEL

if TYPE_CHECKING:
    from depthmix.model.runtime import Runtime


class ClassifierTask:
    """A classifier: the mixture, and in training with labels what joins the loss."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def begin(self, forward: Forward, kwargs: dict[str, Any]) -> dict[str, Any]:
        """See whether there are labels, in training or in an evaluation within a Trainer."""
        if kwargs.get("labels") is None or forward.mixture.config.k == 1:
            return kwargs
        if forward.host.training:
            require_trainable(forward.host, forward.mixture)
        if forward.host.training or self.runtime.trainer is not None:
            forward.task = _HeadCall()
        return kwargs

    def select(self, _forward: Forward, states: Tensor) -> Tensor:
        """Return all rows."""
        return states

    def combine(self, forward: Forward, normed: Float[Tensor, "*b k d"]) -> Float[Tensor, "*b d"]:
        """Return the mixture, and keep the states for the distillation."""
        if forward.task is not None:
            forward.task.normed = normed
            forward.note_autocast(normed.device.type)
        return self.runtime.mix(forward, normed)

    def on_scores(self, head: nn.Module, _args: Any, scores: Tensor) -> None:
        """Keep the scores of the mixture, and the module that gave them (PEFT may copy heads)."""
        forward = self.runtime.current()
        if forward is not None and forward.task is not None and not forward.task.complete:
            forward.task.head, forward.task.scores = head, scores.detach()

    def finish(self, forward: Forward, output: Any) -> Any:
        """Add distillation and balance to the loss of a training forward, and measure them."""
        call: _HeadCall | None = forward.task
        if call is None:
            return None
        loss, scores = output[:2] if isinstance(output, tuple) else (output.loss, output.logits)
        call.complete = True
        dtype, device_type = forward.autocast, loss.device.type
        with (
            record_function(LOSS_LABEL),
            torch.autocast(device_type, dtype=dtype, enabled=dtype is not None),
        ):
            further = self._further_loss(forward, call, call.picked(scores), loss.detach())
        if not forward.host.training:
            return None
        loss = loss + further
        if isinstance(output, ModelOutput):
            return type(output)(**{**output, "loss": loss})
        return (loss, *output[1:])

    def _further_loss(
        self, forward: Forward, call: _HeadCall, normed: Float[Tensor, "b k d"], loss: Tensor
    ) -> Float[Tensor, ""]:
        """Return the means of lambda x distillation and of balance_weight x balance over rows."""
        mixture, config = forward.mixture, forward.mixture.config
        several = forward.host.config.problem_type == "multi_label_classification"

        def divergence_of(states: Tensor) -> Float[Tensor, " b"]:
            scores = call.head(states.to(normed.dtype)).float()
            return distillation(scores, config.divergence, several)

        states, gate = mixture.adapt(normed, self.runtime.hold_router)
        divergence = gate.new_zeros(len(gate))
        if config.distill_weight > 0 and config.distill_into == "layers":
            divergence = divergence_of(states)
        elif config.distill_weight > 0:
            divergence = _by_states_alone(divergence_of, mixture.adapt(normed.detach())[0])
        balance = (gate * gate.clamp_min(1e-30).log()).sum(dim=-1) + math.log(config.k)
        self.runtime.figures(forward.host.training).add(
            gate.detach(), loss.expand(len(gate)), divergence.detach()
        )
        return (config.distill_weight * divergence + config.balance_weight * balance).mean()


class _HeadCall:
    """What passed the head in one training forward."""

    normed: Float[Tensor, "b *t k d"]
    head: Any
    scores: Tensor
    complete = False  # the head then runs once more, for the layers alone

    def picked(self, logits: Float[Tensor, "b c"]) -> Float[Tensor, "b k d"]:
        """Return the states of the token that the model picked of each row.

        Known by its scores: two tokens of equal scores have equal states, as far as these matter.
        """
        if self.normed.ndim == 3:
            return self.normed
        token = (self.scores == logits.detach().unsqueeze(1)).all(dim=-1).int().argmax(dim=1)
        return self.normed[torch.arange(len(token), device=token.device), token]


def _by_states_alone(
    divergence: Callable[[Tensor], Float[Tensor, " b"]], states: Float[Tensor, "b k d"]
) -> Float[Tensor, " b"]:
    """Return the divergence of every row, whose gradient reaches the states and nothing else."""
    with torch.enable_grad():
        leaf = states.detach().requires_grad_()
        values = divergence(leaf)
        (slopes,) = torch.autograd.grad(values.sum(), leaf)
    return values.detach() + ((states - states.detach()) * slopes).flatten(1).sum(dim=-1)


def distillation(
    scores: Float[Tensor, "b k c"], divergence: Divergence, several: bool
) -> Float[Tensor, " b"]:
    """Return the mean divergence of the late layers from the last one, a constant, for every row.

    Args:
        scores: of every layer alone, the last layer last.
        divergence: which.
        several: a row may have several classes; each is then a choice of its own, and the mean
            over the classes is taken. Otherwise one softmax over the classes. (The one output of a
            regression is a softmax over one class, whose divergence is zero.)
    """
    if several:
        pairs = torch.stack([scores, torch.zeros_like(scores)], dim=-1)
        rows = pairs.movedim(2, 1).flatten(0, 1)
    else:
        rows = scores
    log_probs = rows.log_softmax(dim=-1)
    with torch.no_grad():
        values, slopes = DIVERGENCES[divergence](log_probs[:, -1:], log_probs[:, :-1])
    late = rows[:, :-1]
    values = values + ((late - late.detach()) * slopes).sum(dim=-1)  # the gradient in closed form
    return values.mean(dim=-1).view(len(scores), -1).mean(dim=-1)
