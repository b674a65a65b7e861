"""`MoDEConfig`: every choice of the method, validated, with JSON both ways."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from depthmix.errors import ConfigError

Divergence = Literal["kl", "reverse_kl", "js"]
DistillInto = Literal["adaptation", "layers"]
Adaptation = Literal["norm", "low_rank", "affine", "none"]
RouterInput = Literal["last", "first", "all"]


def _help(text: str) -> dict[str, str]:
    """Return field metadata: the documentation of a field is also the command line's help."""
    return {"help": text}


@dataclass(frozen=True)
class MoDEConfig:
    """Configuration of a mixture-of-depths ensemble (Luo and Specia, arXiv 2410.13077).

    The help text of every field stands in its metadata, where the command line reads it.

    Raises:
        ConfigError: a value is of the wrong type or out of range; the message names the field.
    """

    k: int = field(
        default=3,
        metadata=_help(
            "Number of late layers in the ensemble, the last one included; in train, also auto."
        ),
    )
    distill_weight: float = field(
        default=0.1,
        metadata=_help(
            "Weight (lambda) of the distillation from the last layer to the other late layers."
        ),
    )
    divergence: Divergence = field(
        default="kl",
        metadata=_help(
            "Divergence to distil with: kl(last || late), reverse_kl(late || last) or js."
        ),
    )
    distill_into: DistillInto = field(
        default="adaptation",
        metadata=_help(
            "What the distillation trains: only the norms and maps of the late layers (adaptation) "
            "or the layers beneath as well (layers), as in the paper."
        ),
    )
    distill_fraction: float = field(
        default=0.25,
        metadata=_help(
            "Random fraction of the supervised tokens to distil on, which saves time; the estimate "
            "is unbiased. 1 for all of them."
        ),
    )
    adaptation: Adaptation = field(
        default="low_rank",
        metadata=_help(
            "What each late layer owns beside the shared head: a scale on the final norm (norm), "
            "as in the paper; also a low-rank map (low_rank), also a full linear map (affine), or "
            "nothing (none)."
        ),
    )
    adaptation_rank: int = field(
        default=16, metadata=_help("Rank of the map of adaptation low_rank.")
    )
    router_input: RouterInput = field(
        default="last",
        metadata=_help(
            "Normed state that the router reads: of the last or first late layer, or of all."
        ),
    )
    router_top_k: int | None = field(
        default=None,
        metadata=_help(
            "Layers a token may use: the best so many by the router. Default: all of them."
        ),
    )
    router_prior: float | None = field(
        default=0.9,
        metadata=_help(
            "Weight of the last layer before training; null for uniform weights, as in the paper."
        ),
    )
    router_warmup_steps: int = field(
        default=0,
        metadata=_help(
            "Training steps in which the router stands still while the late layers are distilled."
        ),
    )
    distill_signed: bool = field(
        default=False,
        metadata=_help(
            "In preference and reward training: late layers are pulled towards the last one where "
            "an answer is rewarded and pushed away where it is not (OISD). Otherwise pulled always."
        ),
    )
    balance_weight: float = field(
        default=0.0,
        metadata=_help(
            "Weight of KL(gate || uniform) a token, which keeps the router from collapsing."
        ),
    )
    layers_path: str | None = field(
        default=None,
        metadata=_help(
            "Module path of the list of layers, where discovery does not find it by itself."
        ),
    )
    norm_path: str | None = field(
        default=None,
        metadata=_help(
            "Module path of the final norm, where discovery does not find it by itself."
        ),
    )

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            _require(getattr(self, name) in choices, name, self, f"one of {', '.join(choices)}")
        for name, least in _LEAST_INTEGER.items():
            _require(_is_integer(getattr(self, name), least), name, self, f"an integer >= {least}")
        for name in ("distill_weight", "balance_weight"):
            value = getattr(self, name)
            _require(_is_number(value) and 0 <= value < float("inf"), name, self, "a number >= 0")
        fraction = self.distill_fraction
        _require(_is_number(fraction) and 0 < fraction <= 1, "distill_fraction", self, "in (0, 1]")
        prior = self.router_prior
        _require(
            prior is None or (_is_number(prior) and 0 < prior < 1),
            "router_prior",
            self,
            "in (0, 1), or null for uniform",
        )
        top_k = self.router_top_k
        for name in ("layers_path", "norm_path"):
            _require(isinstance(getattr(self, name), str | None), name, self, "a module path")
        _require(
            top_k is None or (_is_integer(top_k, 1) and top_k <= self.k),
            "router_top_k",
            self,
            f"an integer in 1..k ({self.k}), or null for all layers",
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a plain dictionary."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Return the fields as one line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoDEConfig:
        """Build a configuration from a dictionary; unknown names raise `ConfigError`."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"MoDE configuration: unknown field {', '.join(unknown)}; "
                f"known fields are {', '.join(sorted(known))}"
            )
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> MoDEConfig:
        """Build a configuration from JSON; text that is not an object raises `ConfigError`."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"MoDE configuration is not JSON: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"MoDE configuration must be a JSON object, not {values!r}")
        return cls.from_dict(values)


_CHOICES = {
    "divergence": get_args(Divergence),
    "distill_into": get_args(DistillInto),
    "adaptation": get_args(Adaptation),
    "router_input": get_args(RouterInput),
}
_LEAST_INTEGER = {"k": 1, "adaptation_rank": 1, "router_warmup_steps": 0}


def _is_integer(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _require(condition: bool, name: str, config: MoDEConfig, expected: str) -> None:
    if not condition:
        raise ConfigError(
            f"MoDE configuration: {name} must be {expected}, not {getattr(config, name)!r}"
        )
