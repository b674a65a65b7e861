"""The fused loss: ensemble cross-entropy and distillation, one chunk of tokens at a time.

For every chunk the logits of the k late layers are made once; the ensemble's logits are their
gated sum. The gradients have a closed form (softmax minus one-hot, softmax minus teacher), so
they are taken at once, in the forward pass: neither logits nor recomputation outlive a chunk.
The idea of a loss that never holds tokens x vocabulary is that of Cut Cross-Entropy (Wijmans et
al., arXiv 2411.09009) and of Liger Kernel; the gated sum and the distillation are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from depthmix.config import Divergence
from depthmix.method.divergences import DIVERGENCES
from depthmix.method.head import HeadProjection, LogitGradients, LogitTransform

# Bytes of one chunk's logits. Small enough to be nothing beside a model, large enough that the
# matrix products run at full speed; measured with `depthmix bench`.
CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class EnsembleLoss:
    """The loss of n supervised tokens. The first three carry the graph, token by token.

    Attributes:
        cross_entropy: (n,) of the ensemble, in nats.
        distillation: (n,) weight x divergence.
        divergence: (n,) mean over the late layers below the last, in nats; zero where nothing was
            distilled.
        entropy: (n,) of the ensemble's prediction, in nats, detached.
        correct: (n,) whether the label is the ensemble's most likely token.
        mean_logits: (n,) mean of the ensemble's logits over the vocabulary, detached; zero unless
            asked for with `further`, as is the next.
        log_sum_sq_probs: (n,) log of the sum of its squared probabilities, detached.
    """

    cross_entropy: Float[Tensor, " n"]
    distillation: Float[Tensor, " n"]
    divergence: Float[Tensor, " n"]
    entropy: Float[Tensor, " n"]
    correct: Tensor
    mean_logits: Float[Tensor, " n"]
    log_sum_sq_probs: Float[Tensor, " n"]

    @property
    def per_token(self) -> Float[Tensor, " n"]:
        """Cross-entropy and distillation."""
        return self.cross_entropy + self.distillation

    @property
    def total(self) -> Float[Tensor, ""]:
        """The sum over the tokens."""
        return self.per_token.sum()


def ensemble_loss(
    states: Float[Tensor, "n k d"],
    gate: Float[Tensor, "n k"],
    labels: Int[Tensor, " n"],
    head: HeadProjection,
    transform: LogitTransform,
    distill_weight: float,
    divergence: Divergence = "kl",
    late_states: Float[Tensor, "n l d"] | None = None,
    distil_head: bool = True,
    further: bool = False,
) -> EnsembleLoss:
    """Return the loss of MoDE (arXiv 2410.13077, section 3) and its parts.

    Equal, to rounding, to the following, which holds k + 1 tensors of n x vocabulary::

        raw = head(states)                              # (n, k, v)
        logits = transform(raw)
        ensemble = transform((gate[..., None] * raw).sum(1))
        per_token = cross_entropy(ensemble, labels, reduction="none")
        teacher = logits[:, -1].detach()
        per_token += distill_weight * mean over j < k of KL(teacher || logits[:, j])

    Whatever weighs the tokens afterwards (a mean, advantages, preferences) gets its gradients:
    those of the states and the gate are kept a token each, and scaled; those of a trained head are
    summed up in the forward, and again in the backward if the tokens turn out to weigh differently.

    Args:
        states: normed states of the late layers, the last layer last; any float type.
        gate: weights of the layers, which add up to 1.
        labels: token ids; every one supervised.
        head: the LM head.
        transform: what the model does to the head's output.
        distill_weight: lambda; 0 leaves the distillation out, and so does k = 1.
        divergence: how far a layer is from the last one.
        late_states: if given, the values of `states[:, :-1]` again, made by another graph, which
            the distillation's gradient takes instead.
        distil_head: whether the distillation's gradient reaches the head's own parameters.
        further: measure what preference and reward training logs beside.
    """
    if late_states is None:
        late_states = states[:, :-1]
    terms = _Terms(head, transform, distill_weight, divergence, distil_head, further)
    cross_entropy, distance, entropy, correct, mean_logits, log_sum_sq = _EnsembleLoss.apply(  # type: ignore[no-untyped-call]
        states, late_states, gate, labels, terms, torch.is_grad_enabled(), *head.tensors
    )
    return EnsembleLoss(
        cross_entropy,
        distill_weight * distance,
        distance,
        entropy,
        correct.bool(),
        mean_logits,
        log_sum_sq,
    )


@dataclass(frozen=True)
class _Terms:
    """What the loss is made of, beside tensors that carry a graph."""

    head: HeadProjection
    transform: LogitTransform
    distill_weight: float
    divergence: Divergence
    distil_head: bool
    further: bool

    def late(self, d_head: list[Tensor | None]) -> list[Tensor | None]:
        """Return where the distillation's gradient of the head goes, if anywhere."""
        return d_head if self.distil_head else [None] * len(d_head)


