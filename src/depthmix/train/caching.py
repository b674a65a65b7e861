"""When `depthmix train` tunes from cached depth, and what it says about it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from depthmix.cache.depth import cached_depth
from depthmix.cache.prefix import NothingFrozenError
from depthmix.cache.replay import CachedDepth
from depthmix.errors import ConfigError
from depthmix.train.arguments import TrainArguments

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments


@contextmanager
def caching(arguments: TrainArguments, trainer: Trainer) -> Iterator[CachedDepth | None]:
    """Cache the frozen layers' output for the block, if that is asked for or pays.

    Raises:
        ConfigError: `cache: on`, and it cannot be done; says why. What only the first batch shows
            is raised in the block.
    """
    run = arguments.run
    if run.objective != "sft":  # the same row is read beside a reference, or has another answer
        yield None
        return
    with ExitStack() as stack:
        cache = None
        try:
            if run.cache == "on" or (run.cache == "auto" and _rows_come_back(arguments, trainer)):
                cache = stack.enter_context(_cached(arguments, trainer))
        except ConfigError as error:
            if run.cache == "on":
                raise ConfigError(f"cache: {error}") from error
            if not isinstance(error, NothingFrozenError) and trainer.is_world_process_zero():
                print(f"note: no cache: {error}")
        if cache is not None:
            stack.enter_context(_reading_ahead(trainer, cache))
            if trainer.is_world_process_zero():
                print(_announcement(cache, _tokens(trainer)))
        yield cache


@contextmanager
def _cached(arguments: TrainArguments, trainer: Trainer) -> Iterator[CachedDepth]:
    run, model = arguments.run, trainer.model
    assert model is not None
    _require_supported(arguments, trainer)
    with cached_depth(
        model,
        tokens=_tokens(trainer),
        folder=Path(run.cache_dir) if run.cache_dir else None,
        dtype=torch.bfloat16 if run.cache_dtype == "bfloat16" else None,
        required=run.cache == "on",
    ) as cache:
        yield cache


@contextmanager
def _reading_ahead(trainer: Trainer, cache: CachedDepth) -> Iterator[None]:
    """Have the rows of a batch read from the disk when it is collated: while another one trains."""
    collate: Any = trainer.data_collator

    def collate_and_read(features: Any) -> Any:
        batch = collate(features)
        cache.read_ahead(batch)
        return batch

    if trainer.args.dataloader_num_workers == 0:  # workers hold no map of the files
        trainer.data_collator = collate_and_read
    try:
        yield
    finally:
        trainer.data_collator = collate


def _rows_come_back(arguments: TrainArguments, trainer: Trainer) -> bool:
    training: TrainingArguments = arguments.training
    steps = math.ceil(len(trainer.get_train_dataloader()) / training.gradient_accumulation_steps)
    if training.max_steps > 0:
        return training.max_steps > steps
    return training.num_train_epochs > 1


def _require_supported(arguments: TrainArguments, trainer: Trainer) -> None:
    kind = trainer.accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_CPU") and not kind.startswith("MULTI_"):
        raise ConfigError(f"{kind}: no process has whole layers; several processes need DDP")
    if arguments.training.n_gpu > 1:
        raise ConfigError("several GPUs need a process each: start with torchrun or accelerate")
    if arguments.training.torch_compile:
        raise ConfigError("torch_compile: compiled layers cannot be left out")


def _tokens(trainer: Trainer) -> int:
    """Return the tokens of all rows, those of evaluation too."""
    evaluation: Any = trainer.eval_dataset or []
    datasets: list[Any] = (
        list(evaluation.values()) if isinstance(evaluation, dict) else [evaluation]
    )
    datasets.append(trainer.train_dataset)
    return sum(len(ids) for rows in datasets if len(rows) for ids in rows["input_ids"])


def _announcement(cache: CachedDepth, tokens: int) -> str:
    size = tokens * cache.store.bytes_a_token / 2**20
    known = f", {len(cache.store)} rows are there already" if len(cache.store) else ""
    return f"cache: up to {size:.0f} MiB of states in {cache.folder}{known}"
