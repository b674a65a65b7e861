"""Tokenised rows in batches: rows of like length together, padded on the right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from depthmix.data.tokens import IGNORED

TokenRow = Mapping[str, Sequence[int]]  # input_ids and labels, -100 where nothing is supervised


def cut(row: TokenRow, max_length: int | None, keep_end: bool = False) -> TokenRow:
    """Return a row cut to a length, as training cuts it."""
    if max_length is None:
        return row
    window = slice(-max_length, None) if keep_end else slice(max_length)
    return {name: row[name][window] for name in ("input_ids", "labels")}


def batches(lengths: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Yield the places of rows of like length, so many tokens at a time, padding included.

    A row that has more goes alone.
    """
    chosen: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if chosen and lengths[place] * (len(chosen) + 1) > tokens:
            yield chosen
            chosen = []
        chosen.append(place)
    if chosen:
        yield chosen


def padded(rows: Sequence[TokenRow], device: torch.device) -> dict[str, Int[Tensor, "b t"]]:
    """Return ids, mask and labels of a batch."""

    def stack(values: Sequence[Sequence[int]], padding: int) -> Tensor:
        tensors = [torch.tensor(list(row), dtype=torch.long) for row in values]
        return pad_sequence(tensors, batch_first=True, padding_value=padding).to(device)

    ids = [row["input_ids"] for row in rows]
    return {
        "input_ids": stack(ids, 0),
        "attention_mask": stack([[1] * len(row) for row in ids], 0),
        "labels": stack([row["labels"] for row in rows], IGNORED),
    }


def targets(labels: Int[Tensor, "b t"], shifted: bool = True) -> Int[Tensor, "b t"]:
    """Return the token that each position predicts, -100 where none is supervised.

    Args:
        labels: of a batch.
        shifted: whether position t predicts label t + 1, as in a causal model.
    """
    return F.pad(labels, (0, 1), value=IGNORED)[:, 1:] if shifted else labels
