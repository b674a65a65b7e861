"""`LanguageRuntime`: the hooks of a model with a language-modelling head, which set its loss.

forward of the model
  before_forward   in training with labels: take them out, so that no logits are made
  select, receive  inference: return the mixture; training: keep the supervised tokens
  after_forward    training: compute the loss and put it into the output
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from depthmix.discovery import Anatomy
from depthmix.errors import DepthmixError, TrainingError
from depthmix.head import head_projection
from depthmix.mixture import DepthMixture
from depthmix.objective import Objective, training_objective
from depthmix.runtime import LOSS_LABEL, Runtime, require_trainable

IGNORED = -100  # label of a token that is not supervised


@dataclass
class FusedLossOutput(ModelOutput):
    """What TRL's SFTTrainer reads of a model that computes its loss: per-token values (B, T - 1).

    `log_probs` is minus the training objective, so that its sum carries the distillation too.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    is_top1: Tensor | None = None
    label_mask: Tensor | None = None
    aux_loss: Tensor | None = None


@dataclass
class _Supervision:
    """The supervised tokens of one training forward."""

    targets: Int[Tensor, "b t"]  # the token each position predicts, or IGNORED
    positions: Int[Tensor, " n"]  # of the supervised ones, in the flattened batch
    token_count: Tensor | int | None  # `num_items_in_batch`
    fused: bool  # called by TRL with `fused_lm_head=True`
    shifted_by_caller: bool
    normed: Float[Tensor, "n k d"] | None = None
    autocast_dtype: torch.dtype | None = None


class LanguageRuntime(Runtime):
    """Hooks of a language model: the loss of the supervised tokens, or the mixture of all."""

    def __init__(self, host: PreTrainedModel, anatomy: Anatomy) -> None:
        super().__init__(host, anatomy)
        self.supervision: _Supervision | None = None
        # What belongs to the head, not to the trunk, gets only the positions that are to be kept.
        in_trunk = anatomy.norm_path.startswith(f"{host.base_model_prefix}.")
        self._sees_all = in_trunk and not anatomy.stacked

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """Take the labels out of a training forward, for which `after_forward` sets the loss."""
        self.supervision = None
        if not module.training:
            return None
        kwargs = {**dict(zip(self.forward_names, args, strict=False)), **kwargs}
        fused = bool(kwargs.get("fused_lm_head"))
        labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
        mixture = self.mixture_at_work()
        if mixture is None or (labels is None and shifted is None):
            return None
        if fused and self.trainer == "other":
            return None  # DPO, GRPO, KTO ...: their objective, on the mixture
        if fused and self.trainer is None:
            raise TrainingError("attach MoDE to the model before the trainer is made, not after")
        require_trainable(self.host, mixture)
        if labels is not None and self.host.config.is_encoder_decoder:
            kwargs.update(_decoder_inputs(self.host, labels, kwargs))
        targets = self._targets(labels, shifted)
        self.supervision = _Supervision(
            targets=targets,
            positions=(targets.flatten() != IGNORED).nonzero().squeeze(1),
            token_count=kwargs.get("num_items_in_batch"),
            fused=fused,
            shifted_by_caller=shifted is not None,
        )
        taken = ("labels", "shift_labels", "num_items_in_batch", "fused_lm_head")
        kwargs = {name: value for name, value in kwargs.items() if name not in taken}
        if "logits_to_keep" in self.forward_names and self._sees_all:
            kwargs["logits_to_keep"] = 1
        return (), kwargs

    def _targets(self, labels: Tensor | None, shifted: Tensor | None) -> Int[Tensor, "b t"]:
        """Return the token that each position predicts, by whichever of the two is given."""
        if shifted is not None:
            return shifted
        assert labels is not None
        return _shift(labels) if self.anatomy.labels_shifted else labels

    def select(self, states: Tensor) -> Tensor:
        """Return the supervised tokens alone in training, (n, ...); the rest needs no mixture."""
        if self.supervision is None:
            return states
        positions = self.supervision.positions.to(states.device)
        return states.flatten(0, 1).index_select(0, positions)

    def receive(
        self, mixture: DepthMixture, normed: Float[Tensor, "*b k d"]
    ) -> Float[Tensor, "*b d"] | None:
        """Keep the states of the supervised tokens, or return the mixture of all."""
        if self.supervision is None:
            return self.mix(mixture, normed)
        self.supervision.normed = normed
        device_type = normed.device.type
        if torch.is_autocast_enabled(device_type):
            self.supervision.autocast_dtype = torch.get_autocast_dtype(device_type)
        return None

    def after_forward(
        self, _module: nn.Module, _args: Any, _kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Set the loss of a training forward."""
        supervision, self.supervision = self.supervision, None
        if supervision is None or output is None:  # None: the forward raised
            return None
        with record_function(LOSS_LABEL):
            objective = self._objective(supervision)
        parts = objective.loss
        self.statistics.add(objective.gate, parts.cross_entropy, parts.divergence)
        if supervision.fused:
            return _fused_output(objective, supervision, output)
        return self._with_loss(objective, supervision, output)

    def _objective(self, supervision: _Supervision) -> Objective:
        mixture, normed = self.mixture_at_work(), supervision.normed
        if mixture is None or normed is None:
            raise DepthmixError("the final norm did not run in this forward")
        head = self.host.get_output_embeddings()
        targets = supervision.targets.to(normed.device).flatten()
        return training_objective(
            mixture,
            normed,
            targets[supervision.positions.to(normed.device)],
            head_projection(
                head, normed.dtype, self.anatomy.vocabulary, supervision.autocast_dtype
            ),
            self.anatomy.head_scale,
            self.anatomy.logit_transform,
            self.hold_router,
        )

    def _with_loss(self, objective: Objective, supervision: _Supervision, output: Any) -> Any:
        """Put the mean loss into a Hugging Face output; the logits of a training step are None."""
        count = supervision.token_count
        if count is None:
            count = max(len(supervision.positions), 1)
        elif isinstance(count, Tensor):
            count = count.to(objective.total.device)
        loss = objective.total / count
        if not isinstance(output, ModelOutput):
            return (loss, None, *output[1:])
        aux_loss = output.get("aux_loss")
        if aux_loss is not None:
            loss = loss + self.host.router_aux_loss_coef * aux_loss.to(loss.device)
        return type(output)(**{**output, "loss": loss, "logits": None})


def _shift(labels: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Position t predicts label t + 1; the last position predicts nothing."""
    return torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]


