"""`LanguageTask`: a model with a language-modelling head, whose loss MoDE sets in training.

begin            in training with labels: take them, so that no logits are made
select, combine  inference: return the mixture; training: keep the supervised tokens
finish           training: compute the loss and put it into the output; evaluation within a
                 Trainer: measure the loss of some tokens, for its logs
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.profiler import record_function
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from depthmix.errors import DepthmixError, TrainingError
from depthmix.method.head import head_projection
from depthmix.method.objective import Objective, training_objective
from depthmix.model.active import require_trainable
from depthmix.model.forward import Forward
from depthmix.model.fused_output import IGNORED, Supervision, fused_output
from depthmix.model.no_logits import NoLogits

if TYPE_CHECKING:
    from depthmix.model.runtime import Runtime

logger = logging.get_logger(__name__)

LOSS_LABEL = "depthmix: loss"  # what a profiler shows


class LanguageTask:
    """A language model: the loss of the supervised tokens, or the mixture of all."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        # What belongs to the head, not to the trunk, gets only the positions that are to be kept.
        self._takes_kept = "logits_to_keep" in runtime.forward_names and runtime.path.within_trunk

    def begin(self, forward: Forward, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Take the labels out of a training forward, for which `finish` sets the loss."""
        host, runtime = forward.host, self.runtime
        labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
        fused = bool(kwargs.get("fused_lm_head"))
        # DPO, GRPO, KTO ... take log-probabilities of one path alone, with a graph and without.
        supervised = host.training or (fused and runtime.trainer == "other")
        if not supervised or (labels is None and shifted is None):
            forward.keep = self._kept(kwargs)
            forward.task = self._evaluated(forward, labels, shifted)
            return kwargs
        if host.training:
            self._check(forward, kwargs, fused)
        if labels is not None and host.config.is_encoder_decoder:
            kwargs.update(_decoder_inputs(host, labels, kwargs))
        targets, positions = self._supervised(labels, shifted)
        count = kwargs.get("num_items_in_batch")
        asks = runtime.anatomy.other_terms == "asked" and not fused
        forward.task = Supervision(
            targets, positions, True, count, fused, shifted is not None, asks
        )
        taken = ("labels", "shift_labels", "num_items_in_batch", "fused_lm_head")
        kwargs = {name: value for name, value in kwargs.items() if name not in taken}
        if self._takes_kept:
            kwargs["logits_to_keep"] = 1
        if asks:  # of one ignored position: the loss is what the model adds to its cross-entropy
            kwargs |= {"labels": targets.new_full((len(targets), 1), IGNORED)}
            kwargs |= {"num_items_in_batch": 1}
        return kwargs

    def _check(self, forward: Forward, kwargs: dict[str, Any], fused: bool) -> None:
        """Raise for a training forward in which MoDE would learn nothing, or the model less."""
        if fused and self.runtime.trainer is None:
            raise TrainingError("attach MoDE to the model before the trainer is made, not after")
        require_trainable(forward.host, forward.mixture)
        if self.runtime.anatomy.other_terms == "lost" and kwargs.get("output_router_logits"):
            raise TrainingError(
                f"output_router_logits: {type(forward.host).__name__} adds a loss of its experts' "
                "router which MoDE cannot keep; leave it off"
            )
        if self.runtime.trainer is None and forward.mixture.config.router_warmup_steps > 0:
            logger.warning_once(
                "router_warmup_steps: only a Trainer counts steps; in a loop of your own set "
                "`depthmix.model.runtime.runtime_of(model).hold_router` while it should stand still"
            )

    def _evaluated(
        self, forward: Forward, labels: Tensor | None, shifted: Tensor | None
    ) -> Supervision | None:
        """Return the tokens whose distillation an evaluation within a Trainer is to log."""
        if (
            (labels is None and shifted is None)
            or self.runtime.trainer not in ("plain", "sft")
            or forward.host.training
            or forward.keep is not None
        ):
            return None
        targets, positions = self._supervised(labels, shifted)
        # As many as in training, evenly: nothing random, which would change the training after it.
        every = round(1 / forward.mixture.config.distill_fraction)
        return Supervision(targets, positions[::every], training=False)

    def _kept(self, kwargs: dict[str, Any]) -> slice | Tensor | None:
        """Return the positions that are to be mixed, None for all."""
        keep = kwargs.get("logits_to_keep", 0)
        states = kwargs.get("output_hidden_states") or self.runtime.host.config.output_hidden_states
        if not self._takes_kept or states or self.runtime.records:
            return None
        if isinstance(keep, Tensor):
            return keep if keep.ndim == 1 else None
        return slice(-keep, None) if keep else None

    def _supervised(
        self, labels: Tensor | None, shifted: Tensor | None
    ) -> tuple[Int[Tensor, "b t"], Int[Tensor, " n"]]:
        """Return the token that each position predicts, and where one is, in the flat batch."""
        targets = shifted
        if targets is None:
            assert labels is not None
            targets = _shift(labels) if self.runtime.anatomy.labels_shifted else labels
        return targets, (targets.flatten() != IGNORED).nonzero().squeeze(1)

    def select(self, forward: Forward, states: Tensor) -> Tensor:
        """Return the supervised tokens alone in training, (n, ...); the rest needs no mixture."""
        if forward.task is None or not forward.task.training:
            return states
        return _rows(states, forward.task.positions)

    def combine(
        self, forward: Forward, normed: Float[Tensor, "*b k d"]
    ) -> Float[Tensor, "*b d"] | None:
        """Keep the states of the supervised tokens; return the mixture of all outside training."""
        task: Supervision | None = forward.task
        if task is None:
            return self.runtime.mix(forward, normed)
        forward.note_autocast(normed.device.type)
        task.normed = normed if task.training else _rows(normed, task.positions)
        return None if task.training else self.runtime.mix(forward, normed)

    def on_scores(self, _head: nn.Module, _args: Any, _scores: Tensor) -> None:
        """Nothing: the loss projects what it needs itself."""

    def finish(self, forward: Forward, output: Any) -> Any:
        """Set the loss of a training forward; measure that of an evaluation."""
        supervision: Supervision | None = forward.task
        if supervision is None:
            return None
        training = supervision.training
        with (
            record_function(LOSS_LABEL),
            torch.set_grad_enabled(training and torch.is_grad_enabled()),
        ):
            objective = self._objective(forward, supervision)
        beyond = self.runtime.trainer == "other"  # whose references are no training
        if torch.is_grad_enabled() or not beyond:
            loss = objective.loss
            self.runtime.figures(training).add(objective.gate, loss.cross_entropy, loss.divergence)
        if not training:
            return None
        if supervision.fused:
            signed = forward.mixture.config.distill_signed
            return fused_output(objective, supervision, output, beyond, signed)
        return _with_loss(forward, objective, supervision, output)

    def _objective(self, forward: Forward, supervision: Supervision) -> Objective:
        normed, anatomy, host = supervision.normed, self.runtime.anatomy, forward.host
        if normed is None:
            raise DepthmixError("the final norm did not run in this forward")
        head: Any = host.get_output_embeddings()
        targets = supervision.targets.to(normed.device).flatten()
        transform = anatomy.logit_transform.at(self.runtime.temperature)
        bias = anatomy.output_bias(host)
        if bias is not None:
            transform = replace(transform, bias=bias.detach())
        return training_objective(
            forward.mixture,
            normed,
            targets[supervision.positions.to(normed.device)],
            head_projection(head, normed.dtype, anatomy.vocabulary, forward.autocast),
            anatomy.head_scale,
            transform,
            self.runtime.hold_router,
            further=self.runtime.trainer == "other",
        )


def _with_loss(
    forward: Forward, objective: Objective, supervision: Supervision, output: Any
) -> Any:
    """Put the mean loss, and the model's other terms, into the output of a training forward."""
    count = supervision.token_count
    if count is None:
        count = max(len(supervision.positions), 1)
    elif isinstance(count, Tensor):
        count = count.to(objective.total.device)
    loss = objective.total / count
    # DataParallel gathers the outputs of its replicas, and knows tensors and None alone.
    logits = None if getattr(forward.host, "_is_replica", False) else NoLogits()
    if not isinstance(output, ModelOutput):
        terms, *rest = output if supervision.asks_terms else (0.0, *output)
        return (loss + terms, None, *rest[1:])
    if supervision.asks_terms:
        loss = loss + output["loss"].to(loss.device)
    return type(output)(**{**output, "loss": loss, "logits": logits})


def _rows(states: Tensor, positions: Int[Tensor, " n"]) -> Tensor:
    """Return those tokens of a batch (b, t, ...), as (n, ...)."""
    return states.flatten(0, 1).index_select(0, positions.to(states.device))


def _shift(labels: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Position t predicts label t + 1; the last position predicts nothing."""
    return torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]


def _decoder_inputs(
    host: Any, labels: Int[Tensor, "b t"], given: dict[str, Any]
) -> dict[str, Tensor]:
    """Return what an encoder-decoder would make of its labels, which it will not see."""
    if given.get("decoder_input_ids") is not None or given.get("decoder_inputs_embeds") is not None:
        return {}
    try:
        inputs = host.prepare_decoder_input_ids_from_labels(labels=labels)
    except AttributeError:  # M2M100, Blenderbot: a function beside the class
        shift = vars(sys.modules[type(host).__module__])["shift_tokens_right"]
        inputs = shift(labels, host.config.pad_token_id, host.config.decoder_start_token_id)
    return {"decoder_input_ids": inputs}
