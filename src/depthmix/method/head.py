"""The LM head as the loss uses it: project a chunk of states, pull gradients back through it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to the head's output: bias, scale, soft cap (Marian, Cohere, Gemma 2).

    The cap is not linear, so it applies after the mixing: z = transform(sum_j g_j head(y_j)).
    """

    scale: float = 1.0
    cap: float | None = None
    bias: Float[Tensor, " v"] | None = None

    def __call__(self, raw: Tensor) -> Tensor:
        """Map the head's output to logits, both (..., vocabulary)."""
        if self.bias is not None:
            raw = raw + self.bias
        if self.cap is not None:
            return torch.tanh(raw * (self.scale / self.cap)) * self.cap
        return raw if self.scale == 1.0 else raw * self.scale

    def at(self, temperature: float) -> LogitTransform:
        """Return the transform to logits that are divided by a temperature as well."""
        if temperature == 1.0:
            return self
        cap = None if self.cap is None else self.cap / temperature
        return replace(self, scale=self.scale / temperature, cap=cap)

    def pull_back(self, logits: Tensor, d_logits: Tensor) -> Tensor:
        """Turn the gradient of the logits into that of the head's output, in place."""
        if self.cap is not None:
            d_logits.mul_(1 - (logits / self.cap).square())
        return d_logits if self.scale == 1.0 else d_logits.mul_(self.scale)


@dataclass(frozen=True)
class LogitGradients:
    """Gradients of one chunk's loss with respect to the head's output.

    Attributes:
        mixed: (c, v) of the ensemble's; its part of layer j is gate_j times it.
        late: (c, k - 1, v) of the late layers below the last, from the distillation, or None.
    """

    mixed: Float[Tensor, "c v"]
    late: Float[Tensor, "c l v"] | None

    def weighed(
        self, weights: Float[Tensor, " c"], late_weights: Float[Tensor, " c"]
    ) -> LogitGradients:
        """Return those of a loss in which each token has a weight of its own, or two."""
        late = None if self.late is None else self.late * late_weights.view(-1, 1, 1)
        return LogitGradients(self.mixed * weights.unsqueeze(1), late)


StateGradients = tuple[Float[Tensor, "c k d"], Float[Tensor, "c l d"] | None]


@runtime_checkable
class HeadProjection(Protocol):
    """One way to run the head on a chunk of states and to take its gradients.

    `tensors` are the parameters which the gradient reaches, if any. `accumulators` holds one
    running gradient for each (None where it needs none) and `pull_back` adds to them.
    """

    tensors: Sequence[Tensor]
    dtype: torch.dtype
    vocabulary: int

    def project(self, states: Float[Tensor, "c k d"]) -> Float[Tensor, "c k v"]:
        """Return the head's output, before the logit transform."""
        ...

    def pull_back(
        self,
        states: Float[Tensor, "c k d"],
        gate: Float[Tensor, "c k"],
        output: Float[Tensor, "c k v"],
        gradients: LogitGradients,
        accumulators: Sequence[Tensor | None],
        late_accumulators: Sequence[Tensor | None],
    ) -> StateGradients:
        """Return the gradients of the states, from the ensemble and from the distillation apart.

        Adds those of `tensors` to `accumulators`, those from the distillation to
        `late_accumulators`.
        """
        ...


class LinearHead:
    """A plain linear head. Its weight is read (and, under autocast, cast) once a step."""

    def __init__(self, weight: Float[Tensor, "v d"], bias: Float[Tensor, " v"] | None) -> None:
        self.tensors: Sequence[Tensor] = (weight,) if bias is None else (weight, bias)
        self.dtype = weight.dtype
        self.vocabulary = len(weight)
        self._weight = weight.detach()
        self._bias = None if bias is None else bias.detach()

    def project(self, states: Float[Tensor, "c k d"]) -> Float[Tensor, "c k v"]:
        """Return states @ weight.T + bias."""
        return F.linear(states, self._weight, self._bias)

    def pull_back(
        self,
        states: Float[Tensor, "c k d"],
        gate: Float[Tensor, "c k"],
        output: Float[Tensor, "c k v"],
        gradients: LogitGradients,
        accumulators: Sequence[Tensor | None],
        late_accumulators: Sequence[Tensor | None],
    ) -> StateGradients:
        """Take the gradients in closed form: one product for the ensemble, one a late layer."""
        scale = _scale(self.dtype)
        d_mixed = _scaled(gradients.mixed, scale).to(self.dtype)
        mixed_states = (gate.unsqueeze(-1) * states).sum(dim=1).to(self.dtype)
        self._accumulate(mixed_states, d_mixed, accumulators, scale)
        d_states = gate.unsqueeze(-1) * _unscaled(d_mixed @ self._weight, scale).unsqueeze(1)
        if gradients.late is None:
            return d_states, None
        d_late = _scaled(gradients.late, scale).to(self.dtype)
        late_states = states[:, :-1].flatten(0, 1)
        self._accumulate(late_states, d_late.flatten(0, 1), late_accumulators, scale)
        return d_states, _unscaled(d_late @ self._weight, scale)

    def _accumulate(
        self,
        states: Float[Tensor, "n d"],
        d_output: Float[Tensor, "n v"],
        accumulators: Sequence[Tensor | None],
        scale: float,
    ) -> None:
        d_weight, d_bias = accumulators[0], accumulators[1] if len(accumulators) > 1 else None
        if d_weight is not None and d_weight.dtype == self.dtype:
            d_weight.addmm_(d_output.T, states)
        elif d_weight is not None:
            d_weight.add_(_unscaled(d_output.T @ states, scale))
        if d_bias is not None:
            d_bias.add_(_unscaled(d_output.sum(dim=0), scale))


