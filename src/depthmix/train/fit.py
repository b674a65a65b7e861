"""`fit`: what `depthmix train` does, from checked arguments to a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from depthmix.data.formats import conversational
from depthmix.data.load import load_data
from depthmix.errors import ConfigError, DataError, TrainingError
from depthmix.files import write_errors
from depthmix.pretrained import load_base, load_tokenizer
from depthmix.train import output
from depthmix.train.arguments import TrainArguments

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from trl.trainer.sft_trainer import SFTTrainer


def fit(arguments: TrainArguments) -> SFTTrainer:
    """Train to the end or to Ctrl-C, and return the trainer."""
    from depthmix.train.caching import caching
    from depthmix.train.interrupt import stopping_on_interrupt

    folder = Path(str(arguments.training.output_dir))
    checkpoint = output.prepare(folder, arguments)
    rows, row_format = _rows(arguments)
    tokenizer = _tokenizer(arguments, row_format)
    trainer = _trainer(arguments, tokenizer, rows)
    notes = [*_without_effect(arguments), *_long_rows(arguments, trainer, len(rows))]
    if trainer.is_world_process_zero():
        output.write_config(folder, arguments, row_format)
        print(*notes, sep="\n", end="\n" if notes else "")
    with caching(arguments, trainer), stopping_on_interrupt(trainer):
        _fit(trainer, checkpoint)
    return trainer


def _rows(arguments: TrainArguments) -> tuple[Dataset, str]:
    run = arguments.run
    assert run.dataset is not None  # `parse` has seen to it
    return load_data(
        run.dataset,
        split=run.dataset_split,
        config=run.dataset_config,
        format=run.dataset_format,
        template=run.dataset_template,
        text_field=arguments.training.dataset_text_field,
    )


def _evaluation_rows(arguments: TrainArguments) -> Dataset | None:
    run = arguments.run
    if run.eval_dataset is None:
        return None
    return load_data(
        run.eval_dataset,
        split=run.eval_split,
        config=run.dataset_config,
        format=run.dataset_format,
        template=run.dataset_template,
        text_field=arguments.training.dataset_text_field,
    )[0]


def _tokenizer(arguments: TrainArguments, row_format: str) -> PreTrainedTokenizerBase:
    options, training = arguments.model, arguments.training
    tokenizer = load_tokenizer(
        str(options.model_name_or_path),
        revision=options.model_revision,
        trust_remote_code=training.trust_remote_code,
    )
    if not (tokenizer.eos_token or training.eos_token):
        raise ConfigError("the tokenizer has no end-of-sequence token: name one with eos_token")
    template = training.chat_template_path
    if template and not template.endswith((".jinja", ".j2")):
        raise ConfigError("chat_template_path: expected a .jinja file (new tokens are not trained)")
    if conversational(row_format) and not (tokenizer.chat_template or template):
        raise ConfigError(
            "the rows are messages, but the tokenizer has no chat template: give one with "
            "chat_template_path"
        )
    return tokenizer


def _trainer(
    arguments: TrainArguments, tokenizer: PreTrainedTokenizerBase, rows: Dataset
) -> SFTTrainer:
    from transformers import set_seed
    from trl.trainer.sft_trainer import SFTTrainer

    from depthmix.train.methods import tune

    evaluation = _evaluation_rows(arguments)
    set_seed(arguments.training.seed)  # adapters begin with random numbers
    base = load_base(str(arguments.model.model_name_or_path), **_loading_options(arguments))
    model = tune(base, arguments.run, arguments.mode, arguments.model)
    try:
        return SFTTrainer(
            model=model,
            args=arguments.training,
            train_dataset=rows,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            optimizer_cls_and_kwargs=_optimizer(arguments, model),
        )
    except (ValueError, RuntimeError, ImportError) as error:  # options at odds, missing packages
        raise ConfigError(str(error)) from error


def _loading_options(arguments: TrainArguments) -> dict[str, Any]:
    """Return what `from_pretrained` is to be told, as TRL would tell it."""
    from accelerate import PartialState
    from trl.trainer.utils import get_quantization_config

    options, training = arguments.model, arguments.training
    loading: dict[str, Any] = {
        "revision": options.model_revision,
        "attn_implementation": options.attn_implementation,
        "dtype": options.dtype,
        "trust_remote_code": training.trust_remote_code,
    }
    if isinstance(training.model_init_kwargs, dict):
        loading |= training.model_init_kwargs
    training.model_init_kwargs = None  # used up: TRL warns about it beside a loaded model
    quantization = get_quantization_config(options)
    if quantization is not None:
        device_map = {"": PartialState().device}
        loading |= {"quantization_config": quantization, "device_map": device_map}
    return loading


def _optimizer(arguments: TrainArguments, model: Any) -> tuple[Any, dict[str, Any]]:
    """Return the optimiser of the Trainer's choice with MoDE's parameter groups."""
    import torch
    from transformers import Trainer

    from depthmix import param_groups

    training, run = arguments.training, arguments.run
    try:
        cls, options = Trainer.get_optimizer_cls_and_kwargs(training, model)
    except (ImportError, ValueError) as error:  # a package that is not there, wrong optim_args
        raise ConfigError(f"optim: {error}") from error
    own_groups = {"params", "model", "optimizer_dict"} & options.keys()
    if own_groups or not (isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)):
        raise ConfigError(
            f"optim: {training.optim} makes its own parameter groups, so that the router and the "
            "norms cannot have their learning rates; choose adamw_torch, for instance"
        )
    rates = {"router_lr": run.router_learning_rate, "norm_lr": run.norm_learning_rate}
    groups = param_groups(
        model,
        lr=training.learning_rate,
        weight_decay=training.weight_decay,
        **{name: rate for name, rate in rates.items() if rate is not None},
    )
    return cls, {**options, "params": groups}


def _fit(trainer: SFTTrainer, checkpoint: str | None) -> None:
    import torch

    try:
        with write_errors():
            trainer.train(resume_from_checkpoint=checkpoint)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "the device is out of memory: lower per_device_train_batch_size (and raise "
            "gradient_accumulation_steps) or max_length, or set gradient_checkpointing"
        ) from error


# What the user is told


def _without_effect(arguments: TrainArguments) -> list[str]:
    from depthmix.train.methods import without_effect

    names = without_effect(arguments.run, arguments.chosen)
    method = arguments.run.method
    return [f"note: method {method} does not read {', '.join(names)}"] if names else []


def _long_rows(arguments: TrainArguments, trainer: SFTTrainer, rows: int) -> list[str]:
    """Say what `max_length` did to the data; TRL cuts and drops in silence."""
    limit, prepared = arguments.training.max_length, cast("Dataset", trainer.train_dataset)
    if limit is None or arguments.training.packing:
        return []
    if len(prepared) == 0:
        raise DataError(f"no row is left: every prompt fills max_length ({limit} tokens)")
    reaching = sum(len(ids) >= limit for ids in prepared["input_ids"])
    left_out = rows - len(prepared)
    notes = [
        (left_out, f"are left out: the prompt fills max_length ({limit})"),
        (reaching, f"reach max_length ({limit}) and may be cut"),
    ]
    return [f"note: {count} of {rows} rows {what}" for count, what in notes if count]
