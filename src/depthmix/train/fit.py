"""`fit`: what `depthmix train` does, from checked arguments to a trained model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from depthmix.errors import ConfigError, DataError, Stopped, TrainingError
from depthmix.files import write_errors
from depthmix.pretrained import load_base
from depthmix.train import output
from depthmix.train.arguments import TrainArguments
from depthmix.train.checks import (
    require_known_positions,
    require_known_tokens,
    require_possible,
    token_rows,
)
from depthmix.train.objectives.options import rates_of_mode, trainer_class
from depthmix.train.objectives.prepare import prepare
from depthmix.train.objectives.prepared import Prepared
from depthmix.train.objectives.reference import drop_reference, reference
from depthmix.train.objectives.start import adapter_at, base_of, go_on_with
from depthmix.train.record import require_same_rows, write_record

if TYPE_CHECKING:
    from transformers import Trainer, TrainerCallback

    from depthmix.train.hub import Hub


def fit(arguments: TrainArguments, callbacks: Iterable[TrainerCallback] = ()) -> Trainer:
    """Train to the end and return the trainer, which is TRL's for the objective.

    Args:
        arguments: of the run.
        callbacks: to follow it, beside those that the arguments ask for.

    Raises:
        Stopped: by Ctrl-C or SIGTERM, with a checkpoint.
    """
    from depthmix.train.caching import caching
    from depthmix.train.interrupt import stopping_on_signals

    folder = Path(str(arguments.training.output_dir))
    if arguments.auto:
        raise ConfigError(f"{arguments.auto[0]} auto: settle it first (depthmix.probe.settle)")
    require_possible(arguments)
    checkpoint = output.prepare(folder, arguments)
    hub = _hub(arguments)
    with output.no_empty_folder(folder):
        data = prepare(arguments)
        trainer = _trainer(arguments, data)
        require_known_tokens(trainer, data.prompts or token_rows(trainer))
        require_known_positions(
            trainer, data.prompts or token_rows(trainer), _further_tokens(arguments)
        )
        notes = [*_without_effect(arguments), *data.notes]
        _follow(trainer, arguments, hub)
        if data.figures is not None:
            data.figures.trainer = trainer
            trainer.callback_handler.callbacks.insert(0, data.figures)
        for callback in callbacks:
            trainer.add_callback(callback)
        if checkpoint is not None:
            require_same_rows(Path(checkpoint).parent, trainer)
        with caching(arguments, trainer), stopping_on_signals(trainer) as signals:
            if trainer.is_world_process_zero():
                output.begin(folder, arguments, data.format)
                write_record(folder, arguments, trainer)
                print(*notes, sep="\n", end="\n" if notes else "")
            _fit(trainer, checkpoint)
    if signals.received and trainer.state.global_step < trainer.state.max_steps:
        raise Stopped(_stopped(trainer, folder), signals.received)
    drop_reference(trainer.model)
    return trainer


def _trainer(arguments: TrainArguments, data: Prepared) -> Trainer:
    from transformers import set_seed

    from depthmix.inference.form import Form
    from depthmix.inference.loading import ends_of
    from depthmix.model.active import host_of
    from depthmix.model.temperature import require_no_bias

    set_seed(arguments.training.seed)  # adapters begin with random numbers
    model = _model(arguments)
    if arguments.run.calibrate:
        require_no_bias(host_of(model))  # before anything is trained
    optimizer = _optimizer(arguments, model)
    trainer_of_trl = trainer_class(arguments.run.objective)
    if data.prompts is not None:  # answers end as those of the tuned model will
        model.generation_config.eos_token_id = ends_of(model, data.tokenizer, Form(data.format))
    try:
        trainer: Trainer = trainer_of_trl(
            model=model,
            args=arguments.training,
            train_dataset=data.train,
            eval_dataset=data.evaluation,
            processing_class=data.tokenizer,
            **data.further,
            **reference(arguments, model),
        )
    # Options at odds, missing packages.
    except (ValueError, RuntimeError, ImportError, NotImplementedError) as error:
        raise ConfigError(str(error)) from error
    trainer.optimizer_cls_and_kwargs = optimizer  # which not all of TRL's trainers take
    rows: Any = trainer.train_dataset
    if len(rows) == 0:
        raise DataError("no row is left: every prompt fills max_length")
    return trainer


def _model(arguments: TrainArguments) -> Any:
    from depthmix.train.methods import tune

    name, options = str(arguments.model.model_name_or_path), loading_options(arguments)
    start = adapter_at(name, arguments.run.objective)
    if start is not None:
        options["revision"] = start.record.base.get("revision") or "main"
    try:
        base = load_base(base_of(arguments), **options)
    except TypeError as error:  # an option that the model's class does not have
        raise ConfigError(f"model_init_kwargs: {error}") from error
    if start is not None:
        return go_on_with(start, base, arguments)
    return tune(base, arguments.run, arguments.mode, arguments.model)


def _hub(arguments: TrainArguments) -> Hub | None:
    """Return what sends the run to the hub, if that is asked for."""
    if not arguments.training.push_to_hub or arguments.training.process_index > 0:
        arguments.training.push_to_hub = False
        return None
    from depthmix.train.hub import Hub

    return Hub(arguments.training)


def _follow(trainer: Trainer, arguments: TrainArguments, hub: Hub | None) -> None:
    """Add the callbacks that a run asks for."""
    from transformers import EarlyStoppingCallback

    from depthmix.train.accuracy import EvalAccuracy
    from depthmix.train.card import CardFilled
    from depthmix.train.progress import say_progress

    run = arguments.run
    if run.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(run.early_stopping_patience))
    if run.eval_accuracy is not None:  # first, so that trackers and early stopping have its figure
        trainer.callback_handler.callbacks.insert(0, EvalAccuracy(trainer, run.eval_accuracy))
    trainer.add_callback(CardFilled())  # before what sends the card to the hub
    if hub is not None:
        trainer.add_callback(hub)
    say_progress(trainer)


def _further_tokens(arguments: TrainArguments) -> int:
    """Return how many tokens there may be beside those of a row: a learned prompt, an answer."""
    run = arguments.run
    virtual = run.num_virtual_tokens if run.method == "prompt_tuning" else 0
    return virtual + getattr(arguments.training, "max_completion_length", 0)


def loading_options(arguments: TrainArguments) -> dict[str, Any]:
    """Return what `from_pretrained` is to be told, as TRL would tell it; uses the options up."""
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
    router_lr, norm_lr = rates_of_mode(run)
    groups = param_groups(
        model,
        lr=training.learning_rate,
        router_lr=router_lr,
        norm_lr=norm_lr,
        weight_decay=training.weight_decay,
    )
    return cls, {**options, "params": groups}


def _fit(trainer: Trainer, checkpoint: str | None) -> None:
    import torch

    from depthmix.train.restore import loading

    try:
        with write_errors(), loading(checkpoint, trainer):
            trainer.train(resume_from_checkpoint=checkpoint)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "the device is out of memory: lower per_device_train_batch_size (and raise "
            "gradient_accumulation_steps) or max_length, or set gradient_checkpointing"
        ) from error


# What the user is told


def _stopped(trainer: Trainer, folder: Path) -> str:
    """Return how to go on, for the first process to say."""
    if not trainer.is_world_process_zero():
        return ""
    return (
        f"stopped after step {trainer.state.global_step} of {trainer.state.max_steps}; "
        f"go on with: depthmix train {folder / output.CONFIG_NAME} --resume"
    )


def _without_effect(arguments: TrainArguments) -> list[str]:
    from depthmix.train.methods import without_effect

    names = without_effect(arguments.run, arguments.chosen)
    method = arguments.run.method
    return [f"note: method {method} does not read {', '.join(names)}"] if names else []
