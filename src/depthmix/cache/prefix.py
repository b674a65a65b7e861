"""The frozen layers at the bottom of a model: where the cut is, and the digest of what they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
import xxhash
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

import depthmix
from depthmix.config import MoDEConfig
from depthmix.errors import ConfigError
from depthmix.method.mixture import MODULE_NAME
from depthmix.model.active import host_of
from depthmix.model.anatomy import Anatomy, first_tensor
from depthmix.model.discovery import discover
from depthmix.model.probing import evaluating, run_probe
from depthmix.model.runtime import RUNTIME_NAME, runtime_of


class NothingFrozenError(ConfigError):
    """The first layer is trained already: there is nothing to cache."""


@dataclass(frozen=True)
class Prefix:
    """Layers whose output is the same in every epoch.

    Attributes:
        host: the model that they are part of.
        layers: the layers, the first one first.
        above: where the names of what never reaches their output begin.
    """

    host: PreTrainedModel
    layers: list[nn.Module]
    above: tuple[str, ...]

    def digest(self, dtype: torch.dtype, device: torch.device) -> str:
        """Return a digest of all that decides the output: every weight, configuration, versions."""
        versions = (torch.__version__, transformers.__version__, depthmix.__version__)
        attention = self.host.config._attn_implementation
        decided = (len(self.layers), dtype, device.type, attention, versions)
        found = xxhash.xxh3_128(repr((decided, self.host.config.to_dict())).encode())
        for name, tensor in self._tensors():
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(bytes_of(tensor))
        return found.hexdigest()[:16]

    def probe(self) -> Any:
        """Return what the last layer gives for a few tokens."""
        outputs: list[Any] = []
        handle = self.layers[-1].register_forward_hook(lambda _m, _a, out: outputs.append(out))
        try:
            with evaluating(self.host):
                run_probe(self.host)
        finally:
            handle.remove()
        if not outputs or first_tensor(outputs[0]) is None:
            raise ConfigError("the frozen layers give no hidden states")
        return outputs[0]

    @contextmanager
    def answering(self, answer: Any) -> Iterator[None]:
        """Let `answer(layer's place, layer's own forward, ...)` run in place of the forwards."""
        originals = [layer.forward for layer in self.layers]
        own = [vars(layer).get("forward") for layer in self.layers]
        for place, (layer, original) in enumerate(zip(self.layers, originals, strict=True)):
            layer.forward = partial(answer, place, original)
        try:
            yield
        finally:
            for layer, forward in zip(self.layers, own, strict=True):
                if forward is None:
                    del layer.forward
                else:
                    layer.forward = forward

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        tensors = dict(self.host.named_buffers()) | self.host.state_dict()
        for name, tensor in sorted(tensors.items()):
            if isinstance(tensor, Tensor) and not name.startswith(self.above):
                yield name, tensor


def bytes_of(tensor: Tensor) -> Any:
    """Return the numbers of a tensor as they lie in memory."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()


def frozen_prefix(model: nn.Module) -> Prefix:
    """Return the layers below everything that is trained, up to the first one the mixture reads.

    Raises:
        NothingFrozenError: the first layer is trained.
        ConfigError: their output is not the same in every epoch; says why.
        DiscoveryError: the layers were not found.
    """
    host = host_of(model)
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise ConfigError("the prompt is trained, which all layers see")
    if host.config.is_encoder_decoder:
        raise ConfigError("it is for models without an encoder")
    if is_deepspeed_zero3_enabled() or any(isinstance(p, DTensor) for p in host.parameters()):
        raise ConfigError("it is for whole models, and this one is sharded (FSDP, ZeRO, TP)")
    if any(p.is_meta for p in host.parameters()):
        raise ConfigError("it is for models in memory, and this one is offloaded")
    anatomy = _anatomy(host)
    cut = _cut(host, anatomy)
    above = _above(anatomy, cut)
    _require_frozen(host, above)
    listed: Any = host.get_submodule(anatomy.layers_path)
    return Prefix(host, list(listed[:cut]), above)


def _anatomy(host: PreTrainedModel) -> Anatomy:
    if RUNTIME_NAME in vars(host):
        return runtime_of(host).anatomy
    return discover(host, MoDEConfig(k=1))


def _cut(host: PreTrainedModel, anatomy: Anatomy) -> int:
    """Return the place of the first layer that is not part of the prefix."""
    cut = anatomy.layer_indices[0] + 1  # the first late layer's state is stored, and read
    for place in range(cut):
        layer = host.get_submodule(f"{anatomy.layers_path}.{place}")
        trained = [name for name, p in layer.named_parameters() if p.requires_grad]
        if trained and place == 0:
            name = f"{anatomy.layers_path}.0.{trained[0]}"
            raise NothingFrozenError(f"{name} is trained, in the first layer: nothing is frozen")
        if trained:
            return place
    return cut


def _require_frozen(host: PreTrainedModel, above: tuple[str, ...]) -> None:
    """Look at what lies beside the layers, the embeddings for instance."""
    for name, parameter in host.named_parameters():
        if parameter.requires_grad and not name.startswith(above):
            raise ConfigError(f"{name} is trained, which lies below the tuned layers")
    for name, module in host.named_modules():
        if isinstance(module, BaseTunerLayer) and not f"{name}.".startswith(above):
            raise ConfigError(f"{name} carries an adapter, which can be switched off: merge it")


def _above(anatomy: Anatomy, cut: int) -> tuple[str, ...]:
    """Return where the names of modules above the cut begin.

    A head that is tied to the embeddings stands in `named_parameters` under the embeddings' name.
    """
    layers = [f"{anatomy.layers_path}.{index}" for index in range(cut, anatomy.layer_count)]
    paths = (*layers, anatomy.norm_path, anatomy.head_path, MODULE_NAME)
    return tuple(f"{path}." for path in paths if path)
