"""`Runtime`: the hooks that feed the mixture and set the loss, and the state of one forward.

    forward of the causal LM
      before_forward   in training with labels: take them out, so that no logits are made
      layer taps       keep what the late layers give
      on_norm          inference: return the mixture; training: keep the supervised tokens
      after_forward    training: compute the loss and put it into the output

Everything lives in one plain object, not a module, bound by methods: the model can be copied and
pickled, and the state dict does not change.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from depthmix.adapters import ActiveMixture, causal_lm_of
from depthmix.discovery import Anatomy, first_tensor
from depthmix.errors import DepthmixError, TrainingError
from depthmix.head import head_projection
from depthmix.mixture import DepthMixture
from depthmix.objective import Objective, training_objective
from depthmix.statistics import TrainingStatistics

RUNTIME_NAME = "depthmix_runtime"  # attribute of the causal LM
# What a profiler shows of depthmix.
MIXTURE_LABEL, LOSS_LABEL = "depthmix: mixture", "depthmix: loss"
IGNORED = -100  # label of a token that is not supervised

TrainerKind = Literal["sft", "other"]


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


class LayerTap:
    """A forward hook that keeps what a layer gives."""

    def __init__(self) -> None:
        self.state: Tensor | None = None
        self.with_grad = False

    def __call__(self, _layer: nn.Module, _args: Any, output: Any) -> None:
        """Keep the state, and whether it was made with a graph."""
        self.state = first_tensor(output)
        self.with_grad = torch.is_grad_enabled()

    def take(self) -> Tensor | None:
        """Return the state and let go of it."""
        state, self.state = self.state, None
        return state


class Runtime:
    """Hooks of one attached model.

    Args:
        causal_lm: the model with the LM head, `depthmix` already set on it.
        anatomy: where its parts are.
    """

    def __init__(self, causal_lm: PreTrainedModel, anatomy: Anatomy) -> None:
        self.causal_lm = causal_lm
        self.anatomy = anatomy
        self.mixture = ActiveMixture(causal_lm)
        self.taps = [LayerTap() for _ in anatomy.layer_indices]
        self.supervision: _Supervision | None = None
        self.records: list[list[Tensor]] = []
        self.statistics = TrainingStatistics(anatomy.layer_indices)
        self.hold_router = False
        self.trainer: TrainerKind | None = None
        # A norm in the head's own module (BERT) gets only the positions that are to be kept.
        self._norm_sees_all = anatomy.norm_path.startswith(f"{causal_lm.base_model_prefix}.")
        self._forward_names = list(inspect.signature(type(causal_lm).forward).parameters)[1:]
        norm = causal_lm.get_submodule(anatomy.norm_path)
        layers = [causal_lm.get_submodule(path) for path in anatomy.layer_paths]
        self._handles = [
            *(
                layer.register_forward_hook(tap)
                for layer, tap in zip(layers, self.taps, strict=True)
            ),
            norm.register_forward_hook(self.on_norm, with_kwargs=True),
            causal_lm.register_forward_pre_hook(self.before_forward, with_kwargs=True),
            causal_lm.register_forward_hook(self.after_forward, with_kwargs=True, always_call=True),
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> Runtime:
        """Copy with the model; a copy of the final norm alone, as PEFT makes, shares this one."""
        if id(self.causal_lm) not in memo:
            return self
        twin = object.__new__(Runtime)
        memo[id(self)] = twin
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def remove(self) -> None:
        """Take all hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def before_forward(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]] | None:
        """Take the labels out of a training forward, for which `after_forward` sets the loss."""
        self.supervision = None
        if not module.training:
            return None
        kwargs = {**dict(zip(self._forward_names, args, strict=False)), **kwargs}
        fused = bool(kwargs.get("fused_lm_head"))
        labels, shifted = kwargs.get("labels"), kwargs.get("shift_labels")
        mixture = self.mixture()
        if mixture is None or mixture.config.k == 1 or (labels is None and shifted is None):
            return None
        if fused and self.trainer == "other":
            return None  # DPO, GRPO, KTO ...: their objective, on the mixture
        if fused and self.trainer is None:
            raise TrainingError("attach MoDE to the model before the trainer is made, not after")
        _require_trainable(self.causal_lm, mixture)
        targets: Tensor = _shift(labels) if shifted is None else shifted  # type: ignore[arg-type]
        self.supervision = _Supervision(
            targets=targets,
            positions=(targets.flatten() != IGNORED).nonzero().squeeze(1),
            token_count=kwargs.get("num_items_in_batch"),
            fused=fused,
            shifted_by_caller=shifted is not None,
        )
        taken = ("labels", "shift_labels", "num_items_in_batch", "fused_lm_head")
        kwargs = {name: value for name, value in kwargs.items() if name not in taken}
        if "logits_to_keep" in self._forward_names and self._norm_sees_all:
            kwargs["logits_to_keep"] = 1
        return (), kwargs

    def on_norm(
        self, norm: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Return the mixture in place of the last layer's normed state."""
        states = [tap.take() for tap in self.taps]
        mixture = self.mixture()
        if mixture is None or mixture.config.k == 1:
            return None
        if states[-1] is None and not norm.training:
            return None  # an early exit (`assistant_early_exit`): a draft without the late layers
        self._check_taps(states)
        # What the norm gets is the last layer's state.
        last = first_tensor(output)
        assert last is not None
        late = [
            state[:, -last.shape[1] :].to(last.device) for state in states[:-1] if state is not None
        ]
        if self.supervision is not None:
            self._keep_supervised(norm, late, args, kwargs, last)
            return None
        with record_function(MIXTURE_LABEL):
            normed = [self._normed(norm, state, args, kwargs) for state in late]
            mixed, gate = mixture(torch.stack([*normed, last], dim=-2))
        for gates in self.records:
            gates.append(gate.detach())
        return mixed if isinstance(output, Tensor) else (mixed, *output[1:])

    def after_forward(
        self, _module: nn.Module, _args: Any, _kwargs: dict[str, Any], output: Any
    ) -> Any:
        """Set the loss of a training forward."""
        supervision, self.supervision = self.supervision, None
        if supervision is None or output is None:  # None: the forward raised
            return None
        with record_function(LOSS_LABEL):
            objective = self._objective(supervision)
        self.statistics.add(objective)
        if supervision.fused:
            return _fused_output(objective, supervision, output)
        return self._with_loss(objective, supervision, output)

    def _keep_supervised(
        self,
        norm: nn.Module,
        late: list[Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Tensor,
    ) -> None:
        """Norm the supervised tokens alone; the rest needs no mixture in training."""
        supervision = self.supervision
        assert supervision is not None
        positions = supervision.positions.to(output.device)
        normed = [self._normed(norm, _rows(state, positions), args, kwargs) for state in late]
        supervision.normed = torch.stack([*normed, _rows(output, positions)], dim=-2)
        device_type = output.device.type
        if torch.is_autocast_enabled(device_type):
            supervision.autocast_dtype = torch.get_autocast_dtype(device_type)

    def _normed(
        self, norm: nn.Module, state: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """Apply the final norm, if there is one, to another state."""
        return _call_again(norm, state, args, kwargs) if self.anatomy.has_norm else state

    def _check_taps(self, states: list[Tensor | None]) -> None:
        missing = [
            path
            for path, state in zip(self.anatomy.layer_paths, states, strict=True)
            if state is None
        ]
        if missing:
            raise DepthmixError(f"layers that did not run before the final norm: {missing}")
        if torch.is_grad_enabled() and not all(tap.with_grad for tap in self.taps):
            raise TrainingError(
                "gradient checkpointing runs the late layers without gradients, which would "
                "leave them untrained: set gradient_checkpointing_kwargs={'use_reentrant': False}"
            )

    def _objective(self, supervision: _Supervision) -> Objective:
        mixture, normed = self.mixture(), supervision.normed
        if mixture is None or normed is None:
            raise DepthmixError("the final norm did not run in this forward")
        head = self.causal_lm.get_output_embeddings()
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
            loss = loss + self.causal_lm.router_aux_loss_coef * aux_loss.to(loss.device)
        return type(output)(**{**output, "loss": loss, "logits": None})


def runtime_of(model: nn.Module) -> Runtime:
    """Return the runtime of an attached model, PEFT-wrapped or not.

    Raises:
        DepthmixError: no MoDE is attached.
    """
    runtime = vars(causal_lm_of(model)).get(RUNTIME_NAME)
    if runtime is None:
        raise DepthmixError(f"no MoDE is attached to this {type(model).__name__}")
    return runtime  # type: ignore[no-any-return]


def _require_trainable(causal_lm: nn.Module, mixture: DepthMixture) -> None:
    """Refuse to train beside a frozen MoDE: it would be left out of the checkpoint too."""
    if any(p.requires_grad for p in mixture.parameters()):
        return
    if any(p.requires_grad for p in causal_lm.parameters()):
        raise TrainingError(
            "MoDE is attached but frozen, so it would be neither trained nor saved: put "
            "'depthmix' into modules_to_save of the PEFT configuration, or pass that "
            "configuration to depthmix.attach(model, config, peft_config)"
        )


def _shift(labels: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    """Position t predicts label t + 1; the last position predicts nothing."""
    return torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]


def _rows(states: Float[Tensor, "b t d"], positions: Int[Tensor, " n"]) -> Float[Tensor, "n d"]:
    return states.flatten(0, 1).index_select(0, positions)


def _call_again(
    norm: nn.Module, state: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """Apply the final norm to another state, past its hooks: one of them is ours."""
    if args:
        return norm.forward(state, *args[1:], **kwargs)  # type: ignore[no-any-return]
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor))
    return norm.forward(**{**kwargs, name: state})  # type: ignore[no-any-return]


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
