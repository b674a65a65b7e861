"""What the rows of a forward are known by: a digest of every argument that reaches the prefix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import xxhash
from torch import Tensor

from depthmix.cache.prefix import bytes_of

DIGEST_BYTES = 16

# What the loss reads, and what the output is to hold: neither changes a hidden state.
_LOSS = {"labels", "shift_labels", "num_items_in_batch"}
_ASKED = {"logits_to_keep", "use_cache", "return_dict", "fused_lm_head"}
# The borders of packed rows, which position_ids tell as well.
BORDERS = frozenset({"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx"})
# Where a row's images or sounds are: names in the configurations of transformers.
_PLACEHOLDERS = (
    *("image_token_id", "image_token_index", "video_token_id", "video_token_index"),
    *("audio_token_id", "audio_token_index"),
)


@dataclass(frozen=True)
class Row:
    """A row of the training data: one of the batch, or one of several packed into it.

    Attributes:
        place: in the batch.
        positions: of its tokens there, without padding.
        digest: of all that decides its states.
    """

    place: int
    positions: Tensor
    digest: bytes


@dataclass(frozen=True)
class Batch:
    """The rows of a forward.

    Attributes:
        shape: rows and tokens, padding included.
        rows: as they came into the batch.
        packed: whether several of them share a row of the batch.
        apart: whether each is known by itself, not as a part of this very batch alone.
        form: what two batches have in common that can be replayed in the same way.
    """

    shape: tuple[int, int]
    rows: list[Row]
    packed: bool
    apart: bool
    form: tuple[Any, ...]

    @property
    def padded(self) -> bool:
        """Whether there are positions that belong to no row."""
        return sum(len(row.positions) for row in self.rows) < self.shape[0] * self.shape[1]


def read_batch(arguments: Mapping[str, Any], config: Any, training: bool) -> Batch | None:
    """Return the rows of a forward, or None if it is not one whose states can be known.

    Args:
        arguments: of the model's forward, by name.
        config: of the model.
        training: dropout apart, some models compute otherwise in training.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    tokens = given.get("input_ids", given.get("inputs_embeds"))
    if not isinstance(tokens, Tensor) or tokens.ndim < 2 or tokens.numel() == 0:
        return None
    scalars = {n: v for n, v in given.items() if not isinstance(v, Tensor)}
    if not all(isinstance(value, (bool, int, float, str)) for value in scalars.values()):
        return None  # a key-value cache, for instance: these are not the first tokens
    shape = (tokens.shape[0], tokens.shape[1])
    aside = _LOSS | _ASKED | (BORDERS if "position_ids" in given else set())
    tensors = {
        n: v.detach().cpu() for n, v in given.items() if isinstance(v, Tensor) and n not in aside
    }
    reaching = {n: v for n, v in scalars.items() if n not in aside and not n.startswith("output_")}
    by_token, by_row, whole = _sorted(tensors, shape, config)
    # Some models mask otherwise where there are labels, whatever these are.
    labelled = ("labels" in given, "shift_labels" in given)
    context = repr((training, labelled, sorted(reaching.items()))).encode()
    if whole:
        context = _digest({**by_token, **whole}, context)
    rows = [
        Row(place, part, _row_digest(place, part, by_token, by_row, context))
        for place, part in _places(tensors, shape)
    ]
    if not rows:
        return None
    packed = len(rows) > len({row.place for row in rows})
    asked = [(n, v) for n, v in sorted(scalars.items()) if n not in _LOSS | BORDERS]
    form = (training, packed, len(rows) > 1, tuple(sorted(tensors)), tuple(asked))
    return Batch(shape, rows, packed, not whole, form)


def _places(tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> Iterator[tuple[int, Tensor]]:
    """Yield the rows: each one's place in the batch and its positions there, without padding."""
    mask = tensors.get("attention_mask")
    mask = torch.ones(shape) if mask is None or mask.shape != shape else mask
    positions = tensors.get("position_ids", torch.empty(0))
    for place, kept in enumerate(mask.bool()):
        own = kept.nonzero().squeeze(1)
        cuts = {0, len(own)}
        if tuple(positions.shape) in (shape, (1, shape[1])):
            begins = positions.expand(shape)[place][own] == 0
            cuts |= set(begins.nonzero().squeeze(1).tolist())
        for begin, end in pairwise(sorted(cuts)):
            yield place, own[begin:end]


def _sorted(
    tensors: Mapping[str, Tensor], shape: tuple[int, int], config: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Sort tensors into those by token, those by row, and those that are of the whole batch."""
    by_token = {n: v.expand(*shape, *v.shape[2:]) for n, v in tensors.items() if _fits(v, shape)}
    others = {n: v for n, v in tensors.items() if n not in by_token}
    if "position_ids" not in tensors:
        by_token["places"] = torch.arange(shape[1]).expand(shape)
    if _one_entry_a_row(tensors.get("input_ids"), others, config):
        return by_token, others, {}
    return by_token, {}, others


def _row_digest(
    place: int,
    positions: Tensor,
    by_token: Mapping[str, Tensor],
    by_row: Mapping[str, Tensor],
    context: bytes,
) -> bytes:
    of_row = {name: value[place][positions] for name, value in by_token.items()}
    return _digest(of_row | {name: value[place] for name, value in by_row.items()}, context)


def _fits(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor has an entry for every token of the batch."""
    return tensor.ndim >= 2 and tuple(tensor.shape[:2]) in (shape, (1, shape[1]))


def _one_entry_a_row(ids: Tensor | None, others: Mapping[str, Tensor], config: Any) -> bool:
    """Whether the first dimension of images and the like is that of the rows.

    As many of them as rows is not enough: one row may hold two, another none.
    """
    if ids is None or not all(v.ndim and len(v) == len(ids) for v in others.values()):
        return False
    known = [getattr(config, name) for name in _PLACEHOLDERS if hasattr(config, name)]
    if not known:
        return False
    counts = torch.stack([(ids == token).sum(1) for token in known])
    return bool((counts == counts[:, :1]).all() and counts.any())


def _digest(tensors: Mapping[str, Tensor], context: bytes) -> bytes:
    found = xxhash.xxh3_128(context)
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(bytes_of(tensor))
    return found.digest()