class _EnsembleLoss(torch.autograd.Function):
    """The chunk loop: losses and gradients in the forward, a scaling in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        late_states: Tensor,
        gate: Tensor,
        labels: Tensor,
        terms: _Terms,
        with_gradients: bool,
        *head_tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        # fp16 would lose what is small before a GradScaler lifts it: see `_scale` in head.py.
        kept = torch.float32 if states.dtype == torch.float16 else states.dtype
        d_states, d_gate = torch.empty_like(states, dtype=kept), torch.empty_like(gate)
        d_late_states = torch.zeros_like(late_states, dtype=kept)
        d_head = [_accumulator(tensor) for tensor in head_tensors]
        # One buffer for all tokens: a small tensor that outlives its chunk would lie in the middle
        # of the memory that the chunk gives back, and the allocator could not use it again.
        values = gate.new_empty(len(_ChunkLoss.VALUES), len(labels))
        # The arithmetic is in fp32 whatever autocast says: bmm would run in half precision.
        with torch.autocast(states.device.type, enabled=False):
            for rows in _chunks(states, terms.head):
                # Each name takes over from the last chunk's: the allocator knows these sizes.
                chunk, output, raw = _projected(states[rows], terms.head)
                loss = _chunk_loss(raw, gate[rows], labels[rows], terms)
                values[:, rows] = loss.values
                if with_gradients:
                    d_gate[rows] = loss.d_gate
                    d_states[rows], d_late = terms.head.pull_back(
                        chunk, gate[rows], output, loss.gradients, d_head, terms.late(d_head)
                    )
                    if d_late is not None:
                        d_late_states[rows] = d_late
        ctx.terms, ctx.dtype = terms, states.dtype
        again = (states, gate, labels) if any(d is not None for d in d_head) else (None,) * 3
        ctx.save_for_backward(d_states, d_late_states, d_gate, *again, *d_head)
        cross_entropy, distance, *others = values
        ctx.mark_non_differentiable(*others)
        return cross_entropy, distance, *others

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, weights: Tensor, late_weights: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        d_states, d_late_states, d_gate, states, gate, labels, *d_head = ctx.saved_tensors
        terms: _Terms = ctx.terms
        # The saved gradients are those of cross-entropy + weight x divergence.
        late_weights = late_weights / (terms.distill_weight or 1.0)
        if states is None or _alike(weights, late_weights, terms):
            every = weights[:1].sum()  # they are all this, or there is none
            d_head = [None if d is None else (d * every).to(d.dtype) for d in d_head]
        else:
            d_head = [_accumulator(tensor) for tensor in terms.head.tensors]
            with torch.autocast(states.device.type, enabled=False):
                for rows in _chunks(states, terms.head):
                    chunk, output, raw = _projected(states[rows], terms.head)
                    loss = _chunk_loss(raw, gate[rows], labels[rows], terms)
                    gradients = loss.gradients.weighed(weights[rows], late_weights[rows])
                    terms.head.pull_back(
                        chunk, gate[rows], output, gradients, d_head, terms.late(d_head)
                    )
        return (
            (d_states * weights.view(-1, 1, 1)).to(ctx.dtype),
            (d_late_states * late_weights.view(-1, 1, 1)).to(ctx.dtype),
            (d_gate * weights.unsqueeze(1)).to(d_gate.dtype),
            None,
            None,
            None,
            *d_head,
        )


def _alike(weights: Tensor, late_weights: Tensor, terms: _Terms) -> bool:
    """Tell whether every token weighs the same, to rounding, as far as the head is concerned."""
    if len(weights) == 0:
        return True
    both = [weights, late_weights] if terms.distil_head and terms.distill_weight > 0 else [weights]
    distance = (torch.stack(both) - weights[0]).abs().max()
    return bool(distance <= 1e-6 * weights[0].abs())


@dataclass(frozen=True)
class _ChunkLoss:
    VALUES: ClassVar = (
        *("cross-entropy", "divergence", "entropy", "1 where correct"),
        *("mean of the logits", "log of the sum of the squared probabilities"),
    )

    values: Float[Tensor, "6 c"]
    gradients: LogitGradients
    d_gate: Float[Tensor, "c k"]


def _chunks(states: Float[Tensor, "n k d"], head: HeadProjection) -> Iterator[slice]:
    """Cut the tokens so that one chunk's logits take about `CHUNK_BYTES`.

    No token at all makes one empty chunk: the loss is then a zero that is connected to the graph.
    """
    n, k, _ = states.shape
    size = max(1, CHUNK_BYTES // (4 * k * head.vocabulary))
    return (slice(start, start + size) for start in range(0, max(n, 1), size))


def _projected(
    states: Float[Tensor, "c k d"], head: HeadProjection
) -> tuple[Tensor, Tensor, Float[Tensor, "c k v"]]:
    """Return states in the head's dtype, the head's output, and the same in at least fp32."""
    chunk = states.to(head.dtype)
    output = head.project(chunk)
    return chunk, output, output.detach().to(torch.promote_types(output.dtype, torch.float32))


def _chunk_loss(
    raw: Float[Tensor, "c k v"],
    gate: Float[Tensor, "c k"],
    labels: Int[Tensor, " c"],
    terms: _Terms,
) -> _ChunkLoss:
    transform = terms.transform
    logits = transform(torch.bmm(gate.unsqueeze(1), raw).squeeze(1))
    log_p = logits.log_softmax(dim=-1)
    label_log_p = log_p.gather(1, labels.unsqueeze(1))
    correct = label_log_p.squeeze(1) >= log_p.amax(dim=-1)
    p = log_p.exp()
    entropy = -torch.linalg.vecdot(p, log_p)
    mean_logits = log_sum_sq = torch.zeros_like(entropy)
    if terms.further:
        mean_logits, log_sum_sq = logits.mean(dim=-1), torch.linalg.vecdot(p, p).log()
    d_logits = p.scatter_add_(1, labels.unsqueeze(1), -torch.ones_like(label_log_p))
    d_mixed = transform.pull_back(logits, d_logits)
    d_gate = torch.bmm(raw, d_mixed.unsqueeze(2)).squeeze(2)

    distance, d_late = torch.zeros_like(entropy), None
    layers = raw.shape[1] - 1
    if terms.distill_weight > 0 and layers > 0:
        layer_logits = transform(raw)
        log_q = layer_logits.log_softmax(dim=-1)
        distances, d_late = DIVERGENCES[terms.divergence](log_q[:, -1:], log_q[:, :-1])
        distance = distances.mean(dim=1)
        d_late = transform.pull_back(layer_logits[:, :-1], d_late).mul_(
            terms.distill_weight / layers
        )
    found = [-label_log_p.squeeze(1), distance, entropy, correct.to(entropy.dtype)]
    values = torch.stack([*found, mean_logits, log_sum_sq])
    return _ChunkLoss(values, LogitGradients(d_mixed, d_late), d_gate)


def _accumulator(tensor: Tensor) -> Tensor | None:
    """Return zeros to add a gradient up in, in at least fp32: chunks would round each other off."""
    if not tensor.requires_grad:
        return None
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))
