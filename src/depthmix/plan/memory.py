"""The bill of a method: trained parameters, bytes by part and device, FLOPs, cache on disk.

What the layers do is counted on fake tensors (trunk.py). The rest is arithmetic:

- adapters and MoDE are fp32: 4 bytes each for the parameter and its gradient, 8 for Adam. Full
  fine-tuning trains the weights in their own dtype.
- LoRA alone, in plain Trainer, holds logits of all tokens: V numbers a token, in the model's dtype
  and three times in fp32 (upcast, log-softmax, gradient; of fp32 logits no upcast is made).
- MoDE's loss holds one chunk at a time (losses.py): `CHUNKS_HELD` of `CHUNK_BYTES`, and the
  states, their gradients and the distillation's of the supervised tokens in fp32.
- sharded over n devices, weights, gradients and optimizer states are divided by n, and one layer's
  weights are there whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from depthmix.config import MoDEConfig
from depthmix.method.fused_loss import CHUNK_BYTES
from depthmix.plan.trunk import Trunk

# Measured with `depthmix bench --parts loss`: logits, log-probabilities and gradients of a chunk.
CHUNKS_HELD = 7
METHODS: dict[str, tuple[str, bool]] = {
    "full": ("full", False),
    "lora": ("lora", False),
    "lora+mode": ("lora", True),
    "late-lora": ("late-lora", False),
    "late-lora+mode": ("late-lora", True),
    "mode": ("none", True),
}


@dataclass(frozen=True)
class Batch:
    """Tokens of one device in one step, and what it is trained with.

    Attributes:
        rows: rows of a batch.
        length: tokens of a row.
        supervised: share of the tokens that are supervised.
        dtype: of the weights.
        shards: devices that the weights are sharded over.
    """

    rows: int
    length: int
    supervised: float
    dtype: torch.dtype
    shards: int

    @property
    def tokens(self) -> int:
        """Tokens of a batch, padding included."""
        return self.rows * self.length


@dataclass(frozen=True)
class Bill:
    """What a method costs.

    Attributes:
        trained: trained parameters.
        adapter_bytes: of the saved adapter.
        weights: bytes on each device, and so on for the others.
        train_flops: a token.
        decode_flops: a token.
    """

    trained: int
    adapter_bytes: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    train_flops: float
    decode_flops: float

    @property
    def step_bytes(self) -> int:
        """Bytes that a step takes beside weights, adapter and optimizer states."""
        return max(self.activations + self.loss, self.gradients)

    @property
    def total(self) -> int:
        """Bytes at the peak of a step on each device."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


def bill(trunk: Trunk, config: MoDEConfig | None, batch: Batch) -> Bill:
    """Return what a method costs: MoDE with `config`, or none."""
    size, shards = batch.dtype.itemsize, batch.shards
    mode = mode_parameters(config, trunk.width) if config else 0
    trained = trunk.adapter_parameters + mode
    full = trunk.adapter_parameters == trunk.parameters
    trained_size = size if full else 4
    adapter = 0 if full else trained * 4
    layer = trunk.parameters * size // trunk.layers if shards > 1 else 0
    head_flops = 2 * trunk.width * trunk.vocabulary
    passes = _head_passes(config) * batch.supervised if config else 1.0
    return Bill(
        trained=trained,
        adapter_bytes=trained * trained_size,
        weights=(trunk.parameters * size + adapter) // shards + layer,
        gradients=trained * trained_size // shards,
        optimizer=2 * trained * trained_size // shards,
        activations=trunk.saved_bytes,
        loss=_loss_bytes(trunk, config, batch),
        train_flops=(trunk.forward_flops + trunk.backward_flops) / batch.tokens
        + 2 * head_flops * passes,
        decode_flops=2.0 * trunk.parameters + 4.0 * mode,
    )


def mode_parameters(config: MoDEConfig, width: int) -> int:
    """Return the number of MoDE's parameters."""
    from depthmix.method.mixture import DepthMixture

    with torch.device("meta"):
        return sum(p.numel() for p in DepthMixture(config, width, {}).parameters())


def _head_passes(config: MoDEConfig) -> float:
    """Return how often the head's weight is used a supervised token, forward."""
    if config.distill_weight == 0 or config.k == 1:
        return 1.0
    return 1.0 + config.distill_fraction * (config.k - 1)


def _loss_bytes(trunk: Trunk, config: MoDEConfig | None, batch: Batch) -> int:
    if config is None:
        own = 0 if batch.dtype == torch.float32 else batch.dtype.itemsize
        return batch.tokens * trunk.vocabulary * (own + 3 * 4)
    states = 3 * 4 * config.k * trunk.width * int(batch.tokens * batch.supervised)
    return CHUNKS_HELD * CHUNK_BYTES + states
