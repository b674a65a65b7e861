"""Fit one temperature: the one at which held-out tokens have the least cross-entropy.

Of the rows, only what enters the head is kept, at the supervised tokens. Every step of the fit
projects it anew, a chunk at a time, so that no logits outlive their chunk: that is about seven
passes over the head, and 4 x d bytes a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from depthmix.calibration.reliability import Reliability
from depthmix.config import MoDEConfig
from depthmix.data.batches import TokenRow, batches, padded, targets
from depthmix.data.tokens import IGNORED
from depthmix.errors import DataError, DepthmixError
from depthmix.method.fused_loss import CHUNK_BYTES
from depthmix.model.active import host_of
from depthmix.model.anatomy import Anatomy
from depthmix.model.discovery import discover
from depthmix.model.runtime import RUNTIME_NAME
from depthmix.model.temperature import (
    bias_refused,
    require_no_bias,
    set_temperature,
    temperature_of,
)

TOKENS_AT_ONCE = 4096  # of a forward, padding included
KEPT_TOKENS = 2**15  # evenly picked of more; the temperature is then known to a fraction of 1 %
MOST = 32.0  # the temperature lies between 1 / MOST and MOST
_PRECISION = 1e-5  # relative


@dataclass(frozen=True)
class Figures:
    """What a model's predictions of tokens are worth.

    Attributes:
        loss: cross-entropy a token, in nats.
        reliability: of the likeliest tokens.
    """

    loss: float
    reliability: Reliability


@dataclass(frozen=True)
class Calibration:
    """A fitted temperature.

    Attributes:
        temperature: that what enters the head is to be divided by.
        tokens: supervised ones that it was fitted on.
        before: figures of these at temperature 1.
        after: figures of these at the fitted one.
    """

    temperature: float
    tokens: int
    before: Figures
    after: Figures


@torch.no_grad()
def fit_calibration(model: nn.Module, rows: Sequence[TokenRow]) -> Calibration:
    """Fit a temperature to a model, MoDE attached or not; the model keeps the one it has.

    Args:
        model: a language model; it is set to evaluation mode.
        rows: tokenised, that were not trained on, cut to what the model takes.

    Raises:
        DepthmixError: the head has a bias.
        DataError: nothing is supervised, or every token is predicted right.
    """
    host = host_of(model)
    require_no_bias(host)
    model.eval()
    kept = temperature_of(model)
    set_temperature(model, 1.0)
    try:
        anatomy = _anatomy(host)
        if anatomy.output_bias_path is not None:
            raise DepthmixError(bias_refused(host))
        tokens = _Tokens(host, anatomy, *_head_inputs(model, anatomy, rows))
        temperature = _fit(tokens)
        figures = [tokens.figures(at) for at in (1.0, temperature)]
    finally:
        set_temperature(model, kept)
    return Calibration(temperature, len(tokens), *figures)


def _anatomy(host: Any) -> Anatomy:
    runtime = vars(host).get(RUNTIME_NAME)
    return runtime.anatomy if runtime else discover(host, MoDEConfig(k=1))


def _head_inputs(
    model: nn.Module, anatomy: Anatomy, rows: Sequence[TokenRow]
) -> tuple[Float[Tensor, "n d"], Int[Tensor, " n"]]:
    """Return what enters the head at the supervised tokens; the head runs on one position."""
    count = sum(label != IGNORED for row in rows for label in row["labels"][1:])
    if not count:
        raise DataError("no token is supervised: there is nothing to fit a temperature on")
    every = -(-count // KEPT_TOKENS)
    host, entering = host_of(model), list[Tensor]()

    def keep(_head: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        entering.append(args[0])
        return args[0][:, :1]

    states, labels = [], []
    handle = host.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        lengths = [len(row["input_ids"]) for row in rows]
        together = list(batches(lengths, TOKENS_AT_ONCE))
        for places in tqdm(together, desc="held-out rows", leave=False):
            batch = padded([rows[place] for place in places], host.device)
            expected = targets(batch.pop("labels"), anatomy.labels_shifted)
            model(**batch, use_cache=False)
            found = entering.pop()[:, -expected.shape[1] :]  # behind a learned prompt
            states.append(found[expected != IGNORED][::every].cpu())
            labels.append(expected[expected != IGNORED][::every].cpu())
    finally:
        handle.remove()
    return torch.cat(states), torch.cat(labels)


class _Tokens:
    """Supervised tokens of which logits are made at a temperature, a chunk at a time."""

    def __init__(
        self,
        host: Any,
        anatomy: Anatomy,
        states: Float[Tensor, "n d"],
        labels: Int[Tensor, " n"],
    ) -> None:
        self._host, self._transform = host, anatomy.logit_transform
        self._states, self._labels = states, labels
        self._size = max(1, CHUNK_BYTES // (4 * anatomy.vocabulary))

    def __len__(self) -> int:
        """Return their number."""
        return len(self._labels)

    def _chunks(self) -> Iterator[tuple[Float[Tensor, "c v"], Int[Tensor, " c"]]]:
        """Yield the head's output in fp32, and the labels."""
        head = self._host.get_output_embeddings()
        parts = zip(self._states.split(self._size), self._labels.split(self._size), strict=True)
        for states, labels in parts:
            yield head(states.to(self._host.device)).float(), labels.to(self._host.device)

    def figures(self, temperature: float) -> Figures:
        """Return loss and reliability at a temperature."""
        loss, found = 0.0, Reliability()
        for raw, labels in self._chunks():
            logs = self._transform(raw / temperature).log_softmax(-1)
            loss += F.nll_loss(logs, labels, reduction="sum").item()
            best, chosen = logs.max(dim=-1)
            found += Reliability.of(best.exp().cpu().numpy(), (chosen == labels).cpu().numpy())
        return Figures(loss / len(self), found)

    def slope(self, coldness: float) -> tuple[float, float]:
        """Return first and second derivative of the summed loss by 1 / T.

        With z the logits and z' their derivative, E over the model's prediction, y the label:

            L' = sum E[z'] - z'_y        L'' = sum E[z'^2] - E[z']^2  [+ E[z''] - z''_y]

        A linear head has no z'': L is convex. Under a soft cap it is left out of L''.
        """
        sums = torch.zeros(2, dtype=torch.float64)
        for raw, labels in self._chunks():
            logits = self._transform(raw * coldness)
            change = self._transform.pull_back(logits, raw)
            p = logits.softmax(-1)
            mean = (p * change).sum(-1)
            of_label = change.gather(1, labels.unsqueeze(1)).squeeze(1)
            spread = (p * change.square()).sum(-1) - mean.square()
            sums += torch.stack([(mean - of_label).double().sum(), spread.double().sum()]).cpu()
        return sums[0].item(), sums[1].item()


def _fit(tokens: _Tokens) -> float:
    """Find the root of the loss's derivative by Newton's method, within a bracket that shrinks."""
    low, high, coldness = 1 / MOST, MOST, 1.0
    for _ in range(50):
        first, second = tokens.slope(coldness)
        low, high = (low, coldness) if first > 0 else (coldness, high)
        step = coldness - first / second if second > 0 else high
        moved = step if low < step < high else (low * high) ** 0.5
        done = abs(moved - coldness) < _PRECISION * coldness
        coldness = moved
        if done:
            break
    if not 1.01 / MOST < coldness < MOST / 1.01:
        raise DataError(
            "no temperature is best: the rows are predicted (almost) all right, or all wrong; give "
            "more of them"
        )
    return 1 / coldness
