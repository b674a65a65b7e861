"""Find the late layers, the final norm and the head in a Hugging Face model, by its behaviour.

One probe forward with a hook on every module shows the structure, without a table of names: the
head is `get_output_embeddings()`; the final norm is the first module whose output is what the
head gets; the layers are the longest `ModuleList` of states of that shape, the last of which is
what the norm gets. What the model does to the head's output (scale, soft cap) is found by
feeding known values out of the head. The head of a classifier is its last linear map to
`num_labels`; between its layers and its head there may be anything that treats every row alike.
Where anything is unclear, `DiscoveryError` says what was found; `layers_path` and `norm_path` of
the configuration settle it by hand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from depthmix.config import MoDEConfig
from depthmix.errors import DiscoveryError
from depthmix.method.head import LogitTransform
from depthmix.model.anatomy import (
    Anatomy,
    Between,
    first_tensor,
    is_classifier,
    with_first_tensor,
)
from depthmix.model.loss_probes import fit_logit_transform, shifts_labels
from depthmix.model.partitioned import runnable
from depthmix.model.probing import PROBE_LENGTH, describe, evaluating, probe_inputs, run_probe


def discover(model: PreTrainedModel, config: MoDEConfig) -> Anatomy:
    """Return the anatomy of a language model or of a classifier of sequences.

    Raises:
        DiscoveryError: a part was not found or is not what MoDE needs; says which, and the way out.
    """
    with runnable(model), evaluating(model):
        if is_classifier(model):
            return _discover_classifier(model, config)
        return _discover_language_model(model, config)


def _discover_language_model(model: PreTrainedModel, config: MoDEConfig) -> Anatomy:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise DiscoveryError(f"{type(model).__name__} has no LM head (get_output_embeddings)")
    probe = _Probe(model)
    if head not in probe.outputs or head not in probe.inputs:
        raise DiscoveryError(
            f"{type(model).__name__} did not call its LM head on one tensor in a probe forward"
        )
    head_input, head_output = probe.inputs[head], probe.outputs[head]
    transform, output_bias = fit_logit_transform(
        model, head, head_output.shape[-1], head_output.dtype
    )
    path, layers = _layers(probe, config, head_input.shape)
    _require_all_layers(model, path)
    between, norm = _between(model, probe, layers, head, config)
    return Anatomy(
        layers_path=path,
        layer_indices=_late_indices(model, layers, path, config),
        between=between,
        norm_path=None if norm is None else probe.paths[norm],
        head_path=probe.paths[head],
        head_scale=_head_scale(probe.outputs[norm or layers[-1]], head_input, between),
        logit_transform=transform,
        output_bias_path=output_bias,
        hidden_size=head_input.shape[-1],
        vocabulary=head_output.shape[-1],
        labels_shifted=shifts_labels(model, head),
    )


def _between(
    model: PreTrainedModel,
    probe: _Probe,
    layers: nn.ModuleList,
    head: nn.Module,
    config: MoDEConfig,
) -> tuple[Between, nn.Module | None]:
    """Return what lies between the last layer and the head, and the final norm if it is one."""
    try:
        norm = _final_norm(probe, layers, head, config.norm_path)
    except DiscoveryError as no_norm:
        if config.norm_path:
            raise
        try:
            _require_rows_alone(model, layers[-1], head, probe.inputs[head])
        except DiscoveryError as error:
            raise DiscoveryError(f"{no_norm}; {error}") from error
        return Between.MODULES, None
    return (Between.NOTHING, None) if norm is layers[-1] else (Between.NORM, norm)


def _head_scale(given: Tensor, head_input: Tensor, between: Between) -> float:
    return (between is not Between.MODULES and _constant_ratio(given, head_input)) or 1.0


def _require_all_layers(model: nn.Module, path: str) -> None:
    """Raise where training skips layers at random: a late layer then has no state."""
    rate = getattr(model.get_submodule(path.rpartition(".")[0]), "layerdrop", 0.0)
    if rate:
        raise DiscoveryError(
            f"{type(model).__name__} drops layers at random in training (layerdrop = {rate}): set "
            "it to 0 in the model's configuration before the model is built"
        )


def _discover_classifier(model: PreTrainedModel, config: MoDEConfig) -> Anatomy:
    if model.config.is_encoder_decoder or config.norm_path:
        what = "norm_path" if config.norm_path else "an encoder-decoder"
        raise DiscoveryError(f"{what} is not supported for a classifier of sequences")
    probe = _Probe(model)
    head = _classification_head(probe, model)
    path, layers = _layers(probe, config, (1, PROBE_LENGTH))
    _require_rows_alone(model, layers[-1], head, probe.inputs[head])
    return Anatomy(
        layers_path=path,
        layer_indices=_late_indices(model, layers, path, config),
        between=Between.MODULES,
        norm_path=None,
        head_path=probe.paths[head],
        head_scale=1.0,
        logit_transform=LogitTransform(),
        output_bias_path=None,
        hidden_size=probe.inputs[head].shape[-1],
        vocabulary=probe.outputs[head].shape[-1],
        labels_shifted=False,
    )


class _Probe:
    """What every module took and gave in one forward, in order of completion."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.paths = {module: path for path, module in model.named_modules()}
        self.inputs: dict[nn.Module, Tensor] = {}
        self.outputs: dict[nn.Module, Tensor] = {}
        self.calls: dict[nn.Module, int] = {}
        handles = [m.register_forward_hook(self._record, with_kwargs=True) for m in model.modules()]
        try:
            run_probe(model)
        except Exception as error:  # whatever the model's own code needs beside
            raise DiscoveryError(
                f"{type(model).__name__} did not run on a few tokens alone "
                f"({type(error).__name__}: {error})"
            ) from error
        finally:
            for handle in handles:
                handle.remove()

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


