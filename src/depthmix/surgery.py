"""`attach` and `detach`: put MoDE onto a model in place, and take it off again."""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from depthmix.adapters import (
    MODULE_NAME,
    carry,
    describe_in,
    description,
    host_of,
    late_layers,
    with_mode,
    without_mode,
)
from depthmix.classifier import ClassifierRuntime
from depthmix.config import MoDEConfig
from depthmix.discovery import Anatomy, discover, is_classifier
from depthmix.errors import ConfigError, DepthmixError
from depthmix.fingerprint import fingerprint
from depthmix.language import LanguageRuntime
from depthmix.mixture import DepthMixture
from depthmix.runtime import RUNTIME_NAME, runtime_of
from depthmix.train.callback import watch_trainers

MODEL_TAGS = ["depthmix", "mixture-of-depths-ensemble"]  # on the model's page on the hub


def attach(
    model: nn.Module,
    config: MoDEConfig | None = None,
    peft_config: PeftConfig | None = None,
    late_layers_only: bool = False,
) -> Any:
    """Make `model` predict with an ensemble of its late layers, in place.

    Before training the model predicts as `config` says: uniform weights, or `router_prior` on the
    last layer. In training, a forward with labels computes the loss of MoDE; its output's logits
    are then None. `hidden_states[-1]` and `last_hidden_state` of the model are the mixture.

    Args:
        model: a model of transformers that predicts tokens (causal, masked, encoder-decoder) or
            classifies sequences, or a PeftModel around one.
        config: the configuration; the default one if None.
        peft_config: a tuning method to wrap the model in as well. To have MoDE alone, saved as a
            small adapter, pass `depthmix.adapters.mode_only_config()`.
        late_layers_only: put the tuning method on the k late layers only. No gradient reaches
            below them, so that no activations are kept there and no backward pass runs.

    Returns:
        `model`, or the PeftModel around it if `peft_config` is given.

    Raises:
        DepthmixError: MoDE is attached already.
        DiscoveryError: the parts of the model were not found.
        ConfigError: the tuning method cannot carry MoDE.
    """
    config = config or MoDEConfig()
    host = host_of(model)
    _refuse(model, peft_config, late_layers_only)
    if peft_config is not None:
        with_mode(peft_config)
        if late_layers_only:
            late_layers(peft_config, host, config.k)
    anatomy = discover(host, config)
    _install(host, config, anatomy)
    watch_trainers()
    if peft_config is not None:
        model = get_peft_model(host, peft_config)
    elif isinstance(model, PeftModel):
        carry(model)
    if isinstance(model, PeftModel):
        for carried in model.peft_config.values():
            describe_in(carried, description(config))
    return model


def detach(model: nn.Module) -> nn.Module:
    """Take MoDE off, in place: the model is what it was before `attach`. Returns the model.

    Raises:
        DepthmixError: no MoDE is attached.
    """
    runtime = runtime_of(model)
    runtime.remove()
    host = runtime.host
    delattr(host, MODULE_NAME)
    del vars(host)[RUNTIME_NAME]
    tags = [tag for tag in host.model_tags or [] if tag not in MODEL_TAGS]
    vars(host).pop("model_tags", None)
    if tags:
        host.add_model_tags(tags)
    if isinstance(model, PeftModel):
        for config in model.peft_config.values():
            without_mode(config)
    return model


def _refuse(model: nn.Module, peft_config: PeftConfig | None, late_layers_only: bool) -> None:
    """Raise for arguments of `attach` that do not go together."""
    if RUNTIME_NAME in vars(host_of(model)):
        raise DepthmixError("MoDE is attached to this model already; detach it first")
    if peft_config is not None and isinstance(model, PeftModel):
        raise DepthmixError("the model is a PeftModel already: leave peft_config out")
    if peft_config is None and late_layers_only:
        raise ConfigError("late_layers_only needs a peft_config to restrict")


def _install(host: PreTrainedModel, config: MoDEConfig, anatomy: Anatomy) -> None:
    spec = {"config": config.to_dict(), "base": fingerprint(host, anatomy)}
    mixture = DepthMixture(config, anatomy.hidden_size, spec)
    last_layer = host.get_submodule(anatomy.layer_paths[-1])
    host.depthmix = mixture.to(next(last_layer.parameters()).device)
    kind = ClassifierRuntime if is_classifier(host) else LanguageRuntime
    vars(host)[RUNTIME_NAME] = kind(host, anatomy)
    host.add_model_tags(MODEL_TAGS)
