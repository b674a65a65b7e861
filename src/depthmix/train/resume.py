"""Going on with a run: the checkpoint, and whether the run is still the same one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from depthmix.errors import ConfigError
from depthmix.train.arguments import TrainArguments, all_options, parse

# Options that may change: where results, logs and messages go, when it is saved and evaluated, and
# how (not what) is computed. Every other option decides what is learned.
_FREE = re.compile(
    r"output_dir|overwrite|resume|resume_from_checkpoint|cache|cache_dir|run_name|project|debug"
    r"|(logging|log|report|hub|push|save|eval|trackio|torch_compile|ddp|do)_\w+|early_stopping_\w+"
    r"|per_device_eval_batch_size|prediction_loss_only|batch_eval_metrics|include_\w+"
    r"|disable_tqdm|skip_memory_metrics|torch_empty_cache_steps|restore_callback_\w+"
    r"|dataset_num_proc|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor"
    r"|multiprocessing_context)|use_cpu|attn_implementation|torch_compile|local_rank"
    r"|num_(generations_eval|completions_to_print)"
    r"|(activation|gradient)_checkpointing(_kwargs)?|activation_offloading|full_determinism"
)
# The learning rate goes down to the last step, unless the schedule is constant.
_LENGTH = ("max_steps", "num_train_epochs")
# Rows a step are the product of these and the number of processes.
_SPLIT = ("per_device_train_batch_size", "gradient_accumulation_steps")


def require_state(checkpoint: Path) -> None:
    """Refuse a checkpoint of weights alone.

    Raises:
        ConfigError: the optimiser's moments and the learning rate's schedule would start anew.
    """
    kept = {path.name for path in checkpoint.iterdir()}
    if not any(
        name.startswith(("optimizer", "global_step", "pytorch_model_fsdp")) for name in kept
    ):
        raise ConfigError(
            f"{checkpoint} holds weights without the optimiser's state (save_only_model), so that "
            "its moments and the learning rate's schedule would start anew: go on from one with "
            "it, or begin again (--overwrite)"
        )


def require_same_run(record: Path, checkpoint: Path, arguments: TrainArguments) -> None:
    """Refuse to go on with other options, unless they leave what is learned as it is.

    Args:
        record: configuration that the run has stored.
        checkpoint: to go on from.
        arguments: of now.

    Raises:
        ConfigError: an option has changed; names all that have.
    """
    recorded = parse([str(record)])
    was, asked = recorded.run.objective, arguments.run.objective
    if was != asked:
        raise ConfigError(
            f"--resume: objective was {was} and is {asked} now ({record}): give it as "
            "it was, or start another run (another output_dir, or --overwrite)"
        )
    before, now = _values(recorded), _values(arguments)
    changed = [
        name
        for name in before
        if before[name] != now[name] and not _FREE.fullmatch(name) and name not in _SPLIT
    ]
    if now["dataset_format"] == "auto" and "dataset_format" in changed:
        changed.remove("dataset_format")  # the record has what was found
    if _is_constant(arguments):
        changed = [name for name in changed if name not in _LENGTH]
    if _rows_a_step(before, _processes(checkpoint)) != _rows_a_step(
        now, arguments.training.world_size
    ):
        changed += _SPLIT
    if changed:
        listed = ", ".join(
            f"{name} was {before[name]!r} and is {now[name]!r} now" for name in changed
        )
        raise ConfigError(
            f"--resume: {listed} ({record}): that would change what is learned; give it as it "
            "was, or start another run (another output_dir, or --overwrite)"
        )


def _values(arguments: TrainArguments) -> dict[str, Any]:
    """Return every option with the value that it has in effect."""
    holders = (arguments.run, arguments.mode, arguments.model, arguments.training)
    return {
        name: getattr(holder, name)
        for holder, known in zip(
            holders, all_options(arguments.run.objective).values(), strict=True
        )
        for name in known
    }


def _is_constant(arguments: TrainArguments) -> bool:
    """Whether the learning rate of a step is the same however many steps there are."""
    kind, warmup = arguments.training.lr_scheduler_type, arguments.training.warmup_steps
    return kind == "constant" or (kind == "constant_with_warmup" and not 0 < warmup < 1)


def _rows_a_step(values: dict[str, Any], processes: int) -> int:
    return int(values[_SPLIT[0]] * values[_SPLIT[1]] * processes)


def _processes(checkpoint: Path) -> int:
    """Return how many processes wrote a checkpoint: each one stores its random state."""
    return max(1, len(list(checkpoint.glob("rng_state_*.pth"))))