def _layers(probe: _Probe, config: MoDEConfig, shape: tuple[int, ...]) -> tuple[str, nn.ModuleList]:
    """Return the longest list of modules that each give a state like what the head gets.

    Of that shape; or, where what lies between changes the width, of that many rows and tokens.
    """
    lists = {
        path: module
        for module, path in probe.paths.items()
        if isinstance(module, nn.ModuleList) and path == (config.layers_path or path)
    }
    states = {
        path: [probe.outputs.get(module) for module in modules]
        for path, modules in lists.items()
        if len(modules) > 0
    }
    same = [path for path in states if _all_like(states[path], shape)]
    wider = [path for path in states if _all_like(states[path], shape[:2])]
    if not same and not wider:
        raise DiscoveryError(
            f"no list of layers whose outputs are {tuple(shape)} found"
            + (f" at layers_path {config.layers_path!r}" if config.layers_path else "")
            + f"; lists of modules: {', '.join(lists) or 'none'}"
        )
    path = max(same or wider, key=lambda path: len(lists[path]))
    layers = lists[path]
    if any(probe.calls[layer] != 1 for layer in layers):
        raise DiscoveryError(f"{path}: a layer is called more than once a forward (shared layers)")
    completed = [module for module in probe.outputs if module in set(layers)]
    if completed != list(layers):
        raise DiscoveryError(f"{path}: the layers do not run in the order in which they are listed")
    return path, layers


def _all_like(states: list[Tensor | None], shape: tuple[int, ...]) -> bool:
    """Tell whether all states have three dimensions, the first of which are these."""
    return all(
        state is not None and state.ndim == 3 and tuple(state.shape[: len(shape)]) == tuple(shape)
        for state in states
    )


def _late_indices(
    model: nn.Module, layers: nn.ModuleList, path: str, config: MoDEConfig
) -> tuple[int, ...]:
    count = len(layers)
    if config.k > count:
        name = type(model).__name__
        raise DiscoveryError(f"k = {config.k}, but {name} has {count} layers ({path})")
    return tuple(range(count - config.k, count))


