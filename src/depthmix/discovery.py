"""Find the late layers, the final norm and the head in a Hugging Face model, by its behaviour.

One probe forward with a hook on every module shows the structure, without a table of names: the
head is `get_output_embeddings()`; the final norm is the first module whose output is what the
head gets; the layers are the longest `ModuleList` of states of that shape, the last of which is
what the norm gets. What the model does to the head's output (scale, soft cap) is found by
feeding known values out of the head. Where anything is unclear, `DiscoveryError` says what was
found; `layers_path` and `norm_path` of the configuration settle it by hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from depthmix.config import MoDEConfig
from depthmix.errors import DiscoveryError
from depthmix.head import LogitTransform


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a causal language model are.

    Attributes:
        layers_path: module path of the list of layers.
        layer_indices: places of the k late layers in that list, the last layer last.
        norm_path: module path of the final norm, or of the last layer where there is no norm.
        has_norm: whether there is a final norm; without one, late states are taken as they are.
        head_path: module path of the LM head.
        head_scale: constant between the norm's output and the head's input.
        logit_transform: what the model does to the head's output.
        hidden_size: width d of the hidden states.
        vocabulary: outputs of the head.
    """

    layers_path: str
    layer_indices: tuple[int, ...]
    norm_path: str
    has_norm: bool
    head_path: str
    head_scale: float
    logit_transform: LogitTransform
    hidden_size: int
    vocabulary: int

    @property
    def layer_paths(self) -> tuple[str, ...]:
        """Module paths of the late layers, the last layer last."""
        return tuple(f"{self.layers_path}.{index}" for index in self.layer_indices)


def discover(model: PreTrainedModel, config: MoDEConfig) -> Anatomy:
    """Return the anatomy of a causal language model.

    Raises:
        DiscoveryError: a part was not found or is not what MoDE needs; says which, and the way out.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise DiscoveryError(f"{type(model).__name__} has no LM head (get_output_embeddings)")
    paths = {module: path for path, module in model.named_modules()}
    with _evaluating(model):
        probe = _Probe(model, head)
    layers_path, layers = _layers(probe, model, config)
    norm = _final_norm(probe, paths, layers, config.norm_path)
    count = len(layers)
    if config.k > count:
        raise DiscoveryError(
            f"k = {config.k}, but {type(model).__name__} has {count} layers ({layers_path})"
        )
    return Anatomy(
        layers_path=layers_path,
        layer_indices=tuple(range(count - config.k, count)),
        norm_path=paths[norm],
        has_norm=norm is not layers[-1],
        head_path=paths[head],
        head_scale=_constant_ratio(probe.outputs[norm], probe.head_input) or 1.0,
        logit_transform=probe.logit_transform,
        hidden_size=probe.head_input.shape[-1],
        vocabulary=probe.head_output.shape[-1],
    )


class _Probe:
    """What every module took and gave in one forward, in order of completion."""

    def __init__(self, model: PreTrainedModel, head: nn.Module) -> None:
        self.inputs: dict[nn.Module, Tensor] = {}
        self.outputs: dict[nn.Module, Tensor] = {}
        self.calls: dict[nn.Module, int] = {}
        handles = [m.register_forward_hook(self._record, with_kwargs=True) for m in model.modules()]
        try:
            run_probe(model)
        finally:
            for handle in handles:
                handle.remove()
        if head not in self.outputs or head not in self.inputs:
            raise DiscoveryError(
                f"{type(model).__name__} did not call its LM head on one tensor in a probe forward"
            )
        self.head_input, self.head_output = self.inputs[head], self.outputs[head]
        self.logit_transform = _fit_logit_transform(model, head)

    def _record(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        tensor = first_tensor(output)
        self.calls[module] = self.calls.get(module, 0) + 1
        if tensor is not None:
            self.outputs[module] = tensor
        given = first_tensor((*args, *kwargs.values()))
        if given is not None:
            self.inputs[module] = given


def first_tensor(value: Any) -> Tensor | None:
    """Return the hidden states in what a module takes or gives: itself, or the first of a tuple."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
        return value[0]
    return None


