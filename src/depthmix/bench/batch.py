"""The batch that all steps are measured on: rows with the lengths of real questions and answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

# Tokens of question and of answer of GSM8K's first training rows.
LENGTHS = Path(__file__).with_name("gsm8k_lengths.json")
IGNORED = -100


def real_lengths(rows: int, longest: int | None = None) -> list[tuple[int, int]]:
    """Return tokens of question and answer of so many rows of GSM8K.

    Args:
        rows: number of rows.
        longest: scale the lengths down so that no row has more tokens.
    """
    lengths = list(islice(cycle(json.loads(LENGTHS.read_text())), rows))
    width = max(question + answer for question, answer in lengths)
    scale = 1.0 if longest is None else min(1.0, longest / width)
    return [(max(1, int(q * scale)), max(1, int(a * scale))) for q, a in lengths]


def make_batch(
    lengths: Sequence[tuple[int, int]], vocabulary: int, device: torch.device, seed: int = 0
) -> dict[str, Int[Tensor, "b t"]]:
    """Return random tokens in rows of such lengths, padded right, questions not supervised.

    Args:
        lengths: tokens of question and of answer of each row.
        vocabulary: tokens are drawn from it.
        device: where the tensors go.
        seed: of the tokens.
    """
    rows, width = len(lengths), max(question + answer for question, answer in lengths)
    ids = torch.randint(vocabulary, (rows, width), generator=torch.Generator().manual_seed(seed))
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for i, (question, answer) in enumerate(lengths):
        mask[i, : question + answer] = 1
        labels[i, question : question + answer] = ids[i, question : question + answer]
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in batch.items()}
