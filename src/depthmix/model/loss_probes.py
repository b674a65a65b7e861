"""What a language model does behind its head, by probes: to logits, labels and loss.

What a probe decides, it decides by differences in which everything else cancels, on several
positions, with logits of our own that lie far apart; where the answers are near, it raises.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from depthmix.config import MoDEConfig
from depthmix.errors import DiscoveryError
from depthmix.method.head import LogitTransform
from depthmix.method.mixture import MODULE_NAME, DepthMixture
from depthmix.model.anatomy import OtherTerms
from depthmix.model.fused_output import IGNORED
from depthmix.model.partitioned import runnable
from depthmix.model.probing import describe, evaluating, probe_inputs, run_probe

if TYPE_CHECKING:
    from depthmix.model.runtime import Runtime

_MARGIN = 10.0  # how many times nearer the chosen answer must be than the other one


@contextmanager
def _feeding(head: nn.Module, values: Tensor) -> Iterator[None]:
    """Let the head give these values, (t, v) or (v,), whatever it gets."""

    def replace(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return values.to(output.device, output.dtype).expand_as(output)

    handle = head.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def fit_logit_transform(
    model: PreTrainedModel, head: nn.Module, size: int, dtype: torch.dtype
) -> tuple[LogitTransform, str | None]:
    """Return what the model does to the head's output, and where the bias is that it adds, if any.

    Args:
        model: the model.
        head: its head.
        size: outputs of the head.
        dtype: of the head's output.

    Raises:
        DiscoveryError: it is neither a bias, nor a scale, nor a soft cap.
    """
    fed = (1e3 * torch.linspace(-1, 1, size).pow(3)).to(dtype)
    with _feeding(head, torch.zeros(size)):
        offset = run_probe(model).double()[0, -1].cpu()
    with _feeding(head, fed):
        logits = run_probe(model).double()[0, -1].cpu()
    if logits.shape == fed.shape and bool(offset.isfinite().all()):
        path = _bias_path(model, offset) if bool(offset.any()) else None
        given = fed.double() + offset
        for transform in _candidate_transforms(given, logits):
            error = (transform(given) - logits).abs().max()
            plain = path is None or transform == LogitTransform()
            if error <= 2e-2 * logits.abs().max() and plain:
                return transform, path
    raise DiscoveryError(
        f"{type(model).__name__} does something to the head's output that is neither a scale nor a "
        f"soft cap (head {describe(fed)}, logits {describe(logits)})"
    )


def _bias_path(model: nn.Module, offset: Tensor) -> str:
    """Return the path of the tensor that the model adds to what the head gives."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.numel() == offset.numel():
            value = tensor.detach().double().flatten().cpu()
            if torch.allclose(value, offset, rtol=1e-2, atol=1e-6):
                return name
    raise DiscoveryError(
        f"{type(model).__name__} adds something to the head's output that is no tensor of its own"
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


def shifts_labels(model: PreTrainedModel, head: nn.Module) -> bool:
    """Tell whether position t predicts label t + 1 rather than label t.

    One position is supervised at a time, with the two labels by which its own logits and those of
    the position before differ most. In the difference of the two losses cancels what the model
    adds to them.

    Raises:
        DiscoveryError: neither answer explains the losses.
    """
    length, size = run_probe(model).shape[1:]
    values = 8 * torch.rand(length, size, generator=torch.Generator().manual_seed(0)) - 4
    errors = [0.0, 0.0]  # of moved by one, of not moved
    with _feeding(head, values):
        log_p = run_probe(model)[0].double().log_softmax(dim=-1)
        for place in range(1, length):
            contrast = log_p[place - 1] - log_p[place]
            first, second = int(contrast.argmax()), int(contrast.argmin())
            observed = _loss_of(model, place, second, length) - _loss_of(
                model, place, first, length
            )
            for i, position in enumerate((place - 1, place)):
                expected = float(log_p[position, first] - log_p[position, second])
                errors[i] += abs(expected - observed) / (length - 1)
    if max(errors) < _MARGIN * min(errors) or min(errors) > 0.5:
        raise DiscoveryError(
            f"{type(model).__name__}: its loss tells neither that labels are moved by one (off by "
            f"{errors[0]:.3g} nats a position) nor that they are not (off by {errors[1]:.3g})"
        )
    return errors[0] < errors[1]


def _loss_of(model: PreTrainedModel, place: int, label: int, length: int) -> float:
    inputs = probe_inputs(model)
    labels = torch.full((1, length), IGNORED, device=inputs["input_ids"].device)
    labels[0, place] = label
    try:
        return float(model(**inputs, labels=labels).loss)
    except Exception as error:  # whatever the model's own code needs beside
        raise DiscoveryError(
            f"{type(model).__name__} does not compute its loss from tokens and labels alone "
            f"({type(error).__name__}: {error})"
        ) from error


def settle_other_terms(runtime: Runtime) -> None:
    """Require that MoDE's loss, of a one-hot gate and without distillation, is the model's own.

    Finds out how the terms are kept that the model adds to its cross-entropy, with the router
    logits of its experts on where it has them; writes it into the anatomy.

    Raises:
        DiscoveryError: they cannot be kept, or the losses differ; says by how much.
    """
    host = runtime.host
    head: Any = host.get_output_embeddings()
    switches: list[dict[str, Any]] = [{}]
    if "output_router_logits" in runtime.forward_names or "output_router_logits" in vars(
        host.config.get_text_config()
    ):
        switches.append({"output_router_logits": True})
    try:
        with (
            runnable(host, list(head.parameters())),
            evaluating(host),
            _one_hot(host, runtime.anatomy.hidden_size),
        ):
            none, *none_routed = [_difference(runtime, switch) for switch in switches]
            asked, *asked_routed = none, *none_routed
            if any((none, *none_routed)):
                runtime.anatomy = dataclasses.replace(runtime.anatomy, other_terms="asked")
                asked, *asked_routed = [_difference(runtime, switch) for switch in switches]
    finally:
        runtime.statistics.clear()
    if asked and none:
        raise DiscoveryError(f"{type(host).__name__}: {none}")
    kept: OtherTerms
    if not any((none, *none_routed)):
        kept = "none"
    elif not any((asked, *asked_routed)):
        kept = "asked"
    else:
        kept = "asked" if none else "lost"
    runtime.anatomy = dataclasses.replace(runtime.anatomy, other_terms=kept)


@contextmanager
def _one_hot(host: Any, width: int) -> Iterator[None]:
    """Have the last layer predict alone, without distillation."""
    mixture = getattr(host, MODULE_NAME)
    config = MoDEConfig(k=mixture.config.k, adaptation="none", distill_weight=0, router_prior=None)
    alone = DepthMixture(config, width, {})
    if mixture.config.k > 1:
        alone.router.bias.data[-1] = 1e4
    setattr(host, MODULE_NAME, alone.to(mixture.spec.device))
    try:
        yield
    finally:
        setattr(host, MODULE_NAME, mixture)


def _difference(runtime: Runtime, switch: dict[str, Any]) -> str:
    """Say how MoDE's loss differs from the model's own on a probe; nothing if it does not."""
    host, anatomy = runtime.host, runtime.anatomy
    inputs = probe_inputs(host)
    labels = inputs.pop("decoder_input_ids", inputs["input_ids"])
    inputs |= {"labels": labels, **switch}
    try:
        own = host(**inputs)
        host.training = True
        ours = host(**inputs)
    except Exception as error:  # of the model's own code; MoDE's are to be seen as they are
        return f"its training forward does not run on tokens and labels ({error})"
    finally:
        host.training = False
    sums = runtime.statistics.take()
    assert sums is not None
    our_cross_entropy = runtime.statistics.summarize(sums)["ce_loss"]
    cut = 1 if anatomy.labels_shifted else 0
    logits, targets = own.logits[0, : labels.shape[1] - cut].double(), labels[0, cut:]
    cross_entropy = float(F.cross_entropy(logits, targets.to(logits.device)))
    # What a model adds is compared by itself: its logits may be rounded, and its loss large.
    terms, our_terms = float(own.loss) - cross_entropy, float(ours.loss) - our_cross_entropy
    rounding = 2 * torch.finfo(own.loss.dtype).eps * abs(float(own.loss))
    return _unlike("cross-entropy", cross_entropy, our_cross_entropy, own.logits.dtype) or _unlike(
        "sum of the loss's other terms", terms, our_terms, own.loss.dtype, rounding
    )


def _unlike(what: str, own: float, ours: float, dtype: torch.dtype, rounding: float = 0.0) -> str:
    tolerance = max(1e-4, 8 * torch.finfo(dtype).eps) * max(1.0, abs(own)) + rounding
    if abs(own - ours) <= tolerance:
        return ""
    return f"the {what} is {own:.6g}, and MoDE's with the last layer alone is {ours:.6g}"
