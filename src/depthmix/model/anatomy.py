"""`Anatomy`: where the parts of a model are, and how its late states reach the head."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from depthmix.method.head import LogitTransform


class Between(enum.Enum):
    """What lies between the last layer and the head."""

    NORM = "one module, the final norm"
    NOTHING = "nothing: late states are what the head gets"
    MODULES = "more than one module, through which all late states pass as one batch"


OtherTerms = Literal["none", "asked", "lost"]


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a model are.

    Attributes:
        layers_path: module path of the list of layers.
        layer_indices: places of the k late layers in that list, the last layer last.
        between: what lies between the last layer and the head.
        norm_path: module path of the final norm, if that is what lies between.
        head_path: module path of the head.
        head_scale: constant between the norm's output and the head's input.
        logit_transform: what the model does to the head's output.
        output_bias_path: module path of a tensor that the model adds to the head's output (Marian).
        hidden_size: width d of what the head gets.
        vocabulary: outputs of the head; the classes of a classifier.
        labels_shifted: whether position t predicts label t + 1 (a causal model) or label t (a
            masked one; a decoder behind an encoder, which gets its labels moved by one).
        other_terms: of the model's own loss, beside its cross-entropy (an auxiliary loss of the
            experts' router): it has none; its own forward is asked for them; or they are lost as
            soon as router logits are switched on, which is refused.
    """

    layers_path: str
    layer_indices: tuple[int, ...]
    between: Between
    norm_path: str | None
    head_path: str
    head_scale: float
    logit_transform: LogitTransform
    output_bias_path: str | None
    hidden_size: int
    vocabulary: int
    labels_shifted: bool
    other_terms: OtherTerms = "none"

    @property
    def layer_count(self) -> int:
        """All layers, not only the late ones."""
        return self.layer_indices[-1] + 1

    def last_layers(self, count: int) -> range:
        """Return the places of the last `count` layers."""
        return range(self.layer_count - count, self.layer_count)

    def output_bias(self, host: nn.Module) -> Tensor | None:
        """Return what the model adds to the head's output, (v,), or None."""
        if self.output_bias_path is None:
            return None
        owner, _, name = self.output_bias_path.rpartition(".")
        bias: Tensor = getattr(host.get_submodule(owner), name)
        return bias.flatten()

    @property
    def layer_paths(self) -> tuple[str, ...]:
        """Module paths of the late layers, the last layer last."""
        return tuple(f"{self.layers_path}.{index}" for index in self.layer_indices)


def is_classifier(model: nn.Module) -> bool:
    """Tell whether a model classifies sequences."""
    return type(model).__name__.endswith("ForSequenceClassification")


def first_tensor(value: Any) -> Tensor | None:
    """Return the hidden states in what a module takes or gives: itself, or the first of a tuple."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
        return value[0]
    return None


def with_first_tensor(value: Any, tensor: Tensor) -> Any:
    """Return what a module gives, with other hidden states in it; see `first_tensor`."""
    return tensor if isinstance(value, Tensor) else (tensor, *value[1:])
