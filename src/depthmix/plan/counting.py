"""Run one layer of each kind on fake tensors and count: no memory, no arithmetic, real shapes.

Counted is what runs on a GPU with the implementation of attention that the model is given: scores
are FLOPs, and are memory only where that implementation holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from depthmix.model.anatomy import first_tensor, with_first_tensor
from depthmix.plan.meters import Kept, LikeCuda, Meter
from depthmix.plan.skeleton import Skeleton

# Lengths at which it shows whether a layer walks along the tokens one by one.
_SHORT, _LONGER = 4, 8


@dataclass(frozen=True)
class LayerCount:
    """What one layer does with a batch.

    Attributes:
        forward: FLOPs.
        backward: FLOPs.
        saved: bytes that autograd keeps until the backward pass.
        entering: bytes of its input, which are all that gradient checkpointing keeps.
    """

    forward: int
    backward: int
    saved: int
    entering: int


@dataclass(frozen=True)
class Counts:
    """What a training step does below the LM head.

    Attributes:
        lowest: by kind, a layer below which nothing is trained.
        inner: by kind, a layer whose input needs a gradient.
        rest: bytes that autograd keeps outside the layers.
    """

    lowest: dict[int, LayerCount]
    inner: dict[int, LayerCount]
    rest: int


@dataclass(frozen=True)
class Decoding:
    """What decoding one token does in a layer.

    Attributes:
        flops: with a full cache.
        cached: bytes of a row's keys and values, or of the layer's state.
    """

    flops: int
    cached: int


def walking_kinds(skeleton: Skeleton) -> frozenset[int]:
    """Return the kinds of layers that walk along the tokens, one operation after the other.

    State-space models do without their own kernels, and a walk along thousands of tokens takes too
    long to count.
    """
    short, longer = (_operations_at(skeleton, length) for length in (_SHORT, _LONGER))
    return frozenset(k for k, n in longer.items() if n - short[k] >= _LONGER - _SHORT)


def count_training(
    skeleton: Skeleton,
    rows: int,
    length: int,
    autocast: torch.dtype | None = None,
    walking: frozenset[int] = frozenset(),
) -> Counts:
    """Count a training step of `rows` rows of `length` tokens, one layer of each kind.

    Layers that walk are counted at two short lengths, since a walk takes as much for each token.
    """
    if not walking or length <= _LONGER:
        return _count_at(skeleton, rows, length, autocast, ())
    counts = _count_at(skeleton, rows, length, autocast, walking)
    others = set(skeleton.kinds) - walking
    short, longer = (_count_at(skeleton, rows, n, autocast, others) for n in (_SHORT, _LONGER))
    for kind in walking:
        counts.lowest[kind] = _extrapolated(short.lowest[kind], longer.lowest[kind], length)
        counts.inner[kind] = _extrapolated(short.inner[kind], longer.inner[kind], length)
    return counts


def count_decoding(
    skeleton: Skeleton, length: int, walking: frozenset[int] = frozenset()
) -> dict[int, Decoding]:
    """Count decoding the last of `length` tokens of one row, by kind of layer.

    What layers that walk remember does not grow with what they have read.
    """
    if not walking or length <= _LONGER:
        return _decode_at(skeleton, length, ())
    others = set(skeleton.kinds) - walking
    return _decode_at(skeleton, length, walking) | _decode_at(skeleton, _LONGER, others)


def _extrapolated(short: LayerCount, longer: LayerCount, length: int) -> LayerCount:
    def line(name: str) -> int:
        near, far = getattr(short, name), getattr(longer, name)
        return int(near + (far - near) * (length - _SHORT) // (_LONGER - _SHORT))

    return LayerCount(**{field.name: line(field.name) for field in fields(LayerCount)})


# One pass


def _metered(forward: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Meter]:
    """Return what a layer gives, and what that took."""
    meter = Meter()
    with meter:
        return forward(*args, **kwargs), meter


@torch.no_grad()
def _operations_at(skeleton: Skeleton, length: int) -> dict[int, int]:
    operations: dict[int, int] = {}

    def count(kind: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output, meter = _metered(forward, args, kwargs)
        operations[kind] = meter.operations
        return output

    skeleton.causal_lm.train()
    with _as_on_a_gpu(skeleton, None), _each_kind_once(skeleton, count, ()):
        skeleton.trunk(input_ids=torch.zeros(1, length, dtype=torch.long), use_cache=False)
    return operations


def _count_at(
    skeleton: Skeleton,
    rows: int,
    length: int,
    autocast: torch.dtype | None,
    skipped: Collection[int],
) -> Counts:
    lowest: dict[int, LayerCount] = {}
    inner: dict[int, LayerCount] = {}

    def count(kind: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        lowest[kind], output = _count_layer(forward, args, kwargs, weights, input_grad=False)
        # What it gives is what the next one gets, in another dtype perhaps than embeddings are.
        states = first_tensor(output)
        assert states is not None
        args, kwargs = _with_entering(args, kwargs, states)
        inner[kind], output = _count_layer(forward, args, kwargs, weights, input_grad=True)
        return output

    def leave_out(kind: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return _entering(args, kwargs).detach().requires_grad_()

    weights = {p.untyped_storage()._cdata for p in skeleton.causal_lm.parameters()}
    skeleton.causal_lm.train()
    with _as_on_a_gpu(skeleton, autocast):
        ids = torch.zeros(rows, length, dtype=torch.long)
        with _each_kind_once(skeleton, count, skipped):
            skeleton.trunk(input_ids=ids, use_cache=False)
        kept = Kept(weights)
        with _each_kind_once(skeleton, leave_out, ()), kept.hooks():
            output = skeleton.trunk(input_ids=ids, use_cache=False)
    del output
    return Counts(lowest, inner, kept.bytes)


def _count_layer(
    forward: Callable[..., Any], args: Any, kwargs: Any, weights: set[int], input_grad: bool
) -> tuple[LayerCount, Any]:
    """Run a layer forward and backward, by itself."""
    entering = _entering(args, kwargs).detach().requires_grad_(input_grad)
    args, kwargs = _with_entering(args, kwargs, entering)
    kept, ahead, back = Kept(weights), Meter(), Meter()
    with kept.hooks(), ahead:
        output = forward(*args, **kwargs)
    states = first_tensor(output)
    assert states is not None
    if states.requires_grad:
        with back:
            # Not of a sum, whose gradient is one number, expanded, which grouped products refuse.
            states.backward(torch.ones_like(states))
    count = LayerCount(ahead.flops, back.flops, kept.bytes, entering.nbytes)
    return count, with_first_tensor(output, states.detach())


@torch.no_grad()
def _decode_at(skeleton: Skeleton, length: int, skipped: Collection[int]) -> dict[int, Decoding]:
    flops: dict[int, int] = {}

    def fill(kind: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    def count(kind: int, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        output, meter = _metered(forward, args, kwargs)
        flops[kind] = meter.flops
        return output

    skeleton.causal_lm.eval()
    with _as_on_a_gpu(skeleton, None):
        ids = torch.zeros(1, max(1, length - 1), dtype=torch.long)
        with _each_kind_once(skeleton, fill, skipped):
            output = skeleton.trunk(input_ids=ids, use_cache=True)
        name = "cache_params" if "cache_params" in output else "past_key_values"
        cache = output.get(name)
        with _each_kind_once(skeleton, count, skipped):
            skeleton.trunk(input_ids=ids[:, :1], use_cache=True, **{name: cache})
    layers = getattr(cache, "layers", ())
    return {kind: Decoding(n, _bytes_of(layers, kind)) for kind, n in flops.items()}


def _bytes_of(layers: Any, kind: int) -> int:
    """Return what a layer of a cache holds, whatever it is."""
    if kind >= len(layers):
        return 0
    held = tree_leaves(vars(layers[kind]))
    return sum(tensor.nbytes for tensor in held if isinstance(tensor, Tensor) and tensor.ndim > 1)


Run = Callable[[int, Callable[..., Any], Any, Any], Any]


@contextmanager
def _each_kind_once(skeleton: Skeleton, run: Run, skipped: Collection[int]) -> Iterator[None]:
    """Let `run` answer for the first layer of each kind; the others pass their input on."""
    answers: dict[int, Any] = {}

    def replace(place: int, kind: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(*args: Any, **kwargs: Any) -> Any:
            if place == kind and kind not in skipped:
                answers[kind] = run(kind, forward, args, kwargs)
                return answers[kind]
            entering = _entering(args, kwargs)
            return with_first_tensor(answers.get(kind, entering), entering)

        return replaced

    layers: list[Any] = list(skeleton.layers)
    for place, (kind, layer) in enumerate(zip(skeleton.kinds, layers, strict=True)):
        layer.forward = replace(place, kind, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _entering(args: Any, kwargs: Any) -> Tensor:
    """Return the hidden states among a layer's arguments: the first of them."""
    states = first_tensor((*args, *kwargs.values()))
    assert states is not None
    return states


def _with_entering(args: Any, kwargs: Any, states: Tensor) -> tuple[Any, Any]:
    if args:
        return (states, *args[1:]), kwargs
    name = next(iter(kwargs))
    return args, kwargs | {name: states}


@contextmanager
def _as_on_a_gpu(skeleton: Skeleton, autocast: torch.dtype | None) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(skeleton.fake)
        if autocast is not None:
            stack.enter_context(torch.autocast("cpu", autocast))
        stack.enter_context(LikeCuda())
        yield
