"""One pass over some rows: what the head gets of every layer, and the gradient of every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from depthmix.analysis.layers import head_logits
from depthmix.data.batches import TokenRow, batches, padded, targets
from depthmix.data.tokens import IGNORED
from depthmix.method.fused_loss import CHUNK_BYTES
from depthmix.model.runtime import Runtime, runtime_of

TOKENS_AT_ONCE = 1024  # of a forward, padding included
KEPT_TOKENS = 2048  # whose states are kept of every layer, evenly picked


@dataclass(frozen=True)
class Observed:
    """What one pass saw, of N layers.

    Attributes:
        states: (n, N, d) what the head gets of each layer at supervised tokens.
        labels: (n,) the tokens to predict.
        rows: (n,) the number of the row that each token stands in.
        tokens: supervised tokens in all rows, of which n are kept.
        gradients: (N,) norm of the gradient of the mean loss with respect to what is tuned in each
            layer, in nats a token; empty where nothing is tuned.
    """

    states: Float[Tensor, "n N d"]
    labels: Int[Tensor, " n"]
    rows: Int[Tensor, " n"]
    tokens: int
    gradients: list[float]

    @property
    def fitting(self) -> Bool[Tensor, " n"]:
        """(n,) whether maps are fitted on a token: on every other row; the others score them."""
        return self.rows % 2 == 0


def observe(model: nn.Module, rows: Sequence[TokenRow]) -> Observed:
    """Run a model forward and backward over rows, once.

    Args:
        model: with MoDE on all its layers, `adaptation` none, and with a tuning method that changes
            nothing yet, or without one. It runs as in evaluation, without dropout.
        rows: tokenised, and cut to what the model takes.
    """
    runtime = runtime_of(model)
    model.eval()
    tuned = any(p.requires_grad for layer in _layers(runtime) for p in layer.parameters())
    labelled = sum(label != IGNORED for row in rows for label in row["labels"])
    every, tokens = -(-labelled // KEPT_TOKENS), 0
    kept: list[tuple[Tensor, Tensor]] = []
    of_rows: list[Tensor] = []
    with tqdm(total=len(rows), desc="probing rows", unit="row", leave=False) as progress:
        for places in batches([len(row["input_ids"]) for row in rows], TOKENS_AT_ONCE):
            batch = padded([rows[place] for place in places], runtime.host.device)
            labels = targets(batch.pop("labels"), runtime.anatomy.labels_shifted)
            supervised = labels != IGNORED
            tokens += int(supervised.sum())
            with torch.set_grad_enabled(tuned):
                states = _states(runtime, batch)[supervised]
                if tuned:
                    last = states[:, -1]
                    last.backward(_gradient(runtime, last.detach(), labels[supervised]))
            of_row = torch.tensor(places)[supervised.nonzero()[:, 0].cpu()]
            kept.append((states.detach()[::every].cpu(), labels[supervised][::every].cpu()))
            of_rows.append(of_row[::every])
            progress.update(len(places))
    states, labels = (torch.cat(parts) for parts in zip(*kept, strict=True))
    gradients = _norms(runtime, tokens) if tuned else []
    return Observed(states, labels, torch.cat(of_rows), tokens, gradients)


def chunks(runtime: Runtime, count: int) -> Iterator[slice]:
    """Cut so many tokens so that the logits of one chunk take about 32 MiB."""
    size = max(1, CHUNK_BYTES // (4 * runtime.anatomy.vocabulary))
    return (slice(start, start + size) for start in range(0, count, size))


def _states(runtime: Runtime, batch: dict[str, Tensor]) -> Float[Tensor, "b t N d"]:
    """Return what the head gets of every layer; the head itself runs on one position."""
    kept: list[Tensor] = []
    mixture: Any = runtime.mixture()
    head = runtime.host.get_submodule(runtime.anatomy.head_path)
    handles = [
        mixture.register_forward_hook(lambda _module, args, _output: kept.append(args[0])),
        head.register_forward_pre_hook(lambda _module, args: args[0][:, :1]),
    ]
    try:
        runtime.host(**batch, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return kept[0]


def _gradient(
    runtime: Runtime, states: Float[Tensor, "n d"], labels: Int[Tensor, " n"]
) -> Float[Tensor, "n d"]:
    """Return the gradient of the summed cross-entropy of the last layer, a chunk at a time."""
    parts = []
    for chunk in chunks(runtime, len(states)):
        entering = states[chunk].requires_grad_()
        logits = head_logits(runtime.host, runtime.anatomy, entering)
        loss = F.cross_entropy(logits, labels[chunk], reduction="sum")
        parts.append(torch.autograd.grad(loss, entering)[0])
    return torch.cat(parts)


def _norms(runtime: Runtime, tokens: int) -> list[float]:
    """Return the norm of each layer's gradients, which were summed over so many tokens."""
    norms = []
    for layer in _layers(runtime):
        gradients = [p.grad for p in layer.parameters() if p.grad is not None]
        squares = sum(float(g.double().square().sum()) for g in gradients)
        norms.append(squares**0.5 / tokens)
    return norms


def _layers(runtime: Runtime) -> list[nn.Module]:
    return [runtime.host.get_submodule(path) for path in runtime.anatomy.layer_paths]