def run_probe(model: PreTrainedModel) -> Tensor:
    """Run the model on a few tokens and return its logits, (1, tokens, vocabulary)."""
    embeddings: Any = model.get_input_embeddings().weight
    ids = torch.arange(1, 6, device=embeddings.device).unsqueeze(0)
    return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _layers(probe: _Probe, model: nn.Module, config: MoDEConfig) -> tuple[str, nn.ModuleList]:
    """Return the longest list of modules that each give one state of the shape the head gets."""
    shape = probe.head_input.shape
    lists = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and path == (config.layers_path or path)
    }
    candidates = {
        path: module
        for path, module in lists.items()
        if len(module) > 0
        and all(m in probe.outputs and probe.outputs[m].shape == shape for m in module)
    }
    if not candidates:
        raise DiscoveryError(
            f"no list of layers whose outputs are {tuple(shape)} found"
            + (f" at layers_path {config.layers_path!r}" if config.layers_path else "")
            + f"; lists of modules: {', '.join(lists) or 'none'}"
        )
    path = max(candidates, key=lambda name: len(candidates[name]))
    layers = candidates[path]
    if any(probe.calls[layer] != 1 for layer in layers):
        raise DiscoveryError(f"{path}: a layer is called more than once a forward (shared layers)")
    return path, layers


def _final_norm(
    probe: _Probe, paths: dict[nn.Module, str], layers: nn.ModuleList, path: str | None
) -> nn.Module:
    """Return the module that turns the last layer's output into what the head gets.

    The outermost such module, so that a norm which a tuning method has wrapped is taken whole; the
    last layer itself, where the head gets its output.
    """
    last_state = probe.outputs[layers[-1]]
    inside = set(layers.modules())
    matches = [
        module
        for module, output in probe.outputs.items()
        if module not in inside
        and module in probe.inputs
        and probe.inputs[module].shape == last_state.shape == output.shape
        and torch.equal(probe.inputs[module], last_state)
        and _constant_ratio(output, probe.head_input) is not None
        and path in (None, paths[module])
    ]
    untouched = _constant_ratio(last_state, probe.head_input) is not None
    if not matches and untouched and path is None:
        return layers[-1]
    if not matches:
        raise DiscoveryError(
            f"{f'norm_path {path!r} is not' if path else 'found no'} module that turns the output "
            f"of the last layer, {paths[layers[-1]]} {_describe(last_state)}, into what the LM "
            f"head gets, {_describe(probe.head_input)}: no final norm, or a residual stream that "
            "is not one tensor a layer"
        )
    return matches[-1]


def _constant_ratio(numerator_of: Tensor, target: Tensor) -> float | None:
    """Return c with target = c x tensor everywhere, or None."""
    tensor, target = numerator_of.float(), target.float()
    c = ((tensor * target).sum() / tensor.square().sum()).item()
    if c != 0 and torch.allclose(target, c * tensor, rtol=2e-2, atol=1e-3 * abs(c)):
        return 1.0 if abs(c - 1) < 1e-3 else c
    return None


def _fit_logit_transform(model: PreTrainedModel, head: nn.Module) -> LogitTransform:
    """Feed known values out of the head and see what becomes of them."""
    fed: list[Tensor] = []

    def replace(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        ramp = torch.linspace(-1, 1, output.shape[-1], device=output.device).pow(3)
        fed.append((1e3 * ramp).to(output.dtype).expand_as(output))
        return fed[-1]

    handle = head.register_forward_hook(replace)
    try:
        logits = run_probe(model).double()
    finally:
        handle.remove()
    given = fed[-1].double()
    if logits.shape == given.shape:
        for transform in _candidate_transforms(given, logits):
            error = (transform(given) - logits).abs().max()
            if error <= 2e-2 * logits.abs().max():
                return transform
    raise DiscoveryError(
        f"{type(model).__name__} does something to the head's output that is neither a scale nor a "
        f"soft cap (head {_describe(given)}, logits {_describe(logits)})"
    )


def _candidate_transforms(given: Tensor, logits: Tensor) -> Iterator[LogitTransform]:
    scale = ((given * logits).sum() / given.square().sum()).item()
    yield LogitTransform(1.0 if abs(scale - 1) < 1e-2 else scale)
    cap = logits.abs().max().item()
    # Where the values are far below the cap, tanh is the identity and the slope is the scale.
    small = (given != 0) & (logits.abs() < 0.05 * cap)
    if bool(small.any()):
        slope = (logits[small] / given[small]).mean().item()
        yield LogitTransform(1.0 if abs(slope - 1) < 1e-2 else slope, cap)


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
