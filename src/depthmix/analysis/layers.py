"""Held-out loss of the ensemble and of each late layer alone, and how they complement each other.

The "complementary power" that arXiv 2410.13077 claims for late layers is measured as the share of
tokens that the last layer gets wrong and some other late layer gets right.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

from depthmix.calibration.reliability import Reliability
from depthmix.data.batches import TokenRow, padded, targets
from depthmix.data.tokens import IGNORED
from depthmix.model.active import host_of
from depthmix.model.anatomy import Anatomy
from depthmix.model.runtime import RUNTIME_NAME, runtime_of

Row = dict[str, str]


@dataclass
class LayerScores:
    """Figures of one model on n rows; a token is one of a completion, end-of-sequence included.

    Attributes:
        tokens: (n,) tokens of each completion.
        loss: (n,) sum over them of the cross-entropy of what the model predicts with, in nats.
        exact: (n,) whether every token is the likeliest, so that greedy decoding gives them all.
        layer_loss: mean cross-entropy a token of each late layer alone; empty without MoDE.
        layer_accuracy: share of the tokens that each late layer alone gets right.
        gate: mean weight of each late layer.
        entropy: mean entropy of the gate, in nats.
        rescued: share of the tokens that the last layer gets wrong and another late layer right.
        reliability: of the likeliest tokens.
    """

    tokens: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    exact: list[bool] = field(default_factory=list)
    layer_loss: list[float] = field(default_factory=list)
    layer_accuracy: list[float] = field(default_factory=list)
    gate: list[float] = field(default_factory=list)
    entropy: float | None = None
    rescued: float | None = None
    reliability: Reliability = field(default_factory=Reliability)

    @property
    def mean_loss(self) -> float:
        """Cross-entropy a token, in nats."""
        return sum(self.loss) / sum(self.tokens)

    @property
    def accuracy(self) -> float:
        """Share of the rows whose completion greedy decoding gives."""
        return sum(self.exact) / len(self.exact)


@torch.no_grad()
def score_rows(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    batch_size: int = 16,
) -> LayerScores:
    """Score rows of prompt and completion, with MoDE or without.

    Args:
        model: a causal language model, PEFT-wrapped or not; it is set to evaluation mode.
        tokenizer: its tokenizer.
        rows: texts `prompt` and `completion`, tokenised as in training.
        batch_size: rows at a time; rows of like length go together.
    """
    model.eval()
    encoded = [encode(row, tokenizer) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i][0]))
    scores = LayerScores([0] * len(rows), [0.0] * len(rows), [False] * len(rows))
    sums = _LayerSums()
    starts = range(0, len(rows), batch_size)
    for start in tqdm(starts, desc="held-out rows", unit="batch", leave=False):
        chosen = order[start : start + batch_size]
        batch = collate([encoded[i] for i in chosen], host_of(model).device)
        logits, labels = _predict(model, batch, sums)
        losses = F.cross_entropy(logits, labels, reduction="none")
        confidence, likeliest = logits.softmax(-1).max(-1)
        right = likeliest == labels
        scores.reliability += Reliability.of(confidence.cpu().numpy(), right.cpu().numpy())
        counts = (batch["labels"] != IGNORED).sum(dim=1).tolist()
        parts = zip(chosen, losses.split(counts), right.split(counts), strict=True)
        for i, loss, correct in parts:
            scores.tokens[i] = len(loss)
            scores.loss[i] = loss.sum().item()
            scores.exact[i] = bool(correct.all())
    sums.write_to(scores)
    return scores


def encode(row: Row, tokenizer: Any) -> tuple[list[int], int]:
    """Return the ids of prompt, completion and end-of-sequence as TRL makes them for training.

    The second value is the number of ids that are the prompt's.
    """
    prompt: list[int] = tokenizer(row["prompt"])["input_ids"]
    text = row["prompt"] + row["completion"]
    whole: list[int] = tokenizer(text)["input_ids"]
    if whole[-1] != tokenizer.eos_token_id:
        whole = [*whole, tokenizer.eos_token_id]
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False))
    return whole, sum(1 for _ in shared)


def collate(
    rows: Sequence[tuple[list[int], int]], device: torch.device
) -> dict[str, Int[Tensor, "b t"]]:
    """Return ids, mask and labels (b, t), padded on the right; prompts are not labelled."""
    return padded([token_row(ids, prompt) for ids, prompt in rows], device)


def token_row(ids: list[int], prompt: int) -> TokenRow:
    """Return a row of what `encode` gives, as training has it: the prompt is not labelled."""
    return {"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]}


class _LayerSums:
    """Sums over all tokens of what each late layer does."""

    def __init__(self) -> None:
        self._totals: dict[str, Tensor] = {}
        self._tokens = 0

    def add(
        self,
        logits: Float[Tensor, "n k v"],
        gate: Float[Tensor, "n k"],
        labels: Int[Tensor, " n"],
    ) -> None:
        """Add the tokens of one batch."""
        n, k, _ = logits.shape
        loss = F.cross_entropy(
            logits.flatten(0, 1), labels.repeat_interleave(k), reduction="none"
        ).view(n, k)
        right: Bool[Tensor, "n k"] = logits.argmax(-1) == labels.unsqueeze(-1)
        rescued = ~right[:, -1] & right[:, :-1].any(dim=-1)
        entropy = -(gate * gate.clamp_min(1e-30).log()).sum(-1)
        parts = {"loss": loss, "right": right, "gate": gate, "rescued": rescued, "entropy": entropy}
        for name, values in parts.items():
            total = values.sum(dim=0, dtype=torch.float64)
            self._totals[name] = self._totals.get(name, torch.zeros_like(total)) + total
        self._tokens += n

    def write_to(self, scores: LayerScores) -> None:
        """Set the means."""
        if not self._tokens:
            return
        means: dict[str, Any] = {
            name: (total / self._tokens).tolist() for name, total in self._totals.items()
        }
        scores.layer_loss, scores.layer_accuracy = means["loss"], means["right"]
        scores.gate, scores.entropy = means["gate"], means["entropy"]
        scores.rescued = means["rescued"]


def _predict(
    model: nn.Module, batch: dict[str, Tensor], sums: _LayerSums
) -> tuple[Float[Tensor, "n v"], Int[Tensor, " n"]]:
    """Return logits and labels of the supervised tokens; with MoDE, add its layers to `sums`."""
    labels = targets(batch["labels"])
    supervised = labels != IGNORED
    inputs: dict[str, Any] = {name: batch[name] for name in ("input_ids", "attention_mask")}
    host = host_of(model)
    if RUNTIME_NAME not in vars(host):
        return model(**inputs).logits[supervised].float(), labels[supervised]
    mixture = runtime_of(model).mixture()
    if mixture is None or mixture.config.k == 1:
        return model(**inputs).logits[supervised].float(), labels[supervised]
    kept: list[Tensor] = []
    handle = mixture.register_forward_hook(lambda _module, args, _output: kept.append(args[0]))
    try:
        logits = model(**inputs).logits
    finally:
        handle.remove()
    states, gate = mixture.adapt(kept[0][supervised])
    sums.add(head_logits(host, runtime_of(model).anatomy, states), gate, labels[supervised])
    return logits[supervised].float(), labels[supervised]


def head_logits(
    host: Any, anatomy: Anatomy, states: Float[Tensor, "*n d"]
) -> Float[Tensor, "*n v"]:
    """Return what a model predicts, in fp32, from states behind its final norm."""
    logits: Tensor = host.get_output_embeddings()((states * anatomy.head_scale).to(host.dtype))
    bias = anatomy.output_bias(host)
    return anatomy.logit_transform(logits.float() if bias is None else logits.float() + bias)
