"""The callback through which an unmodified Trainer logs the routing and holds the router."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from accelerate.utils import reduce
from transformers import (
    DefaultFlowCallback,
    Seq2SeqTrainingArguments,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging

from depthmix.carry.card import write_card
from depthmix.carry.groups import shares_rate
from depthmix.carry.trackers import chart_router_weights
from depthmix.config import MoDEConfig
from depthmix.errors import TrainingError
from depthmix.model.runtime import Runtime, TrainerKind, find_runtime

logger = logging.get_logger(__name__)


class RoutingCallback(TrainerCallback):
    """Adds MoDE's figures to the trainer's logs; holds the router during its warm-up.

    Every Trainer made after the first `attach` has it, in front of all others, so that what it
    adds to the logs reaches every tracker. It does nothing for a model without MoDE.
    """

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep MoDE in fp32 where TRL has rounded what is trained on a quantised base to bf16."""
        runtime = find_runtime(kwargs["model"])
        mixture = runtime and runtime.mixture()
        for weight in mixture.parameters() if mixture else ():
            weight.data = weight.data.to(torch.promote_types(weight.dtype, torch.float32))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the model what trains it, and refuse objectives that would leave MoDE's out."""
        runtime = find_runtime(kwargs["model"])
        if runtime is None:
            return
        runtime.statistics.clear()
        runtime.evaluation.clear()
        runtime.hold_router = False
        runtime.trainer = _kind(args)
        runtime.temperature = _temperature(args)
        if shares_rate(kwargs["model"], kwargs["optimizer"].param_groups):
            logger.warning(
                "MoDE's norms and router learn at the rate of the tuning method, at which they "
                "barely move; depthmix.param_groups gives them rates of their own"
            )
        if args.label_smoothing_factor > 0:
            raise TrainingError("label_smoothing_factor: the loss of MoDE has no label smoothing")
        if runtime.trainer == "sft" and args.loss_type != "nll":  # type: ignore[attr-defined]
            raise TrainingError(
                f"loss_type={args.loss_type!r}: MoDE has its own loss; leave loss_type at 'nll'"  # type: ignore[attr-defined]
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hold the router while the late layers are distilled."""
        runtime = find_runtime(kwargs["model"])
        mixture = runtime and runtime.mixture()
        if runtime and mixture:
            runtime.hold_router = state.global_step < mixture.config.router_warmup_steps

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop before a loss that is no number gets into the logs as 0, or a checkpoint is written.

        Looked at where the Trainer logs or saves, since looking waits for the device.
        """
        runtime = find_runtime(kwargs["model"])
        mixture = None if runtime is None else runtime.mixture()
        if runtime is None or mixture is None or mixture.config.k == 1:
            return
        _require_loss(runtime, mixture.config)
        due = DefaultFlowCallback().on_step_end(args, state, TrainerControl())
        if not (due.should_log or due.should_save):
            return
        if not runtime.statistics.are_finite():
            raise TrainingError(
                f"the loss is not a finite number at step {state.global_step} or shortly before: "
                "lower the learning rate, or look for broken rows; the last checkpoint is as it was"
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the means since the last log, over all processes; of an evaluation, its own."""
        runtime = find_runtime(kwargs["model"])
        losses = [name for name in logs or () if name == "loss" or name.endswith("_loss")]
        if runtime is None or logs is None or not losses:
            return
        mixture = runtime.mixture()
        if mixture is None or mixture.config.k == 1:
            runtime.statistics.clear()
            return
        training = "loss" in logs
        statistics = runtime.figures(training)
        sums = statistics.take()
        if sums is not None:
            figures = statistics.summarize(reduce(sums, reduction="sum"))
            if not figures:
                logger.warning("no token was supervised since the last log: look at the labels")
            if not training:  # whose cross-entropy is `eval_loss` itself
                prefix = losses[0].removesuffix("loss")
                figures = {prefix + n: v for n, v in figures.items() if n != "ce_loss"}
            logs.update(figures)
            state.log_history[-1].update(figures)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Describe MoDE in the model card of the checkpoint."""
        runtime = find_runtime(kwargs["model"])
        if runtime is not None and state.is_world_process_zero:
            write_card(_folder(args) / f"checkpoint-{state.global_step}", runtime)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Describe MoDE in the model card of the run, and let go of the model."""
        runtime = find_runtime(kwargs["model"])
        if runtime is None:
            return
        runtime.trainer = None
        runtime.temperature = 1.0
        runtime.hold_router = False
        runtime.statistics.clear()
        if state.is_world_process_zero:
            write_card(_folder(args), runtime)


def watch_trainers() -> None:
    """Have every Trainer made from now on carry a `RoutingCallback`, before all others.

    Trackers get a chart of the router's weights.
    """
    callbacks: list[type[TrainerCallback]] = transformers.trainer.DEFAULT_CALLBACKS  # type: ignore[assignment]
    if RoutingCallback not in callbacks:
        callbacks.insert(0, RoutingCallback)
    chart_router_weights()


def _require_loss(runtime: Runtime, config: MoDEConfig) -> None:
    """Refuse to go on where the first step has not asked the model for its loss."""
    further = config.distill_weight > 0 or config.balance_weight > 0
    if runtime.trainer != "other" and runtime.statistics.forwards == 0 and further:
        raise TrainingError(
            "the trainer computes a loss of its own (compute_loss_func, or compute_loss without "
            "labels), so that MoDE's distillation is left out: leave the loss to the model, or set "
            "distill_weight and balance_weight to 0 to train on the mixture's logits alone"
        )


def _kind(args: TrainingArguments) -> TrainerKind:
    """Tell by its arguments what kind a trainer is; the callback is not shown the trainer."""
    names = {cls.__name__ for cls in type(args).__mro__}
    if "SFTConfig" in names:
        return "sft"
    return "plain" if type(args) in (TrainingArguments, Seq2SeqTrainingArguments) else "other"


def _temperature(args: TrainingArguments) -> float:
    """Return what a trainer divides logits by that trains on what it has sampled.

    Raises:
        TrainingError: it is to do what the fused loss does not.
    """
    given: Any = args
    if not {"GRPOConfig", "RLOOConfig"} & {cls.__name__ for cls in type(args).__mro__}:
        return 1.0
    for name in ("entropy_coef", "cast_lm_head_to_fp32"):
        if getattr(given, name, None):
            raise TrainingError(f"{name}: the loss of MoDE has none; leave it out")
    return float(given.temperature)


def _folder(args: TrainingArguments) -> Path:
    assert args.output_dir is not None  # TrainingArguments sets a default
    return Path(args.output_dir)
