"""A model whose weights DeepSpeed's ZeRO-3 has spread over the processes while loading it.

DeepSpeed's own engine brings them where they are needed, but is made after `attach`, which runs
the model. All processes must do so together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


def gathered(weights: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Have the whole of some weights on every process, to read; without ZeRO-3, do nothing."""
    if not is_deepspeed_zero3_enabled():
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(weights))  # type: ignore[no-any-return]


@contextmanager
def runnable(model: nn.Module, whole: Iterable[Tensor] = ()) -> Iterator[None]:
    """Have every module's own weights whole while it runs; without ZeRO-3, do nothing.

    Args:
        model: the model.
        whole: weights that are to be whole all the time, to be read outside of their modules.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    at_work: dict[nn.Module, AbstractContextManager[Any]] = {}

    def gather(module: nn.Module, _args: Any) -> None:
        at_work[module] = gathered(module.parameters(recurse=False))
        at_work[module].__enter__()

    def release(module: nn.Module, _args: Any, _output: Any) -> None:
        at_work.pop(module).__exit__(None, None, None)

    kept = {id(weight) for weight in whole}
    modules = [  # DeepSpeed gathers no weight twice
        m for m in model.modules() if not any(id(p) in kept for p in m.parameters(recurse=False))
    ]
    handles = [module.register_forward_pre_hook(gather) for module in modules]
    handles += [m.register_forward_hook(release, always_call=True) for m in modules]
    try:
        with gathered(whole):
            yield
    finally:
        for handle in handles:
            handle.remove()