class ModuleHead:
    """Any other head (LoRA on it, in `modules_to_save`, quantised), called as a module."""

    def __init__(
        self,
        module: nn.Module,
        dtype: torch.dtype,
        vocabulary: int,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        self._module = module
        self.dtype = dtype
        self.vocabulary = vocabulary
        self._autocast_dtype = autocast_dtype
        self.tensors: Sequence[Tensor] = [p for p in module.parameters() if p.requires_grad]

    def project(self, states: Float[Tensor, "c k d"]) -> Float[Tensor, "c k v"]:
        """Call the module; the graph of this one chunk is kept for `pull_back`."""
        dtype = self._autocast_dtype
        autocast = torch.autocast(states.device.type, dtype=dtype, enabled=dtype is not None)
        with torch.enable_grad(), autocast:
            return self._module(states.requires_grad_())  # type: ignore[no-any-return]

    def pull_back(
        self,
        states: Float[Tensor, "c k d"],
        gate: Float[Tensor, "c k"],
        output: Float[Tensor, "c k v"],
        gradients: LogitGradients,
        accumulators: Sequence[Tensor | None],
        late_accumulators: Sequence[Tensor | None],
    ) -> StateGradients:
        """Take the gradients by autograd, through the chunk's own graph."""
        d_output = gate.unsqueeze(-1) * gradients.mixed.unsqueeze(1)
        d_states = self._autograd(states, output, d_output, accumulators)
        if gradients.late is None:
            return d_states, None
        d_output = F.pad(gradients.late, (0, 0, 0, 1))  # nothing for the last layer
        return d_states, self._autograd(states, output, d_output, late_accumulators)[:, :-1]

    def _autograd(
        self,
        states: Float[Tensor, "c k d"],
        output: Float[Tensor, "c k v"],
        d_output: Float[Tensor, "c k v"],
        accumulators: Sequence[Tensor | None],
    ) -> Float[Tensor, "c k d"]:
        scale = _scale(output.dtype)
        d_states, *d_tensors = torch.autograd.grad(
            output,
            [states, *self.tensors],
            _scaled(d_output, scale).to(output.dtype),
            allow_unused=True,
            retain_graph=True,
        )
        for accumulator, gradient in zip(accumulators, d_tensors, strict=True):
            if accumulator is not None and gradient is not None:
                accumulator.add_(_unscaled(gradient, scale))
        return _unscaled(d_states, scale)


def _scale(dtype: torch.dtype) -> float:
    """Return what gradients are multiplied with before they are rounded to a dtype.

    The loss takes its gradients in the forward, before a GradScaler can lift them: in fp16 all
    below 6e-8 would be lost.
    """
    return 2.0**10 if dtype == torch.float16 else 1.0


def _scaled(gradient: Tensor, scale: float) -> Tensor:
    return gradient if scale == 1.0 else gradient * scale


def _unscaled(gradient: Tensor, scale: float) -> Tensor:
    return gradient if scale == 1.0 else gradient.float() / scale


def head_projection(
    head: nn.Module, dtype: torch.dtype, vocabulary: int, autocast_dtype: torch.dtype | None
) -> HeadProjection:
    """Return the fastest projection that is right for this head.

    Args:
        head: what `get_output_embeddings()` returns now; PEFT may have wrapped it.
        dtype: dtype of the model's hidden states.
        vocabulary: outputs of the head.
        autocast_dtype: dtype of the autocast region that the model ran in, None outside of one.
    """
    # accelerate's offloading replaces `forward` on the instance; such a weight may not be there.
    if type(head) is not nn.Linear or "forward" in vars(head):
        return ModuleHead(head, dtype, vocabulary, autocast_dtype)
    target = autocast_dtype or head.weight.dtype
    bias: Tensor | None = head.bias
    return LinearHead(head.weight.to(target), None if bias is None else bias.to(target))
