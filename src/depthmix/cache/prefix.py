"""The frozen layers below the late ones: whether their output can be cached, and their digest."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

import depthmix
from depthmix.config import MoDEConfig
from depthmix.errors import ConfigError
from depthmix.model.active import host_of
from depthmix.model.discovery import discover

_SAMPLED = 256  # numbers of each weight that go into the digest


@dataclass(frozen=True)
class Prefix:
    """Layers whose output is the same in every epoch.

    Attributes:
        host: the model that they are part of.
        layers: the layers, the first one first.
        width: of their output.
    """

    host: PreTrainedModel
    layers: list[nn.Module]
    width: int

    def digest(self, dtype: torch.dtype) -> str:
        """Return a digest of all that decides the output: weights, depth, dtype, versions."""
        found = hashlib.sha256(
            repr(
                (
                    len(self.layers),
                    dtype,
                    self.host.config._attn_implementation,
                    transformers.__version__,
                    depthmix.__version__,
                )
            ).encode()
        )
        found.update(repr(self.host.config.to_dict()).encode())
        for name, tensor in self._tensors().items():
            flat = tensor.detach().flatten()
            sample = flat[:: max(1, len(flat) // _SAMPLED)].float().cpu().numpy().tobytes()
            found.update(name.encode() + sample)
        return found.hexdigest()[:16]

    def _tensors(self) -> dict[str, Tensor]:
        embeddings: Any = self.host.get_input_embeddings()
        tensors = {f"embeddings.{n}": t for n, t in embeddings.state_dict().items()}
        for i, layer in enumerate(self.layers):
            tensors |= {f"{i}.{name}": t for name, t in layer.state_dict().items()}
        return tensors


def frozen_prefix(model: nn.Module, k: int) -> Prefix:
    """Return the layers below the k late ones.

    Raises:
        ConfigError: their output is not the same in every epoch; says why.
        DiscoveryError: the layers were not found.
    """
    host = host_of(model)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ConfigError("the prompt is trained, which all layers see")
    anatomy = discover(host, MoDEConfig(k=k))
    listed: Any = host.get_submodule(anatomy.layers_path)
    prefix = list(listed[: anatomy.layer_indices[0]])
    if not prefix:
        raise ConfigError("all layers are late layers")
    late = {id(p) for layer in listed[anatomy.layer_indices[0] :] for p in layer.parameters()}
    if anatomy.norm_path is not None:
        late |= {id(p) for p in host.get_submodule(anatomy.norm_path).parameters()}
    late |= {id(p) for p in _head_parameters(host, anatomy.head_path)}
    for name, parameter in host.named_parameters():
        if parameter.requires_grad and id(parameter) not in late and "depthmix" not in name:
            raise ConfigError(f"{name} is trained, which lies below the late layers")
    stochastic = _dropout([host.get_input_embeddings(), *prefix])
    if stochastic:
        raise ConfigError(f"{stochastic} below the late layers draws anew in every epoch")
    return Prefix(host, prefix, anatomy.hidden_size)


def _head_parameters(host: PreTrainedModel, path: str) -> list[nn.Parameter]:
    """Return the head's own parameters; a head that is tied to the embeddings has none."""
    embeddings: Any = host.get_input_embeddings()
    below = {id(p) for p in embeddings.parameters()}
    return [p for p in host.get_submodule(path).parameters() if id(p) not in below]


def _dropout(modules: list[Any]) -> str | None:
    """Return the name of a module that would draw random numbers in training, if there is one."""
    for module in modules:
        for name, part in module.named_modules():
            if isinstance(part, nn.Dropout) and part.p > 0:
                return f"dropout ({name})"
            rate = getattr(part, "attention_dropout", 0.0)  # a number, applied by functions
            if isinstance(rate, float) and rate > 0:
                return f"attention dropout ({name})"
    return None
