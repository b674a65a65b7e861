"""`attach`, `detach`, `load`: put MoDE onto a model, take it off, bring a saved one onto its base.

Each is all or nothing: where it raises, the model is what it was, and so is the caller's
configuration, which is copied.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import CONFIG_NAME
from torch import nn
from transformers import PreTrainedModel

from depthmix.carry.adapters import (
    describe_in,
    description,
    read_peft_config,
    with_mode,
    without_mode,
    wrap_mixture,
)
from depthmix.carry.callback import watch_trainers
from depthmix.carry.checkpoint import Checkpoint, check_fingerprint, fingerprint
from depthmix.carry.depth import TunedLayers, count_of, require_restricted, restricted
from depthmix.carry.hotswap import refuse_hotswap
from depthmix.carry.saved_run import SavedRun
from depthmix.config import MoDEConfig
from depthmix.errors import ConfigError, DepthmixError
from depthmix.method.mixture import MODULE_NAME, DepthMixture, read_spec
from depthmix.model.active import ADAPTERS_OF_TRANSFORMERS, host_of
from depthmix.model.anatomy import Anatomy, is_classifier
from depthmix.model.discovery import discover
from depthmix.model.loss_probes import settle_other_terms
from depthmix.model.runtime import RUNTIME_NAME, Runtime, runtime_of

_HOLDERS = (dict, OrderedDict, set)  # in which a module keeps its children, parameters and hooks
MODEL_TAGS = ["depthmix", "mixture-of-depths-ensemble"]  # on the model's page on the hub


def attach(
    model: nn.Module,
    config: MoDEConfig | None = None,
    peft_config: PeftConfig | None = None,
    late_layers_only: bool = False,
    tuned_layers: TunedLayers | None = None,
) -> Any:
    """Make `model` predict with an ensemble of its late layers, in place.

    Before training the model predicts as `config` says: uniform weights, or `router_prior` on the
    last layer. In training, a forward with labels computes the loss of MoDE and makes no logits.
    `hidden_states[-1]` and `last_hidden_state` of the model are the mixture; where
    `logits_to_keep` asks for few positions, at these alone.

    Args:
        model: a model of transformers that predicts tokens (causal, masked, encoder-decoder) or
            classifies sequences, or a PeftModel around one.
        config: the configuration; the default one if None.
        peft_config: a tuning method to wrap the model in as well; a copy of it is used. To have
            MoDE alone, saved as a small adapter, pass `depthmix.adapters.mode_only_config()`.
        late_layers_only: short for `tuned_layers=k`.
        tuned_layers: how many of the last layers carry the tuning method: a number, a share (0.5),
            "half" or "all". No gradient reaches below them, so that no activations are kept there
            and no backward pass runs. Apart from k: how many layers predict.

    Returns:
        `model`, or the PeftModel around it if `peft_config` is given.

    Raises:
        DepthmixError: MoDE is attached already, or transformers' own adapters are.
        DiscoveryError: the parts of the model were not found, or MoDE's loss would not be its own.
        ConfigError: the tuning method cannot carry MoDE, or not on the last layers alone.
    """
    config = config or MoDEConfig()
    host = host_of(model)
    _refuse(model, peft_config, late_layers_only, tuned_layers)
    anatomy = discover(host, config)
    carried = config.k > 1  # otherwise there is nothing to save
    if peft_config is not None:
        peft_config = copy.deepcopy(peft_config)
        if carried:
            with_mode(peft_config)
    with _undone_on_failure(host):
        _install(host, config, anatomy)
        if peft_config is not None:
            tuned = config.k if late_layers_only else tuned_layers
            model = _tuned(host, peft_config, anatomy, tuned)
        elif carried and isinstance(model, PeftModel):
            wrap_mixture(model)
    watch_trainers()
    if carried and isinstance(model, PeftModel):
        refuse_hotswap()
        for adapter in model.peft_config.values():
            describe_in(adapter, description(config))
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


def load(
    base_model: nn.Module,
    folder: str | Path,
    is_trainable: bool = False,
    revision: str | None = None,
    config: MoDEConfig | None = None,
) -> Any:
    """Attach the MoDE saved in `folder` to `base_model`, with the adapter saved beside it.

    Args:
        base_model: the model that was tuned. For a fully fine-tuned checkpoint: the model
            loaded from `folder` itself with `from_pretrained`.
        folder: what `save_pretrained` or a trainer wrote: an adapter or a whole model; or its name
            on the hub.
        is_trainable: continue training; otherwise the adapter is frozen.
        revision: branch, tag or commit on the hub.
        config: to train an adapter on with another loss: what the module is made of must be as
            saved; divergence, weights and the like may be others.

    Returns:
        The PeftModel, or `base_model` for a fully fine-tuned checkpoint.

    Raises:
        CheckpointError: no MoDE in `folder`; a missing, extra or misshapen tensor; another base.
        DepthmixError: `base_model` is a PeftModel.
    """
    if isinstance(base_model, PeftModel):
        raise DepthmixError(
            "load needs the base model, and this is a PeftModel: pass what its unload() returns"
        )
    assert isinstance(base_model, PreTrainedModel)
    if not Path(folder).is_dir():
        folder = SavedRun.find(str(folder), revision).fetched()
    saved = Checkpoint(Path(folder))
    spec = saved.spec()
    with _undone_on_failure(base_model):
        attach(base_model, config or MoDEConfig.from_dict(spec["config"]))
        if (saved.folder / CONFIG_NAME).exists():
            return _load_adapter(base_model, saved, spec, is_trainable)
        return _load_whole(base_model, saved, is_trainable)


def _refuse(
    model: nn.Module,
    peft_config: PeftConfig | None,
    late_layers_only: bool,
    tuned_layers: TunedLayers | None,
) -> None:
    """Raise for arguments of `attach` that do not go together."""
    host = host_of(model)
    if RUNTIME_NAME in vars(host):
        raise DepthmixError("MoDE is attached to this model already; detach it first")
    if host._hf_peft_config_loaded:
        raise DepthmixError(ADAPTERS_OF_TRANSFORMERS)
    if peft_config is not None and isinstance(model, PeftModel):
        raise DepthmixError("the model is a PeftModel already: leave peft_config out")
    if late_layers_only and tuned_layers is not None:
        raise ConfigError("late_layers_only is short for tuned_layers=k: give one of them")
    if peft_config is None and (late_layers_only or tuned_layers is not None):
        raise ConfigError("tuned_layers (or late_layers_only) needs a peft_config to restrict")


@contextmanager
def _undone_on_failure(host: PreTrainedModel) -> Iterator[None]:
    """If anything raises, put back the model's modules, hooks, parameters and attributes."""
    attributes = {module: dict(vars(module)) for module in host.modules()}
    # Emptied and filled again: the handles of hooks know the very dictionaries.
    held = [(v, v.copy()) for a in attributes.values() for v in a.values() if type(v) in _HOLDERS]
    parameters = [(p, p.data, p.requires_grad) for p in host.parameters()]
    try:
        yield
    except BaseException:
        for module, before in attributes.items():
            vars(module).clear()
            vars(module).update(before)
        for holder, content in held:
            holder.clear()
            holder.update(content)
        for parameter, data, trained in parameters:
            parameter.data = data
            parameter.requires_grad_(trained)
        raise


