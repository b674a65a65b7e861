"""A model without weights: its layers, which of them are alike, and the tuning method on them.

Layers of one kind cost the same, so one of each kind is run and counted; that is what makes a model
of 80 layers a matter of seconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from depthmix.errors import ConfigError

# The place of a layer makes it no other kind.
_PLACES = {"layer_idx", "layer_id", "layer_index", "layer_number", "block_idx", "idx"}


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model, adapters left out.

    Attributes:
        parameters: all of them, a tied weight counted once.
        layer: of the largest layer.
        layers: of all layers.
        quantized: those that a base of 4 bits holds in 4 bits: linear layers, not the head.
        largest_matrix: of the largest of these, which is unpacked to be multiplied.
        head: of the LM head, tied or not.
        width: d.
        vocabulary: V.
    """

    parameters: int
    layer: int
    layers: int
    quantized: int
    largest_matrix: int
    head: int
    width: int
    vocabulary: int


@dataclass
class Skeleton:
    """A causal language model whose tensors are fake.

    Attributes:
        causal_lm: the model.
        layers: its layers: the first of each kind, and a `Repeat` in the place of the others.
        kinds: for each layer, the place of the first one like it.
        sizes: of all its parts.
        fake: the mode in which its tensors live.
    """

    causal_lm: PreTrainedModel
    layers: nn.ModuleList
    kinds: tuple[int, ...]
    sizes: Sizes
    fake: FakeTensorMode

    @property
    def trunk(self) -> Any:
        """What lies below the head."""
        return self.causal_lm.base_model


class Repeat(nn.Module):
    """Stands for a layer that is like an earlier one: without parameters, to be passed by.

    Args:
        layer: the earlier one, whose attributes the model may ask for.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.like = (layer,)  # in a tuple, in which torch takes it for no child

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the earlier layer."""
        return getattr(self.like[0], name)


def build(
    config: PretrainedConfig,
    dtype: torch.dtype,
    attention: str | None,
    trust_remote_code: bool = False,
) -> Skeleton:
    """Build a model from its configuration, in a moment and in no memory.

    Args:
        config: of a causal language model.
        dtype: of the weights.
        attention: implementation; None for the one that transformers chooses.
        trust_remote_code: run modelling code that comes with the configuration.
    """
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(
            config,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
        )
    layers = _layers(causal_lm)
    sizes = _sizes(causal_lm, layers)
    kinds = _kinds(causal_lm.config, layers)
    for place, kind in enumerate(kinds):
        if place != kind:
            layers[place] = Repeat(layers[kind])
    return Skeleton(causal_lm, layers, kinds, sizes, FakeTensorMode())


def _sizes(causal_lm: PreTrainedModel, layers: nn.ModuleList) -> Sizes:
    head: Any = causal_lm.get_output_embeddings()
    matrices = [
        module.weight.numel()
        for module in causal_lm.modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
    return Sizes(
        parameters=parameters(causal_lm),
        layer=max(map(parameters, layers)),
        layers=parameters(layers),
        quantized=sum(matrices),
        largest_matrix=max(matrices, default=0),
        head=head.weight.numel(),
        width=head.weight.shape[1],
        vocabulary=head.weight.shape[0],
    )


def tune(skeleton: Skeleton, adapter: PeftConfig, left_out: Sequence[str] = ()) -> None:
    """Put an adapter on one layer of each kind.

    Args:
        skeleton: to put it on.
        adapter: the tuning method, which is changed.
        left_out: names of modules that are not tuned.

    Raises:
        ValueError: PEFT cannot put it on.
    """
    untyped: Any = adapter
    untyped.exclude_modules = list(left_out) or None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that PEFT finds transposed and takes as such
        get_peft_model(skeleton.causal_lm, adapter)


def make_fake(skeleton: Skeleton) -> None:
    """Turn meta tensors into fake CPU ones, for which torch chooses the kernels of a device."""
    fake, cpu = skeleton.fake, torch.device("cpu")
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tied weight stays one weight
    for module in skeleton.causal_lm.modules():
        for name, p in module._parameters.items():
            if p is not None and p not in made:
                made[p] = nn.Parameter(FakeTensor(fake, p.detach(), cpu), p.requires_grad)
            module._parameters[name] = None if p is None else made[p]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = FakeTensor(fake, buffer.to("meta"), cpu)


def parameters(module: nn.Module) -> int:
    """Return the number of a module's parameters."""
    return sum(p.numel() for p in module.parameters())


def trained(module: nn.Module) -> int:
    """Return the number of a module's trained parameters."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _layers(causal_lm: PreTrainedModel) -> nn.ModuleList:
    """Return the list of layers: by length, since there are no values to compare."""
    lists = [m for m in causal_lm.modules() if isinstance(m, nn.ModuleList) and len(m)]
    count = getattr(causal_lm.config, "num_hidden_layers", None)
    lists = [found for found in lists if len(found) == count] or lists
    if not lists:
        raise ConfigError(f"{type(causal_lm).__name__} has no list of layers")
    return max(lists, key=len)


def _kinds(config: Any, layers: nn.ModuleList) -> tuple[int, ...]:
    types = getattr(config, "layer_types", None) or [None] * len(layers)
    first: dict[Any, int] = {}
    signatures = [(kind, _signature(layer)) for kind, layer in zip(types, layers, strict=False)]
    return tuple(first.setdefault(s, place) for place, s in enumerate(signatures))


def _signature(layer: nn.Module) -> tuple[Any, ...]:
    """Return what decides the costs of a layer: modules, shapes, and plain attributes."""
    return tuple(
        (
            name,
            type(module).__name__,
            tuple((n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False)),
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                if isinstance(value, int | float | str | None) and key not in _PLACES
            ),
        )
        for name, module in layer.named_modules()
    )
