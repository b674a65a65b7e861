"""What each layer predicts by itself: through the final norm alone, and through a fitted map."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from depthmix.analysis.layers import head_logits
from depthmix.model.runtime import Runtime
from depthmix.probe.observe import Observed, chunks

RIDGE = 0.1  # of the mean squared length of the states


@dataclass(frozen=True)
class Prediction:
    """What each of N layers predicts of the tokens that score, in means over them.

    Attributes:
        loss: cross-entropy a token, in nats.
        accuracy: share of the tokens whose likeliest one is right.
        agreement: share of the tokens whose likeliest one is that of the last layer.
        divergence: KL(last layer || this layer), in nats.
    """

    loss: list[float]
    accuracy: list[float]
    agreement: list[float]
    divergence: list[float]


@torch.no_grad()
def predictions(runtime: Runtime, seen: Observed) -> tuple[Prediction, Prediction]:
    """Return the predictions through the final norm alone, and through the fitted maps.

    Both of the rows on which no map was fitted. Logits of one layer and one chunk of tokens are
    held at a time, beside those of the last layer.
    """
    fit, score = seen.states[seen.fitting], seen.states[~seen.fitting]
    labels = seen.labels[~seen.fitting]
    mapped = _mapped(runtime, fit, score)
    sums = torch.zeros(2, score.shape[1], 4, dtype=torch.float64)
    parts = list(chunks(runtime, len(labels)))
    for chunk in tqdm(parts, desc="what layers predict", unit="chunk", leave=False):
        last = _log_probabilities(runtime, score[chunk, -1])
        of_chunk = labels[chunk].to(last.device)
        for i, states in enumerate((score, mapped)):
            for layer in range(score.shape[1]):
                found = _log_probabilities(runtime, states[chunk, layer])
                sums[i, layer] += _sums(found, last, of_chunk).cpu()
    alone, fitted = (sums / len(labels)).transpose(1, 2).tolist()
    return Prediction(*alone), Prediction(*fitted)


def _mapped(
    runtime: Runtime, fit: Float[Tensor, "n N d"], score: Float[Tensor, "m N d"]
) -> Float[Tensor, "m N d"]:
    """Return the states that score, each layer's through its own map."""

    def of(states: Tensor, layer: int) -> Tensor:
        return states[:, layer].to(runtime.host.device, torch.float32)

    mapped = torch.empty_like(score)
    for layer in tqdm(range(score.shape[1]), desc="fitting maps", unit="layer", leave=False):
        mapped[:, layer] = mapped_to_last(of(fit, layer), of(fit, -1), of(score, layer))
    return mapped


def _log_probabilities(runtime: Runtime, states: Float[Tensor, "c d"]) -> Float[Tensor, "c v"]:
    host, anatomy = runtime.host, runtime.anatomy
    logs: Tensor = head_logits(host, anatomy, states.to(host.device)).log_softmax(-1)
    return logs


def mapped_to_last(
    states: Float[Tensor, "n d"], last: Float[Tensor, "n d"], others: Float[Tensor, "m d"]
) -> Float[Tensor, "m d"]:
    """Return other states of a layer, moved to where the last layer's would be.

    By ridge regression of `last - states` on `states`, with an intercept, in its dual form, which
    takes n x n instead of d x d:

        X^T (X X^T + ridge I)^-1 (last - states)

    Args:
        states: of a layer, behind the final norm.
        last: of the last layer, of the same tokens.
        others: of the first layer, of tokens to be mapped.
    """
    mean, gap = states.mean(dim=0), last - states
    x, offset = states - mean, gap.mean(dim=0)
    gram = x @ x.T
    gram.diagonal().add_(RIDGE * gram.diagonal().mean().clamp_min(1e-12))
    dual = torch.linalg.solve(gram, gap - offset)
    mapped: Tensor = others + offset + (others - mean) @ x.T @ dual
    return mapped


def _sums(
    logs: Float[Tensor, "c v"], last: Float[Tensor, "c v"], labels: Int[Tensor, " c"]
) -> Float[Tensor, " four"]:
    """Return the sums of loss, tokens right, tokens as the last layer's, and divergence."""
    chosen = logs.argmax(-1)
    return torch.stack(
        [
            F.nll_loss(logs, labels, reduction="sum").double(),
            (chosen == labels).sum().double(),
            (chosen == last.argmax(-1)).sum().double(),
            F.kl_div(logs, last, reduction="sum", log_target=True).double(),
        ]
    )
