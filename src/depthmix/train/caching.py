"""When `depthmix train` tunes from cached depth, and what it says about it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmix.cache.depth import CachedDepth, cached_depth
from depthmix.errors import ConfigError
from depthmix.train.arguments import TrainArguments

if TYPE_CHECKING:
    from trl.trainer.sft_trainer import SFTTrainer


@contextmanager
def caching(arguments: TrainArguments, trainer: SFTTrainer) -> Iterator[CachedDepth | None]:
    """Cache the frozen layers' output for the block, if that is asked for or pays.

    Raises:
        ConfigError: `cache: on`, and it cannot be done; says why.
    """
    run = arguments.run
    with ExitStack() as stack:
        cache = None
        try:
            if run.cache == "on" or (run.cache == "auto" and _pays(arguments, trainer)):
                _require_one_process(arguments)
                _require_stable_rows(arguments)
                folder = Path(run.cache_dir) if run.cache_dir else None
                tokens = _tokens(trainer)
                context = cached_depth(trainer.model, arguments.mode.k, tokens, folder)  # type: ignore[arg-type]
                cache = stack.enter_context(context)
        except ConfigError as error:
            if run.cache == "on":
                raise ConfigError(f"cache: {error}") from error
            print(f"note: no cache: {error}")
        if cache is not None and trainer.is_world_process_zero():
            print(_announcement(cache, _tokens(trainer)))
        yield cache


def _pays(arguments: TrainArguments, trainer: SFTTrainer) -> bool:
    """Whether a prefix is frozen and rows come back."""
    run, training = arguments.run, arguments.training
    if not (run.late_layers_only or run.method == "none"):
        return False
    steps = math.ceil(len(trainer.get_train_dataloader()) / training.gradient_accumulation_steps)
    if training.max_steps > 0:
        return training.max_steps > steps
    return training.num_train_epochs > 1


def _require_one_process(arguments: TrainArguments) -> None:
    if arguments.training.world_size > 1:
        raise ConfigError("it is for one process; with several, each would write what others read")


def _require_stable_rows(arguments: TrainArguments) -> None:
    if arguments.training.packing or arguments.training.padding_free:
        raise ConfigError("packed rows come in other batches in every epoch")


def _tokens(trainer: SFTTrainer) -> int:
    rows: Any = trainer.train_dataset
    return sum(map(len, rows["input_ids"]))


def _announcement(cache: CachedDepth, tokens: int) -> str:
    size = tokens * cache.store.bytes_a_token / 2**20
    known = f", {len(cache.store)} rows are there already" if len(cache.store) else ""
    return f"cache: up to {size:.0f} MiB of states in {cache.folder}{known}"
