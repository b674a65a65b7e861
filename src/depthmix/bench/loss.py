"""The loss of MoDE alone, against the naive one that holds the logits of all k layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from depthmix.bench.measure import in_fresh_process, median_seconds, peak_bytes
from depthmix.method.fused_loss import ensemble_loss
from depthmix.method.head import LinearHead, LogitTransform

OURS, NAIVE = "depthmix", "naive"


@dataclass(frozen=True)
class Shape:
    """Size of one loss: supervised tokens, vocabulary V, width d, late layers k."""

    tokens: int = 1024
    vocabulary: int = 49152
    width: int = 576
    k: int = 3

    @property
    def naive_bytes(self) -> int:
        """Bytes that the naive loss needs at least: logits, log-softmax and gradient in fp32."""
        return 3 * 4 * self.tokens * self.vocabulary * self.k


def measure_loss(shape: Shape, repeats: int, with_naive: bool = True) -> dict[str, dict[str, Any]]:
    """Return median seconds and peak bytes of forward and backward, for ours and the naive loss."""
    names = (OURS, NAIVE) if with_naive else (OURS,)
    peaks = {name: in_fresh_process(peak_of, name, shape) for name in names}
    steps = losses(shape)
    seconds = median_seconds({name: steps[name] for name in names}, repeats)
    return {name: {"seconds": seconds[name], "peak_bytes": peaks[name]} for name in names}


def peak_of(name: str, shape: Shape) -> int:
    """Return the peak memory of one loss, forward and backward, in bytes."""
    return peak_bytes(losses(shape)[name])


def losses(shape: Shape) -> dict[str, Callable[[], Tensor]]:
    """Return both losses on the same random tensors, forward and backward."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    weight = random(shape.vocabulary, shape.width) * 0.05
    states = random(shape.tokens, shape.k, shape.width).requires_grad_()
    gate = random(shape.tokens, shape.k).softmax(-1).requires_grad_()
    labels = torch.randint(shape.vocabulary, (shape.tokens,), generator=generator).to(device)

    def ours() -> Tensor:
        head = LinearHead(weight, None)
        return ensemble_loss(states, gate, labels, head, LogitTransform(), 1.0).total

    def naive() -> Tensor:
        return naive_loss(states, gate, labels, weight)

    def with_backward(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            states.grad = gate.grad = None
            total = loss()
            total.backward()
            return total

        return run

    return {OURS: with_backward(ours), NAIVE: with_backward(naive)}


def naive_loss(states: Tensor, gate: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """The loss as one would write it: the logits of all layers at once, autograd for the rest."""
    logits = F.linear(states, weight).float()
    ensemble = (gate.unsqueeze(-1) * logits).sum(1)
    total = F.cross_entropy(ensemble, labels, reduction="sum")
    if logits.shape[1] == 1:
        return total
    teacher = logits[:, -1].detach().log_softmax(-1)
    divergences = [
        F.kl_div(late.log_softmax(-1), teacher, log_target=True, reduction="sum")
        for late in logits[:, :-1].unbind(1)
    ]
    return total + torch.stack(divergences).mean()
