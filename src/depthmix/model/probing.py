"""Probe forwards: a few tokens, without gradients, as in evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

PROBE_LENGTH = 5


def run_probe(model: PreTrainedModel) -> Tensor:
    """Run the model on a few tokens; return its logits, (1, [tokens,] vocabulary or classes)."""
    return model(**probe_inputs(model)).logits  # type: ignore[no-any-return]


def probe_inputs(model: PreTrainedModel, rows: int = 1) -> dict[str, Any]:
    """Return a few tokens as the arguments of a forward."""
    embeddings: Any = model.get_input_embeddings().weight
    ids = torch.arange(1, PROBE_LENGTH + 1, device=embeddings.device).expand(rows, -1)
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids, "use_cache": False}
    # Of another length, which tells the decoder's states from the encoder's.
    return {"input_ids": ids, "decoder_input_ids": ids[:, 1:], "use_cache": False}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run modules as in evaluation, without gradients, in the block."""
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        # On a CPU, a 4-bit linear map of bitsandbytes repacks its weight when it first runs in
        # evaluation, and gives no gradients from then on.
        module.training = type(module).__module__.startswith("bitsandbytes.")
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def describe(tensor: Tensor) -> str:
    """Return the shape and the dtype of a tensor."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
