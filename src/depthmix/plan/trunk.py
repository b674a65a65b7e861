"""Run a model's layers on fake tensors and count: no memory, no arithmetic, real shapes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from depthmix.errors import ConfigError

TUNINGS = ("full", "lora", "late-lora", "none")


@dataclass(frozen=True)
class Trunk:
    """Counts of one method on one batch, the LM head and the loss left out.

    Attributes:
        parameters: of the whole model, the adapter left out.
        head_parameters: of the LM head, tied or not.
        adapter_parameters: trained parameters, MoDE's left out.
        layers: number of layers.
        late_layers: layers through which the gradient goes.
        width: d.
        vocabulary: V.
        forward_flops: of the layers, a batch.
        backward_flops: the same, backward.
        saved_bytes: activations that autograd keeps until the backward pass.
        kv_bytes: keys and values of the batch in decoding; 0 for other kinds of cache.
    """

    parameters: int
    head_parameters: int
    adapter_parameters: int
    layers: int
    late_layers: int
    width: int
    vocabulary: int
    forward_flops: int
    backward_flops: int
    saved_bytes: int
    kv_bytes: int


@dataclass(frozen=True)
class Step:
    """What is counted: one batch on one device.

    Attributes:
        rows: of the batch.
        length: tokens of a row.
        k: late layers.
        rank: of LoRA, on all linear layers.
        dtype: of the weights.
    """

    rows: int
    length: int
    k: int
    rank: int
    dtype: torch.dtype


def count_trunk(config: PretrainedConfig, method: str, step: Step) -> Trunk:
    """Count what a training step of a method, one of `TUNINGS`, does below the LM head.

    Raises:
        ConfigError: the model cannot be built or run without weights.
    """
    try:
        return _count(config, method, step)
    except (NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{config.model_type} cannot be planned without weights: {error}"
        ) from error


def _count(config: PretrainedConfig, method: str, step: Step) -> Trunk:
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(config, dtype=step.dtype)
    path, layers = _layers(causal_lm)
    head: Any = causal_lm.get_output_embeddings()
    parameters = sum(p.numel() for p in causal_lm.parameters())
    vocabulary, width = head.weight.shape
    if step.k > len(layers):
        raise ConfigError(f"k = {step.k}, but the model has {len(layers)} layers")
    first = _adapt(causal_lm, method, path, layers, step)
    forward, backward, saved, cached = _run(causal_lm, step.rows, step.length)
    trained = sum(p.numel() for p in causal_lm.parameters() if p.requires_grad)
    return Trunk(
        parameters=parameters,
        head_parameters=head.weight.numel(),
        adapter_parameters=trained,
        layers=len(layers),
        late_layers=len(layers) - first,
        width=width,
        vocabulary=vocabulary,
        forward_flops=forward,
        backward_flops=backward,
        saved_bytes=saved,
        kv_bytes=cached,
    )


def _layers(causal_lm: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the longest list of modules: by structure, since there are no values to compare."""
    lists = [(n, m) for n, m in causal_lm.named_modules() if isinstance(m, nn.ModuleList)]
    if not lists:
        raise ConfigError(f"{type(causal_lm).__name__} has no list of layers")
    return max(lists, key=lambda found: len(found[1]))


def _adapt(
    causal_lm: PreTrainedModel, method: str, path: str, layers: nn.ModuleList, step: Step
) -> int:
    """Put the method on and return the first layer that the gradient goes through."""
    if method == "full":
        return 0
    causal_lm.requires_grad_(False)
    if method == "none":
        return len(layers)  # the gradient of MoDE's norms and router ends above the layers
    late = method.startswith("late-")
    first = len(layers) - step.k if late else 0
    names = [
        f"{path}.{first + i}.{name}"
        for i, layer in enumerate(layers[first:])
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    ]
    get_peft_model(causal_lm, LoraConfig(r=step.rank, target_modules=names, task_type="CAUSAL_LM"))
    return first


def _run(causal_lm: PreTrainedModel, rows: int, length: int) -> tuple[int, int, int, int]:
    """Return FLOPs forward and backward, bytes that autograd keeps, bytes of keys and values."""
    fake = FakeTensorMode()
    _make_fake(causal_lm, fake)
    with fake:
        ids = torch.zeros(rows, length, dtype=torch.long)
        return *_count_pass(causal_lm, ids), _count_cache(causal_lm, ids)


def _make_fake(model: nn.Module, fake: FakeTensorMode) -> None:
    """Turn meta tensors into fake CPU ones, for which torch chooses the kernels of a device."""
    cpu = torch.device("cpu")
    made: dict[nn.Parameter, nn.Parameter] = {}  # a tied weight stays one weight
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p not in made:
                made[p] = nn.Parameter(FakeTensor(fake, p.detach(), cpu), p.requires_grad)
            module._parameters[name] = None if p is None else made[p]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = FakeTensor(fake, buffer.to("meta"), cpu)


def _count_pass(causal_lm: PreTrainedModel, ids: Tensor) -> tuple[int, int, int]:
    storages: dict[int, Tensor] = {}
    weights = {p.untyped_storage()._cdata for p in causal_lm.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in weights:
            storages[key] = tensor
        return tensor

    trunk: Any = causal_lm.base_model
    saving = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with FlopCounterMode(display=False) as forward, saving:
        hidden = trunk(input_ids=ids, use_cache=False).last_hidden_state
    backward = 0
    if hidden.requires_grad:
        with FlopCounterMode(display=False) as counter:
            hidden.sum().backward()
        backward = counter.get_total_flops()
    saved = sum(t.untyped_storage().nbytes() for t in storages.values())
    return forward.get_total_flops(), backward, saved


@torch.no_grad()
def _count_cache(causal_lm: PreTrainedModel, ids: Tensor) -> int:
    trunk: Any = causal_lm.base_model
    cache = trunk(input_ids=ids, use_cache=True).get("past_key_values")
    if not isinstance(cache, DynamicCache):
        return 0
    layers = [layer for layer in cache.layers if isinstance(layer, DynamicLayer)]
    return sum(tensor.nbytes for layer in layers for tensor in (layer.keys, layer.values))  # type: ignore[union-attr,misc]
