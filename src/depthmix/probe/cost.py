"""What a step costs by how many of the last layers are tuned, counted as `depthmix plan` does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from depthmix.data.batches import TokenRow
from depthmix.data.tokens import IGNORED
from depthmix.errors import ConfigError
from depthmix.plan.memory import Bill
from depthmix.plan.methods import Method
from depthmix.plan.profile import Setting
from depthmix.plan.report import count
from depthmix.train.arguments import TrainArguments
from depthmix.train.methods import peft_config


def bills(
    host: Any, arguments: TrainArguments, rows: Sequence[TokenRow], layers: int
) -> list[Bill] | None:
    """Return the bills of a step with 1, 2 ... all of the last layers tuned, without MoDE.

    Of a batch of the run, of rows as long and as far supervised as these are in the mean. None
    where the model does not run without weights, or no adapter is trained.
    """
    adapter = peft_config(arguments.run, arguments.model)
    if adapter is None:
        return None
    training = arguments.training
    tokens = sum(len(row["input_ids"]) for row in rows)
    supervised = sum(label != IGNORED for row in rows for label in row["labels"])
    setting = Setting(
        rows=training.per_device_train_batch_size,
        length=round(tokens / len(rows)),
        supervised=supervised / tokens,
        dtype=host.dtype if host.dtype.is_floating_point else torch.bfloat16,
        mixed=bool(training.bf16 or training.fp16),
    )
    depths = range(1, layers + 1)
    try:
        counted = count(
            host.config,
            setting,
            {str(depth): Method("lora", depth) for depth in depths},
            k=1,
            rank=arguments.model.lora_r,
            adapter=lambda _rank: adapter,
            checkpointing=lambda _method: bool(training.activation_checkpointing),
        )
    except ConfigError:
        return None
    return [counted.bills[str(depth)] for depth in depths]
