"""`ClassifierRuntime`: the hooks of a model that classifies sequences.

The model computes its own loss, on the scores of the mixture; distillation and balance are added
to it. What the head gets of each late layer is mixed before the model picks a token (decoders) or
after (encoders), which is the same to a linear head.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from depthmix.config import Divergence
from depthmix.discovery import Anatomy
from depthmix.divergences import DIVERGENCES
from depthmix.mixture import DepthMixture
from depthmix.runtime import LOSS_LABEL, Runtime, require_trainable


class ClassifierRuntime(Runtime):
    """Hooks of a classifier: the mixture, and in training with labels what joins the loss."""

    def __init__(self, host: PreTrainedModel, anatomy: Anatomy) -> None:
        super().__init__(host, anatomy)
        self._in_training = False
        self._seen: _Seen | None = None
        head = host.get_submodule(anatomy.head_path)
        self._handles.append(head.register_forward_hook(self.on_scores))

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """See whether this is a training forward with labels."""
        self._seen = None
        mixture = self.mixture_at_work()
        given = {**dict(zip(self.forward_names, args, strict=False)), **kwargs}
        self._in_training = module.training and given.get("labels") is not None
        if self._in_training and mixture is not None:
            require_trainable(self.host, mixture)

    def select(self, states: Tensor) -> Tensor:
        """Return all rows."""
        return states

    def receive(
        self, mixture: DepthMixture, normed: Float[Tensor, "*b k d"]
    ) -> Float[Tensor, "*b d"]:
        """Return the mixture; in training keep the states for the distillation."""
        if self._in_training:
            self._seen = _Seen(normed)
        return self.mix(mixture, normed)

    def on_scores(self, head: nn.Module, _args: Any, scores: Tensor) -> None:
        """Keep the scores of the mixture, and the module that gave them (PEFT may copy heads)."""
        if self._seen is not None:
            self._seen.head, self._seen.scores = head, scores.detach()

    def after_forward(
        self, _module: nn.Module, _args: Any, _kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Add distillation and balance to the loss of a training forward."""
        seen, self._seen = self._seen, None
        mixture = self.mixture_at_work()
        if seen is None or mixture is None or output is None:  # None: the forward raised
            return None
        loss, scores = output[:2] if isinstance(output, tuple) else (output.loss, output.logits)
        with record_function(LOSS_LABEL):
            loss = loss + self._further_loss(mixture, seen, seen.picked(scores), loss.detach())
        if isinstance(output, ModelOutput):
            return type(output)(**{**output, "loss": loss})
        return (loss, *output[1:])

    def _further_loss(
        self, mixture: DepthMixture, seen: _Seen, normed: Float[Tensor, "b k d"], loss: Tensor
    ) -> Float[Tensor, ""]:
        """Return the means of lambda x distillation and of balance_weight x balance over rows."""
        config = mixture.config
        states, gate = mixture.weigh(normed, self.hold_router)
        if config.distill_into == "adaptation":
            states, _ = mixture.weigh(normed.detach())
        divergence = gate.new_zeros(len(gate))
        if config.distill_weight > 0:
            several = self.host.config.problem_type == "multi_label_classification"
            scores = seen.project(states.to(normed.dtype)).float()
            divergence = distillation(scores, config.divergence, several)
        balance = (gate * gate.clamp_min(1e-30).log()).sum(dim=-1) + math.log(config.k)
        self.statistics.add(gate.detach(), loss.expand(len(gate)), divergence.detach())
        return (config.distill_weight * divergence + config.balance_weight * balance).mean()


class _Seen:
    """What passed the head in one training forward."""

    def __init__(self, normed: Float[Tensor, "b *t k d"]) -> None:
        self.normed = normed
        self.head: Any = None
        self.scores: Tensor | None = None

    def picked(self, logits: Float[Tensor, "b c"]) -> Float[Tensor, "b k d"]:
        """Return the states of the token that the model picked of each row.

        Known by its scores: two tokens of equal scores have equal states, as far as these matter.
        """
        if self.normed.ndim == 3:
            return self.normed
        assert self.scores is not None
        token = (self.scores == logits.detach().unsqueeze(1)).all(dim=-1).int().argmax(dim=1)
        return self.normed[torch.arange(len(token), device=token.device), token]

    def project(self, states: Float[Tensor, "b k d"]) -> Float[Tensor, "b k c"]:
        """Return the scores of every layer alone, past the hooks of the head: they are ours."""
        return self.head.forward(states)  # type: ignore[no-any-return]


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
