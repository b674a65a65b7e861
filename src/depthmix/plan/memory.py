"""The bill of a method: trained parameters, bytes by part and device, FLOPs of a step and a token.

What the layers do is counted on fake tensors (counting.py). The rest is arithmetic:

- adapters and MoDE are fp32: 4 bytes each for the parameter and its gradient, 8 for Adam. Full
  fine-tuning trains fp32 weights: 16 bytes a parameter. On a base of 4 bits, trained parameters are
  bf16, as TRL makes them: 8 bytes.
- a base of 4 bits holds its linear layers, the head left out, in half a byte and the scale of a
  block (fp32, one for 64 numbers); a matrix is unpacked to be multiplied.
- gradient checkpointing keeps what enters each layer, and all of one layer at a time, whose forward
  pass runs again.
- the loss, with MoDE or without, holds one chunk of logits at a time (fused_loss.py), and in fp32
  the states of the supervised tokens, their gradients and those of the distillation; where the head
  is trained, also a gradient of it that is added up in fp32.
- sharded over n devices, weights, gradients and optimiser states are divided by n. Embeddings and
  head are whole during a step, and so is a layer, the next one being fetched meanwhile. Not
  sharded, DistributedDataParallel holds gradients a second time.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from depthmix.config import MoDEConfig
from depthmix.method.fused_loss import CHUNK_BYTES
from depthmix.plan.counting import LayerCount
from depthmix.plan.methods import Method
from depthmix.plan.profile import Base, Profile, Setting

# Logits, log-probabilities and gradients, in chunks: of the one at hand, and of the one before it.
# Measured in all are 6.0 (fp32) to 6.5 (bf16) without MoDE; with it 5.1 to 5.6. A soft cap adds
# one to two.
_AT_HAND, _BEFORE = 4.6, 1.7
_HELD_BY_MODE = 5.4
_FOUR_BITS = 0.5 + 4 / 64
_FETCHED_LAYERS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes on each device, by part.

    Attributes:
        weights: of the base, the adapter and MoDE.
        gradients: of what is trained.
        optimizer: Adam's two moments.
        activations: what autograd keeps of the layers.
        loss: chunks of logits, and states of the supervised tokens.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int

    @property
    def step(self) -> int:
        """Bytes that a step takes beside weights and optimiser states."""
        return max(self.activations + self.loss, self.gradients)

    @property
    def total(self) -> int:
        """Bytes at the peak of a step, gradients of an earlier batch included."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


@dataclass(frozen=True)
class Flops:
    """FLOPs of a training step on each device, and of a decoded token.

    Attributes:
        forward: of the layers.
        backward: of the layers, and of their second forward pass under checkpointing.
        loss: products with the head, forward and backward, and MoDE's own.
        cached: of a step of later epochs, the frozen prefix read from disk; None if there is none.
        decode: of one token, with a full cache.
    """

    forward: int
    backward: int
    loss: int
    cached: int | None
    decode: int

    @property
    def step(self) -> int:
        """FLOPs of a step."""
        return self.forward + self.backward + self.loss


@dataclass(frozen=True)
class Bill:
    """What a method costs.

    Attributes:
        trained: trained parameters.
        adapter_bytes: of what is saved.
        tuned_layers: layers that carry the tuning method.
        checkpointing: whether activations are made again in the backward pass.
        memory: bytes on each device.
        memory_4bit: the same with a base of 4 bits; None for full fine-tuning.
        flops: of a step, and of a decoded token.
        kv_bytes: keys and values, or states, of the batch in decoding.
    """

    trained: int
    adapter_bytes: int
    tuned_layers: int
    checkpointing: bool
    memory: Memory
    memory_4bit: Memory | None
    flops: Flops
    kv_bytes: int


def bill_of(
    base: Base,
    profile: Profile | None,
    method: Method,
    config: MoDEConfig,
    setting: Setting,
    checkpointing: bool,
) -> Bill:
    """Return what a method costs.

    Args:
        base: the model.
        profile: the tuning method on it; None where the layers are not tuned.
        method: what is tuned.
        config: of MoDE; its k also where MoDE is not attached.
        setting: what is trained on.
        checkpointing: whether activations are made again in the backward pass.

    Raises:
        ConfigError: the model has too few layers.
    """
    used = config if method.mode else MoDEConfig(k=1)
    step = _Step(base, profile, method, used, setting, checkpointing, config.k)
    full = method.tuning == "full"
    return Bill(
        trained=step.trained,
        adapter_bytes=step.trained * 4,
        tuned_layers=len(step.tuned),
        checkpointing=checkpointing,
        memory=step.memory(four_bits=False),
        memory_4bit=None if full else step.memory(four_bits=True),
        flops=step.flops(),
        kv_bytes=setting.rows * sum(base.decoding[kind].cached for kind in base.kinds),
    )


def mode_parameters(config: MoDEConfig, width: int) -> int:
    """Return the number of MoDE's parameters."""
    from depthmix.method.mixture import DepthMixture

    if config.k == 1:
        return 0
    with torch.device("meta"):
        return sum(p.numel() for p in DepthMixture(config, width, {}).parameters())


