"""What cannot be done is said before anything is loaded; what the data shows, before training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmix.errors import ConfigError, DataError
from depthmix.train.installed import require_file, require_package
from depthmix.train.objectives.options import require_known_words
from depthmix.train.objectives.rewards import rewards_of

if TYPE_CHECKING:
    from transformers import Trainer, TrainingArguments

    from depthmix.train.arguments import TrainArguments
    from depthmix.train.run_options import RunOptions


def require_possible(arguments: TrainArguments) -> None:
    """Refuse options that are at odds, and packages and files that are missing.

    Raises:
        ConfigError: names the option and the way out.
    """
    _require_objective(arguments)
    _require_evaluation(arguments)
    _require_files(arguments)
    _require_packages(arguments)


def _require_objective(arguments: TrainArguments) -> None:
    """MoDE has its own loss; rewards must be there to be had."""
    training: Any = arguments.training
    if training.label_smoothing_factor > 0:
        raise ConfigError("label_smoothing_factor: the loss of MoDE has no label smoothing")
    require_known_words(arguments.run.objective, training)
    if arguments.run.objective == "grpo":
        rewards_of(arguments.run)
        for name in ("entropy_coef", "use_adaptive_entropy", "cast_lm_head_to_fp32"):
            if getattr(training, name, None):
                raise ConfigError(f"{name}: the loss of MoDE has none; leave it out")
    if arguments.run.objective != "sft":
        return
    if training.loss_type != "nll":
        raise ConfigError(
            f"loss_type={training.loss_type!r}: MoDE has its own loss; leave loss_type at 'nll'"
        )
    if training.packing and training.max_length is None:
        raise ConfigError("packing fills rows up to max_length, which is null: set one of the two")


def _require_evaluation(arguments: TrainArguments) -> None:
    run, training = arguments.run, arguments.training
    for name in ("early_stopping_patience", "eval_accuracy"):
        if getattr(run, name) is not None and training.eval_strategy == "no":
            raise ConfigError(f"{name} needs evaluations: give eval_dataset")
    if run.calibrate:
        _require_calibration(run, training)
    if run.eval_accuracy is None:
        return
    if training.packing if training.eval_packing is None else training.eval_packing:
        raise ConfigError("eval_accuracy needs rows one by one: set eval_packing to false")


def _require_calibration(run: RunOptions, training: TrainingArguments) -> None:
    if not run.evaluates:
        raise ConfigError(
            "calibrate needs rows that are not trained on: give eval_dataset or validation_split"
        )
    if training.world_size > 1:
        raise ConfigError(
            "calibrate runs in one process: train without it, then run `depthmix calibrate`"
        )


def _require_files(arguments: TrainArguments) -> None:
    training: Any = arguments.training
    template = getattr(training, "chat_template_path", None)  # an option of SFT
    if template and not template.endswith((".jinja", ".j2")):
        raise ConfigError("chat_template_path: expected a .jinja file (new tokens are not trained)")
    require_file("chat_template_path", template)
    require_file("fsdp_config", training.fsdp_config)
    cache = arguments.run.cache_dir
    if cache and Path(cache).is_file():
        raise ConfigError(f"cache_dir {cache} is a file, not a folder")


def _require_packages(arguments: TrainArguments) -> None:
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks

    training: Any = arguments.training
    if training.use_liger_kernel:
        require_package("use_liger_kernel", "liger_kernel")
    _require_quantisation(arguments)
    try:
        for callback in get_reporting_integration_callbacks(training.report_to):
            callback()
    except (RuntimeError, ImportError, ValueError) as error:
        raise ConfigError(f"report_to: {error}") from error
    _require_optimizer(training)
    _require_torch(training)


def _require_quantisation(arguments: TrainArguments) -> None:
    from trl.trainer.utils import get_quantization_config

    options, training = arguments.model, arguments.training
    if options.load_in_4bit or options.load_in_8bit:
        require_package("load_in_4bit and load_in_8bit", "bitsandbytes")
    try:
        get_quantization_config(options)
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"load_in_4bit: {error}") from error
    if options.load_in_4bit and training.eval_strategy != "no" and training.device.type == "cpu":
        raise ConfigError(
            "load_in_4bit: on a CPU an evaluation repacks the weights, and gradients are wrong "
            "after it: set eval_strategy to no, and score the tuned model with depthmix eval"
        )


def _require_optimizer(training: TrainingArguments) -> None:
    """Make the optimiser and the schedule for a parameter that does not matter."""
    import torch
    from transformers import Trainer, get_scheduler

    try:
        cls, options = Trainer.get_optimizer_cls_and_kwargs(training)
        if not isinstance(cls, type) or {"params", "model", "optimizer_dict"} & options.keys():
            return  # these are refused by name, once there is a model
        optimizer = cls([torch.nn.Parameter(torch.zeros(1))], **options)
    except (ImportError, ValueError, TypeError) as error:
        raise ConfigError(f"optim: {error}") from error
    try:
        get_scheduler(
            training.lr_scheduler_type,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=1,
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,  # type: ignore[arg-type]
        )
    except (ValueError, TypeError) as error:
        raise ConfigError(f"lr_scheduler_kwargs: {error}") from error


def _require_torch(training: TrainingArguments) -> None:
    import inspect

    import torch
    from torch.utils.checkpoint import checkpoint

    backend = training.torch_compile_backend
    known = torch._dynamo.list_backends(exclude_tags=()) if backend else []
    if backend and backend not in known:
        raise ConfigError(f"torch_compile_backend: expected one of {', '.join(known)}")
    accepted = {*inspect.signature(checkpoint).parameters, "selective"}
    for name in training.activation_checkpointing_kwargs or {}:
        if name not in accepted:
            raise ConfigError(f"activation_checkpointing_kwargs: torch knows no {name}")


# What the rows show


def token_rows(trainer: Trainer) -> Iterator[list[int]]:
    """Yield the token ids of the rows of a trainer; of a pair, those with either answer."""
    rows: Any = trainer.train_dataset
    for row in rows:
        if "input_ids" in row:
            yield row["input_ids"]
        else:
            yield row["prompt_ids"] + row["chosen_ids"]
            yield row["prompt_ids"] + row["rejected_ids"]


def require_known_tokens(trainer: Trainer, rows: Iterable[list[int]]) -> None:
    """Refuse rows with tokens that the model has no embedding for.

    Args:
        trainer: with model and tokenizer.
        rows: token ids.

    Raises:
        DataError: names the first one.
    """
    tokenizer: Any = trainer.processing_class
    model: Any = trainer.model
    known = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) <= known:
        return
    for number, row in enumerate(rows, 1):
        beyond = [token for token in row if token >= known]
        if beyond:
            raise DataError(
                f"row {number} has the token {tokenizer.convert_ids_to_tokens(beyond[0])!r} "
                f"(number {beyond[0]}), but the model has {known} embeddings and its tokenizer "
                f"{len(tokenizer)} tokens: take the model's own tokenizer, or enlarge "
                "the model first (resize_token_embeddings)"
            )


def require_known_positions(
    trainer: Trainer, rows: Iterable[list[int]], further_tokens: int
) -> None:
    """Refuse rows that are longer than a model with learned positions can read.

    Args:
        trainer: with the model.
        rows: token ids.
        further_tokens: virtual tokens in front of every row, and answers behind it.

    Raises:
        DataError: names the length and the limit.
    """
    model: Any = trainer.model
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None or not _learns_positions(model):
        return
    longest = max(map(len, rows), default=0) + further_tokens
    if longest > positions:
        answers = hasattr(trainer.args, "max_completion_length")  # GRPO's
        raise DataError(
            f"rows of up to {longest} tokens, but the model has learned {positions} positions: "
            + (
                f"lower max_completion_length by {longest - positions}"
                if answers
                else f"set max_length to {positions - further_tokens}"
            )
        )


def _learns_positions(model: Any) -> bool:
    from torch import nn

    return any(
        isinstance(module, nn.Embedding) and name.rpartition(".")[2] in _POSITIONS
        for name, module in model.named_modules()
    )


_POSITIONS = ("wpe", "embed_positions", "position_embeddings", "pos_embed", "positions_embed")
