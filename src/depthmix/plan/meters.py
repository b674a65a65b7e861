"""What is counted of a pass on fake tensors: FLOPs, calls, and bytes that autograd keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry
from transformers.integrations import moe  # noqa: F401, registers products with experts


class Meter(TorchDispatchMode):
    """Counts FLOPs as `torch.utils.flop_counter` does, and calls."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        self.operations = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and count it."""
        output = function(*args, **(kwargs or {}))
        self.operations += 1
        formula = _FORMULAS.get(function.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=output)
        return output


def _grouped_product(left: Tensor, right: Tensor, *_: Any, out_val: Any, **__: Any) -> int:
    """Return the FLOPs of rows times the matrix of the expert that each has been given to."""
    return 2 * left.shape[-2] * left.shape[-1] * right.shape[-1]


_ATEN: Any = torch.ops.aten
_EXPERTS: Any = torch.ops.transformers
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        _ATEN._scaled_dot_product_flash_attention
    ],
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        _ATEN._scaled_dot_product_flash_attention_backward
    ],
    _ATEN._grouped_mm: _grouped_product,
    _EXPERTS.grouped_mm_fallback: _grouped_product,
    _EXPERTS.grouped_mm_fallback_backward: lambda left, right, *_, out_val: (
        2 * _grouped_product(left, right, out_val=out_val)
    ),
}


class Kept:
    """The memory that autograd keeps, weights left out, each block once."""

    def __init__(self, weights: set[int]) -> None:
        self._weights = weights
        self._blocks: dict[int, Tensor] = {}

    def hooks(self) -> Any:
        """Return a context in which what is saved is noted."""
        return torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    @property
    def bytes(self) -> int:
        """Bytes of all blocks."""
        return sum(tensor.untyped_storage().nbytes() for tensor in self._blocks.values())

    def _note(self, tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage()._cdata
        if key not in self._weights:
            self._blocks[key] = tensor
        return tensor


class LikeCuda(TorchFunctionMode):
    """What a CPU does otherwise: dropout, layer norms under autocast, experts in fp32."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call what CUDA would run."""
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            kwargs = kwargs | {"dropout_p": 0.0}  # drawn within the kernel, and not kept
        elif function is F.dropout:
            return _dropout(*args, **kwargs)
        elif function is torch._grouped_mm and args[0].dtype != torch.bfloat16:
            return _EXPERTS.grouped_mm_fallback(*args, kwargs["offs"])  # fake ones are bf16 only
        elif function is F.layer_norm and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        return function(*args, **kwargs)


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0:
        return input
    dropped: Tensor = torch.native_dropout(input, p, True)[0]  # keeps one byte a number
    return dropped
