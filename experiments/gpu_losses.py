"""The loss alone, forward and backward, against the naive one and other libraries' fused losses."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer.utils import add_fused_lm_head

from depthmix.bench.loss import naive_loss
from depthmix.bench.measure import median_seconds, peak_bytes
from depthmix.method.fused_loss import ensemble_loss
from depthmix.method.head import LinearHead, LogitTransform

Row = dict[str, Any]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

K = 3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def loss_alone(small: bool) -> list[Row]:
    """Return one row a loss and number of tokens; what does not fit the memory is named so."""
    width, vocabulary = (64, 1000) if small else (4096, 128256)
    counts = (64, 256) if small else (8192, 32768)
    dtype = torch.float32 if small else torch.bfloat16
    rows = []
    for tokens in counts:
        for name, loss, k in _losses(width, vocabulary, dtype):
            cost = _cost(partial(_step, loss, *_tensors(tokens, k, width, vocabulary, dtype)))
            rows.append({"tokens": tokens, "k": k, "loss": name, **cost})
    return rows


def _losses(width: int, vocabulary: int, dtype: torch.dtype) -> list[tuple[str, Loss, int]]:
    losses: list[tuple[str, Loss, int]] = [
        ("depthmix", _ours, K),
        ("naive", _naive, K),
        ("depthmix", _ours, 1),
        ("naive", _naive, 1),
        ("trl, fused head", _trl(width, vocabulary, dtype), 1),
    ]
    if DEVICE.type == "cuda" and find_spec("liger_kernel"):
        losses.append(("liger", _liger(), 1))
    if DEVICE.type == "cuda" and find_spec("cut_cross_entropy"):
        losses.append(("cut cross-entropy", _cut(), 1))
    return losses


def _tensors(
    tokens: int, k: int, width: int, vocabulary: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    states = torch.randn(tokens, k, width, generator=generator, device=DEVICE).to(dtype)
    weight = 0.02 * torch.randn(vocabulary, width, generator=generator, device=DEVICE)
    labels = torch.randint(vocabulary, (tokens,), generator=generator, device=DEVICE)
    return states.requires_grad_(), weight.to(dtype), labels


def _step(loss: Loss, states: Tensor, weight: Tensor, labels: Tensor) -> None:
    states.grad = None
    loss(states, weight, labels).backward()


def _cost(step: Callable[[], None]) -> Row:
    try:
        peak = peak_bytes(step)
        seconds = median_seconds({"": step}, repeats=3, warm_up=False)[""]
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return {"ms": None, "MiB": "out of memory"}
    return {"ms": 1e3 * seconds, "MiB": round(peak / 2**20)}


def _gate(states: Tensor) -> Tensor:
    return states.new_full(states.shape[:2], 1 / states.shape[1], dtype=torch.float32)


def _ours(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    head = LinearHead(weight, None)
    return ensemble_loss(states, _gate(states), labels, head, LogitTransform(), 1.0).total


def _naive(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return naive_loss(states, _gate(states), labels, weight)


def _trl(width: int, vocabulary: int, dtype: torch.dtype) -> Loss:
    """TRL's fused head sits on a model: one without layers, so that a norm is all there is more."""
    config = LlamaConfig(
        hidden_size=width,
        vocab_size=vocabulary,
        num_hidden_layers=0,
        num_attention_heads=8,
        intermediate_size=8,
        tie_word_embeddings=True,
    )
    with DEVICE:
        model: Any = LlamaForCausalLM(config)
    model.to(dtype)
    model.requires_grad_(False)
    add_fused_lm_head(model)

    def loss(states: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        model.lm_head.weight.data = weight
        shifted = F.pad(labels, (1, 0))[None]
        embedded = F.pad(states[:, 0], (0, 0, 0, 1))[None]
        output = model(inputs_embeds=embedded, labels=shifted, fused_lm_head=True)
        return -output.log_probs.sum()  # type: ignore[no-any-return]

    return loss


def _liger() -> Loss:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda states, weight, labels: fused(weight, states[:, 0], labels)


def _cut() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda states, weight, labels: linear_cross_entropy(
        states[:, 0], weight, labels, reduction="sum"
    )