def _final_norm(
    probe: _Probe, layers: nn.ModuleList, head: nn.Module, path: str | None
) -> nn.Module:
    """Return the module that turns the last layer's output into what the head gets.

    The outermost such module, so that a norm which a tuning method has wrapped is taken whole; the
    last layer itself, where the head gets its output.
    """
    last_state, head_input = probe.outputs[layers[-1]], probe.inputs[head]
    inside = set(layers.modules())
    matches = [
        module
        for module, output in probe.outputs.items()
        if module not in inside
        and module in probe.inputs
        and probe.inputs[module].shape == last_state.shape == output.shape
        and torch.equal(probe.inputs[module], last_state)
        and _constant_ratio(output, head_input) is not None
        and path in (None, probe.paths[module])
    ]
    untouched = _constant_ratio(last_state, head_input) is not None
    if not matches and untouched and path is None:
        return layers[-1]
    if not matches:
        raise DiscoveryError(
            f"{f'norm_path {path!r} is not' if path else 'found no'} module that turns the output "
            f"of the last layer, {probe.paths[layers[-1]]} {describe(last_state)}, into what the "
            f"LM head gets, {describe(head_input)}: no final norm, or a residual stream that is "
            "not one tensor a layer"
        )
    return matches[-1]


def _classification_head(probe: _Probe, model: PreTrainedModel) -> nn.Module:
    """Return the last linear map to the classes, the outermost module where one is wrapped."""
    linear = [
        module
        for module in probe.outputs
        if isinstance(module, nn.Linear) and module.out_features == model.config.num_labels
    ]
    if not linear:
        raise DiscoveryError(
            f"{type(model).__name__} has no linear map to its {model.config.num_labels} classes"
        )
    given, scores = probe.inputs[linear[-1]], probe.outputs[linear[-1]]
    wrapped = [
        module
        for module, output in probe.outputs.items()
        if output is scores and probe.inputs.get(module) is given
    ]
    return wrapped[-1]


def _require_rows_alone(
    model: PreTrainedModel, last_layer: nn.Module, head: nn.Module, expected: Tensor
) -> None:
    """Raise unless what lies between the last layer and the head treats every row alike.

    Only then can the late states pass it as one batch.
    """
    given: list[Tensor] = []

    def double(_layer: nn.Module, _args: Any, output: Any) -> Any:
        state = first_tensor(output)
        assert state is not None
        return with_first_tensor(output, torch.cat([state, state.flip(1), state]))

    def keep(_head: nn.Module, args: tuple[Tensor, ...]) -> Tensor:
        given.append(args[0])
        return args[0][:2]

    handles = [
        last_layer.register_forward_hook(double),
        head.register_forward_pre_hook(keep),
    ]
    try:
        inputs = probe_inputs(model, rows=2)
        model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))
    except Exception as error:  # whatever the model's own code makes of other rows
        raise DiscoveryError(
            f"{type(model).__name__}: what lies between the last layer and the head depends on the "
            f"number of rows ({type(error).__name__}: {error})"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    rows = given[-1]
    if rows.shape[0] != 6 or not all(
        _near(rows[i].double(), expected[0].double(), rows.dtype) for i in (0, 1, 4, 5)
    ):
        raise DiscoveryError(
            f"{type(model).__name__}: what lies between the last layer and the head does not treat "
            "every row alike"
        )


def _constant_ratio(numerator_of: Tensor, target: Tensor) -> float | None:
    """Return c with target = c x tensor everywhere, or None."""
    if numerator_of.shape != target.shape:
        return None
    tensor, wanted = numerator_of.double(), target.double()
    c = ((tensor * wanted).sum() / tensor.square().sum()).item()
    if c == 0 or not _near(c * tensor, wanted, target.dtype):
        return None
    return 1.0 if abs(c - 1) < 1e-3 else c


def _near(found: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Tell whether two states are one, up to the rounding of a dtype, by the size of the states."""
    tolerance = max(1e-3, 4 * torch.finfo(dtype).eps)
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