def _decoder_inputs(
    host: Any, labels: Int[Tensor, "b t"], given: dict[str, Any]
) -> dict[str, Tensor]:
    """Return what an encoder-decoder would make of its labels, which it will not see."""
    if given.get("decoder_input_ids") is not None or given.get("decoder_inputs_embeds") is not None:
        return {}
    return {"decoder_input_ids": host.prepare_decoder_input_ids_from_labels(labels=labels)}


def _fused_output(objective: Objective, supervision: _Supervision, output: Any) -> FusedLossOutput:
    targets, positions = supervision.targets, supervision.positions
    mask = targets != IGNORED

    def spread(values: Tensor) -> Tensor:
        """Put one value a supervised token back to its place in the batch."""
        flat = values.new_zeros(targets.numel())
        flat[positions.to(values.device)] = values
        return flat.view(targets.shape)

    # The graph hangs on the sum. Spread evenly, it reaches every reduction that weighs the tokens
    # alike, as SFTTrainer's does; one that does not (`dft`) is refused when training starts.
    gradient_only = (objective.total - objective.total.detach()) / max(len(positions), 1)
    log_probs = -(spread(objective.per_token) + gradient_only * mask)
    fields = {
        "log_probs": log_probs,
        "entropy": spread(objective.loss.entropy),
        "is_top1": spread(objective.loss.correct),
        "label_mask": mask,
    }
    if not supervision.shifted_by_caller:
        fields = {name: value[:, :-1] for name, value in fields.items()}
    return FusedLossOutput(aux_loss=output.get("aux_loss"), **fields)