class _Step:
    """One training step of a method."""

    def __init__(
        self,
        base: Base,
        profile: Profile | None,
        method: Method,
        config: MoDEConfig,
        setting: Setting,
        checkpointing: bool,
        k: int,
    ) -> None:
        self._base, self._profile, self._config = base, profile, config
        self._setting, self._checkpointing = setting, checkpointing
        self._full = method.tuning == "full"
        depth = len(base.kinds) - method.tuned(len(base.kinds), k)
        self._frozen, self.tuned = base.kinds[:depth], base.kinds[depth:]
        self._mode = mode_parameters(config, base.sizes.width)
        self.trained = self._mode + self._trained_in_layers()

    def _trained_in_layers(self) -> int:
        profile = self._profile
        if profile is None:
            return 0
        outside = 0 if self._frozen else profile.outside
        return outside + sum(profile.trained[kind] for kind in self.tuned)

    @property
    def _supervised(self) -> int:
        return max(1, round(self._setting.tokens * self._setting.supervised))

    def _counts(self) -> list[LayerCount]:
        """Return the counts of the tuned layers, from the lowest on."""
        if self._profile is None:
            return []
        counts = self._profile.counts
        inner = [counts.inner[kind] for kind in self.tuned]
        # Checkpointing a PEFT model, TRL has its input ask for a gradient.
        if self._full or self._checkpointing:
            return inner
        return [counts.lowest[self.tuned[0]], *inner[1:]]

    # Memory

    def memory(self, four_bits: bool) -> Memory:
        setting = self._setting
        size = 4 if self._full else setting.dtype.itemsize
        trained_size = setting.dtype.itemsize if four_bits else 4
        adapter = 0 if self._full else self.trained * trained_size
        shards = setting.gpus if setting.sharded else 1
        weights = self._base_bytes(size, four_bits) + adapter
        gradients = self.trained * trained_size // shards
        if setting.gpus > 1 and not setting.sharded:
            gradients *= 2
        return Memory(
            weights=weights // shards + self._gathered(size, four_bits, shards),
            gradients=gradients,
            optimizer=2 * self.trained * trained_size // shards,
            activations=self._activations(),
            loss=self._loss_bytes(),
        )

    def _base_bytes(self, size: int, four_bits: bool) -> int:
        sizes = self._base.sizes
        if not four_bits:
            return sizes.parameters * size
        return int((sizes.parameters - sizes.quantized) * size + sizes.quantized * _FOUR_BITS)

    def _gathered(self, size: int, four_bits: bool, shards: int) -> int:
        """Return the bytes of weights that are there whole for a while."""
        sizes = self._base.sizes
        unpacked = sizes.largest_matrix * self._setting.dtype.itemsize if four_bits else 0
        if shards == 1:
            return unpacked
        packed = _FOUR_BITS / size if four_bits else 1
        layers = sizes.layer * packed * _FETCHED_LAYERS
        return int((sizes.parameters - sizes.layers + layers) * size) + unpacked

    def _activations(self) -> int:
        counts = self._counts()
        if not counts or self._profile is None:
            return 0
        rest = self._profile.counts.rest
        if self._checkpointing:
            kept = sum(count.entering for count in counts)
            return rest + kept + max(count.saved for count in counts)
        return rest + sum(count.saved for count in counts)

    def _loss_bytes(self) -> int:
        sizes, k = self._base.sizes, self._config.k
        states = 3 * 4 * k * sizes.width * self._supervised
        return self._logits_bytes() + states + (4 * sizes.head if self._full else 0)

    def _logits_bytes(self) -> int:
        """Return what the chunks of logits take that are there at once."""
        token = 4 * self._config.k * self._base.sizes.vocabulary
        chunk = max(1, CHUNK_BYTES // token)
        first = min(self._supervised, chunk)
        second = min(self._supervised - first, chunk)
        if self._config.k > 1:
            return int(_HELD_BY_MODE * first * token)
        return int(max(_AT_HAND * first, _BEFORE * first + _AT_HAND * second) * token)

    # FLOPs

    def flops(self) -> Flops:
        base, counts = self._base, self._counts()
        tuned = sum(count.forward for count in counts)
        backward = sum(count.backward for count in counts) + (tuned if self._checkpointing else 0)
        loss = self._loss_flops()
        head = 2 * base.sizes.head
        decode = sum(base.decoding[kind].flops for kind in base.kinds) + head + 2 * self._mode
        late = base.kinds[-self._config.k :] if self._mode else ()
        read = max(0, len(base.kinds) - max(len(self.tuned), len(late)))
        forward = self._forward(self._frozen) + tuned
        cached = forward - self._forward(base.kinds[:read]) + backward + loss if read else None
        return Flops(forward, backward, loss, cached, decode)

    def _forward(self, kinds: Iterable[int]) -> int:
        return sum(self._base.forward[kind] for kind in kinds)

    def _loss_flops(self) -> int:
        """Return the products with the head, forward, to the states, and to the head itself."""
        product = 2 * self._base.sizes.head * self._supervised * _head_passes(self._config)
        return int(product * (3 if self._full else 2)) + 6 * self._mode * self._supervised


def _head_passes(config: MoDEConfig) -> float:
    """Return how often the head's weight is used a supervised token, forward."""
    if config.distill_weight == 0 or config.k == 1:
        return 1.0
    return 1.0 + config.distill_fraction * (config.k - 1)
