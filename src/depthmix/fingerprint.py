"""Tell whether an adapter meets the base model it was trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from depthmix.discovery import Anatomy
from depthmix.errors import CheckpointError
from depthmix.partitioned import gathered

SAMPLES = 64
# Two roundings to bf16 apart: the same base in another dtype is the same base.
TOLERANCE = 2**-7


def fingerprint(host: PreTrainedModel, anatomy: Anatomy) -> dict[str, Any]:
    """Return the shape of a model and a sample of its input embeddings, as JSON types.

    The embeddings are what no tuning method but full fine-tuning changes, and what every model has.
    """
    weight: Any = host.get_input_embeddings().weight
    return {
        "model_type": host.config.model_type,
        "layers_path": anatomy.layers_path,
        "last_layer": anatomy.layer_indices[-1],
        "hidden_size": anatomy.hidden_size,
        "vocabulary": anatomy.vocabulary,
        "embeddings": _sample(weight),
    }


def check_fingerprint(saved: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise `CheckpointError`, naming the differences, unless both are of the same base model."""
    different = [
        f"{name} is {found[name]!r}, saved with {saved[name]!r}"
        for name in saved
        if name != "embeddings" and saved[name] != found[name]
    ]
    if not different and not _close(found["embeddings"], saved["embeddings"]):
        different = ["the input embeddings are other ones"]
    if different:
        raise CheckpointError(f"the adapter was trained on another base: {'; '.join(different)}")


def same_sample(a: Tensor, b: Tensor) -> bool:
    """Tell whether two weights are the same one, up to the rounding of a dtype."""
    return a.shape == b.shape and _close(_sample(a), _sample(b))


def _close(a: list[float], b: list[float]) -> bool:
    return torch.allclose(torch.tensor(a), torch.tensor(b), rtol=TOLERANCE, atol=1e-6)


def _sample(weight: Tensor) -> list[float]:
    with gathered([weight]):
        flat = weight.detach().flatten()
        places = torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64).long()
        values = flat[places.to(flat.device)].float().tolist()
    return [float(f"{value:.4g}") for value in values]