def _install(host: PreTrainedModel, config: MoDEConfig, anatomy: Anatomy) -> None:
    spec = {"config": config.to_dict(), "base": fingerprint(host, anatomy)}
    mixture = DepthMixture(config, anatomy.hidden_size, spec)
    last_layer = host.get_submodule(anatomy.layer_paths[-1])
    host.depthmix = mixture.to(next(last_layer.parameters()).device)
    vars(host)[RUNTIME_NAME] = runtime = Runtime(host, anatomy)
    host.add_model_tags(MODEL_TAGS)
    if not is_classifier(host):
        settle_other_terms(runtime)


def _tuned(
    host: PreTrainedModel, config: PeftConfig, anatomy: Anatomy, tuned_layers: TunedLayers | None
) -> PeftModel:
    """Put a tuning method on a model, or on its last layers alone."""
    if tuned_layers is None:
        return get_peft_model(host, config)
    count = count_of(tuned_layers, anatomy.layer_count)
    model = get_peft_model(host, restricted(config, anatomy, count))
    require_restricted(host, anatomy, count)
    return model


def _load_adapter(
    base_model: PreTrainedModel, saved: Checkpoint, spec: dict[str, Any], is_trainable: bool
) -> PeftModel:
    mixture: Any = base_model.get_submodule(MODULE_NAME)
    check_fingerprint(spec["base"], read_spec(mixture.spec)["base"])
    config = read_peft_config(saved.folder)
    config.inference_mode = not is_trainable
    model = get_peft_model(base_model, config)
    saved.require(get_peft_model_state_dict(model), extra_allowed=False)
    model.load_adapter(str(saved.folder), "default", is_trainable=is_trainable)
    for part in model.modules():
        if isinstance(part, DepthMixture):
            part.spec = mixture.spec  # the configuration of now, not the saved one
    describe_in(config, description(mixture.config))
    return model


def _load_whole(
    base_model: PreTrainedModel, saved: Checkpoint, is_trainable: bool
) -> PreTrainedModel:
    mixture: Any = base_model.get_submodule(MODULE_NAME)
    saved.require_same_embeddings(base_model)
    saved.require({f"{MODULE_NAME}.{n}": t for n, t in mixture.state_dict().items()})
    mixture.load_state_dict(saved.read_mode())
    mixture.requires_grad_(is_trainable)
    return base_model
