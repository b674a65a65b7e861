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
from depthmix.partitioned import runnable


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a model are.

    Attributes:
        layers_path: module path of the list of layers.
        layer_indices: places of the k late layers in that list, the last layer last.
        norm_path: module path of the final norm, or of the last layer where there is none.
        has_norm: whether one module, the final norm, leads from the last layer to the head.
        stacked: whether more than one module does, through which all late states pass as one batch;
            if there is neither, late states are what the head gets.
        head_path: module path of the head.
        head_scale: constant between the norm's output and the head's input.
        logit_transform: what the model does to the head's output.
        hidden_size: width d of what the head gets.
        vocabulary: outputs of the head; the classes of a classifier.
        labels_shifted: whether position t predicts label t + 1 (a causal model) or label t (a
            masked one; a decoder behind an encoder, which gets its labels moved by one).
    """

    layers_path: str
    layer_indices: tuple[int, ...]
    norm_path: str
    has_norm: bool
    stacked: bool
    head_path: str
    head_scale: float
    logit_transform: LogitTransform
    hidden_size: int
    vocabulary: int
    labels_shifted: bool

    @property
    def layer_paths(self) -> tuple[str, ...]:
        """Module paths of the late layers, the last layer last."""
        return tuple(f"{self.layers_path}.{index}" for index in self.layer_indices)


def is_classifier(model: nn.Module) -> bool:
    """Tell whether a model classifies sequences."""
    return type(model).__name__.endswith("ForSequenceClassification")


def discover(model: PreTrainedModel, config: MoDEConfig) -> Anatomy:
    """Return the anatomy of a language model or of a classifier of sequences.

    Raises:
        DiscoveryError: a part was not found or is not what MoDE needs; says which, and the way out.
    """
    with runnable(model), _evaluating(model):
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
    transform, shifted = _fit_logit_transform(model, head), _shifts_labels(model)
    path, layers = _layers(probe, config, head_input.shape)
    try:
        norm: nn.Module | None = _final_norm(probe, layers, head, config.norm_path)
    except DiscoveryError as no_norm:
        if config.norm_path:
            raise
        try:
            _require_rows_alone(model, layers[-1], head, head_input)
        except DiscoveryError as error:
            raise DiscoveryError(f"{no_norm}; {error}") from error
        norm = None
    return Anatomy(
        layers_path=path,
        layer_indices=_late_indices(model, layers, path, config),
        norm_path=probe.paths[norm or layers[-1]],
        has_norm=norm not in (layers[-1], None),
        stacked=norm is None,
        head_path=probe.paths[head],
        head_scale=(norm and _constant_ratio(probe.outputs[norm], head_input)) or 1.0,
        logit_transform=transform,
        hidden_size=head_input.shape[-1],
        vocabulary=head_output.shape[-1],
        labels_shifted=shifted,
    )


def _discover_classifier(model: PreTrainedModel, config: MoDEConfig) -> Anatomy:
    if model.config.is_encoder_decoder or config.norm_path:
        what = "norm_path" if config.norm_path else "an encoder-decoder"
        raise DiscoveryError(f"{what} is not supported for a classifier of sequences")
    probe = _Probe(model)
    head = _classification_head(probe, model)
    path, layers = _layers(probe, config, (1, _PROBE_LENGTH))
    _require_rows_alone(model, layers[-1], head, probe.inputs[head])
    return Anatomy(
        layers_path=path,
        layer_indices=_late_indices(model, layers, path, config),
        norm_path=probe.paths[layers[-1]],
        has_norm=False,
        stacked=True,
        head_path=probe.paths[head],
        head_scale=1.0,
        logit_transform=LogitTransform(),
        hidden_size=probe.inputs[head].shape[-1],
        vocabulary=probe.outputs[head].shape[-1],
        labels_shifted=False,
    )


_PROBE_LENGTH = 5


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


def first_tensor(value: Any) -> Tensor | None:
    """Return the hidden states in what a module takes or gives: itself, or the first of a tuple."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
        return value[0]
    return None


def with_first_tensor(value: Any, tensor: Tensor) -> Any:
    """Return what a module gives, with other hidden states in it; see `first_tensor`."""
    return tensor if isinstance(value, Tensor) else (tensor, *value[1:])


def run_probe(model: PreTrainedModel) -> Tensor:
    """Run the model on a few tokens; return its logits, (1, [tokens,] vocabulary or classes)."""
    return model(**_probe_inputs(model)).logits  # type: ignore[no-any-return]


def _probe_inputs(model: PreTrainedModel, rows: int = 1) -> dict[str, Any]:
    embeddings: Any = model.get_input_embeddings().weight
    ids = torch.arange(1, _PROBE_LENGTH + 1, device=embeddings.device).expand(rows, -1)
    if not model.config.is_encoder_decoder:
        return {"input_ids": ids, "use_cache": False}
    # Of another length, which tells the decoder's states from the encoder's.
    return {"input_ids": ids, "decoder_input_ids": ids[:, 1:], "use_cache": False}


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    for module in modes:
        # On a CPU, a 4-bit linear map of bitsandbytes repacks its weight when it first runs in
        # evaluation, and gives no gradients from then on.
        module.training = isinstance(module, nn.Linear)
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


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
            f"of the last layer, {probe.paths[layers[-1]]} {_describe(last_state)}, into what the "
            f"LM head gets, {_describe(head_input)}: no final norm, or a residual stream that is "
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
        inputs = _probe_inputs(model, rows=2)
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
        torch.allclose(rows[i], expected[0], rtol=1e-2, atol=1e-2) for i in (0, 1, 4, 5)
    ):
        raise DiscoveryError(
            f"{type(model).__name__}: what lies between the last layer and the head does not treat "
            "every row alike"
        )


def _constant_ratio(numerator_of: Tensor, target: Tensor) -> float | None:
    """Return c with target = c x tensor everywhere, or None."""
    if numerator_of.shape != target.shape:
        return None
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


def _shifts_labels(model: PreTrainedModel) -> bool:
    """Supervise one position and see whose logits the model's loss is nearer to."""
    logits = run_probe(model)
    label, place = 1, 2
    labels = torch.full(logits.shape[:2], -100, device=logits.device)
    labels[0, place] = label
    try:
        loss = model(**_probe_inputs(model), labels=labels).loss
    except Exception as error:  # whatever the model's own code needs beside
        raise DiscoveryError(
            f"{type(model).__name__} does not compute its loss from tokens and labels alone "
            f"({type(error).__name__}: {error})"
        ) from error
    losses = -logits[0].double().log_softmax(dim=-1)[:, label]
    distances = (losses - loss).abs()
    return bool(distances[place - 1] <= distances[place])


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
