"""What a model and a tuning method do, counted: the input of the bill."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from transformers import PretrainedConfig

from depthmix.errors import ConfigError
from depthmix.plan.counting import (
    Counts,
    Decoding,
    count_decoding,
    count_training,
    walking_kinds,
)
from depthmix.plan.skeleton import Sizes, Skeleton, build, make_fake, trained, tune

_EXPERTS_TUNED = (
    "PEFT puts LoRA on fused experts, on all layers and with lora_dropout 0 only: half, light and "
    "late-lora need lora_target_modules without the experts, and then cost less than shown"
)
_NO_OUT_PROJ = (
    "PEFT refuses LoRA on out_proj of state-space models: name the other modules with "
    "lora_target_modules"
)


@dataclass(frozen=True)
class Setting:
    """What is trained on, and with what.

    Attributes:
        rows: of a batch on each device.
        length: tokens of a row.
        supervised: share of the tokens that are supervised.
        dtype: of a frozen base, and of the arithmetic.
        mixed: whether training is automatically cast to that dtype, as `train` does on a GPU.
        attention: implementation; None for the one that transformers chooses.
        gpus: number of devices.
        sharded: whether weights, gradients and optimiser states are sharded over them.
        trust_remote_code: run modelling code that comes with the configuration.
    """

    rows: int
    length: int
    supervised: float = 0.5
    dtype: torch.dtype = torch.bfloat16
    mixed: bool = True
    attention: str | None = None
    gpus: int = 1
    sharded: bool = False
    trust_remote_code: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of a batch on each device."""
        return self.rows * self.length

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype that training is automatically cast to."""
        return self.dtype if self.mixed and self.dtype != torch.float32 else None


@dataclass(frozen=True)
class Base:
    """A model that nothing is trained of.

    Attributes:
        sizes: of its parts.
        kinds: for each layer, the place of the first one like it.
        forward: FLOPs of a layer on a batch, by kind.
        decoding: of one token of one row, by kind.
        walking: kinds of layers that walk along the tokens one by one.
        attention: implementation.
    """

    sizes: Sizes
    kinds: tuple[int, ...]
    forward: dict[int, int]
    decoding: dict[int, Decoding]
    walking: frozenset[int]
    attention: str


@dataclass(frozen=True)
class Profile:
    """A tuning method on a model.

    Attributes:
        counts: of a training step.
        trained: parameters in a layer, by kind.
        outside: trained parameters that lie in no layer.
        note: what had to be left out for PEFT to take the model.
    """

    counts: Counts
    trained: dict[int, int]
    outside: int
    note: str | None = None


def profile_base(config: PretrainedConfig, setting: Setting) -> Base:
    """Count a model as it is.

    Raises:
        ConfigError: the model cannot be built or run without weights.
    """
    with _told(config):
        skeleton = _skeleton(config, setting, setting.dtype)
        skeleton.causal_lm.requires_grad_(False)
        make_fake(skeleton)
        walking = walking_kinds(skeleton)
        counts = count_training(skeleton, setting.rows, setting.length, None, walking)
        return Base(
            sizes=skeleton.sizes,
            kinds=skeleton.kinds,
            forward={kind: count.forward for kind, count in counts.lowest.items()},
            decoding=count_decoding(skeleton, setting.length, walking),
            walking=walking,
            attention=str(skeleton.causal_lm.config._attn_implementation),
        )


def profile_adapter(
    config: PretrainedConfig, base: Base, adapter: PeftConfig, setting: Setting
) -> Profile:
    """Count LoRA on every layer of a model, as `train` puts it there.

    Raises:
        ConfigError: PEFT cannot put it there.
    """
    with _told(config):
        skeleton, note = _adapted(config, adapter, setting)
        return _profile(skeleton, base, setting, note)


def profile_full(config: PretrainedConfig, base: Base, setting: Setting) -> Profile:
    """Count full fine-tuning: weights in fp32, arithmetic in the setting's dtype."""
    with _told(config):
        return _profile(_skeleton(config, setting, torch.float32), base, setting, None)


def _skeleton(config: PretrainedConfig, setting: Setting, dtype: torch.dtype) -> Skeleton:
    return build(config, dtype, setting.attention, setting.trust_remote_code)


def _profile(skeleton: Skeleton, base: Base, setting: Setting, note: str | None) -> Profile:
    make_fake(skeleton)
    causal_lm, layers = skeleton.causal_lm, skeleton.layers
    rows, length = setting.rows, setting.length
    return Profile(
        counts=count_training(skeleton, rows, length, setting.autocast, base.walking),
        trained={kind: trained(layers[kind]) for kind in set(skeleton.kinds)},
        outside=trained(causal_lm) - trained(layers),
        note=note,
    )


def _adapted(
    config: PretrainedConfig, adapter: PeftConfig, setting: Setting
) -> tuple[Skeleton, str | None]:
    """Put the adapter on, or as much of it as PEFT takes for this model."""
    refusal = ValueError("no adapter fits")
    for changed, note in _made_to_fit(adapter):
        skeleton = _skeleton(config, setting, setting.dtype)
        left_out = ("out_proj", "conv1d") if note == _NO_OUT_PROJ else ()
        try:
            tune(skeleton, changed, left_out)
        except ValueError as error:
            refusal = error
        else:
            return skeleton, note
    raise refusal


def _made_to_fit(adapter: PeftConfig) -> Iterator[tuple[PeftConfig, str | None]]:
    yield copy.deepcopy(adapter), None
    without_dropout: Any = copy.deepcopy(adapter)
    without_dropout.lora_dropout = 0.0
    yield without_dropout, _EXPERTS_TUNED
    yield copy.deepcopy(adapter), _NO_OUT_PROJ


@contextmanager
def _told(config: PretrainedConfig) -> Iterator[None]:
    """Say in one line that a model does not run without weights; torch would log it in many."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except ConfigError:
        raise
    except (NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{config.model_type} cannot be planned without weights: {reason}"
        ) from error
    finally:
        logger.setLevel(level)
