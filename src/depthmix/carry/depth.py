"""How many of the last layers carry the tuning method: `tuned_layers`, apart from MoDE's k.

No gradient reaches below the lowest of them: no backward pass and no activations are kept there,
and what enters it is the same in every epoch.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from contextlib import suppress
from typing import Any

from peft import PeftConfig
from torch import nn

from depthmix.errors import ConfigError
from depthmix.method.mixture import MODULE_NAME
from depthmix.model.anatomy import Anatomy

TunedLayers = int | float | str


def count_of(tuned_layers: TunedLayers, total: int) -> int:
    """Return how many of `total` layers are meant.

    Args:
        tuned_layers: a number of layers, a share of them (0.5), "half" or "all".
        total: layers of the model.

    Raises:
        ConfigError: it is none of these.
    """
    share = {"half": 0.5, "all": 1.0}.get(str(tuned_layers), tuned_layers)
    if isinstance(share, str):  # as the command line gives it
        with suppress(ValueError):
            share = int(share) if share.isdecimal() else float(share)
    if isinstance(share, float) and 0 < share <= 1:
        return max(1, round(share * total))
    if isinstance(share, int) and not isinstance(share, bool) and 1 <= share <= total:
        return share
    raise ConfigError(
        f"tuned_layers {tuned_layers!r}: a number from 1 to {total}, a share such as 0.5, half "
        "or all"
    )


def restricted(config: PeftConfig, anatomy: Anatomy, count: int) -> PeftConfig:
    """Return a copy of a PEFT configuration, restricted to the last `count` layers.

    Raises:
        ConfigError: the tuning method cannot be restricted to some layers.
    """
    config = copy.deepcopy(config)
    fields = {field.name for field in dataclasses.fields(config)}
    untyped: Any = config
    indices = anatomy.last_layers(count)
    if "exclude_modules" in fields:
        if untyped.exclude_modules:
            raise ConfigError("exclude_modules is set, which is what restricts to the last layers")
        # `layers_to_transform` is not heeded where PEFT lists targets by their full names.
        kept = "|".join(map(str, indices))
        untyped.exclude_modules = rf"(?!{re.escape(anatomy.layers_path)}\.(?:{kept})\.).*"
    elif "layers_to_transform" in fields:
        untyped.layers_to_transform = list(indices)
        untyped.layers_pattern = anatomy.layers_path.rpartition(".")[2]
    else:
        raise ConfigError(f"{type(config).__name__} cannot be restricted to some layers")
    return config


def require_restricted(host: nn.Module, anatomy: Anatomy, count: int) -> None:
    """Look at what is trained: nothing below the last `count` layers may be.

    Raises:
        ConfigError: something is; names it.
    """
    layers = [f"{anatomy.layers_path}.{index}" for index in anatomy.last_layers(count)]
    above = tuple(
        f"{p}." for p in (*layers, anatomy.norm_path, anatomy.head_path, MODULE_NAME) if p
    )
    for name, parameter in host.named_parameters():
        if parameter.requires_grad and not name.startswith(above):
            raise ConfigError(
                f"tuned_layers: {name} is trained, which lies below the last {count} layers; "
                "options of the tuning method that reach all layers (bias, target_parameters, "
                "modules_to_save) do not go with it"
            )
