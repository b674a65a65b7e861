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
    whole = list(whole)
    there = {id(weight) for weight in whole}  # DeepSpeed gathers no weight twice
    at_work: list[tuple[set[int], AbstractContextManager[Any]]] = []

    def gather(module: nn.Module, _args: Any) -> None:
        missing = [p for p in module.parameters(recurse=False) if id(p) not in there]
        at_work.append(({id(p) for p in missing}, gathered(missing)))
        at_work[-1][1].__enter__()
        there.update(at_work[-1][0])

    def release(_module: nn.Module, _args: Any, _output: Any) -> None:
        ids, weights = at_work.pop()
        there.difference_update(ids)
        weights.__exit__(None, None, None)

    handles = [module.register_forward_pre_hook(gather) for module in model.modules()]
    handles += [m.register_forward_hook(release, always_call=True) for m in model.modules()]
    try:
        with gathered(whole):
            yield
    finally:
        for handle in handles:
            handle.remove()
