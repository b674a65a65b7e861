"""`export_model`: merge the tuning method, and write weights, configuration and modelling code."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel
from torch import nn

from depthmix.errors import ConfigError, DepthmixError
from depthmix.export.code import MODULE, Names, run_code
from depthmix.export.fold import described, folded
from depthmix.files import whole_folder
from depthmix.method.mixture import MODULE_NAME, DepthMixture
from depthmix.model.active import host_of
from depthmix.model.anatomy import Anatomy, Between
from depthmix.model.probing import evaluating, run_probe
from depthmix.model.runtime import runtime_of
from depthmix.model.temperature import temperature_of


def export_model(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write a self-contained folder.

    `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads it where depthmix
    is not installed, and engines that build models of transformers serve it; the logits are those
    of the merged model, which is checked on a few tokens before anything is written to `folder`. It
    is for inference: trained further, it learns the plain cross-entropy of the mixture, without
    distillation.

    Args:
        model: a causal language model with MoDE, PEFT-wrapped or not; the tuning method is merged
            in place.
        tokenizer: saved beside it.
        folder: must not exist, or be empty.

    Raises:
        ConfigError: the folder holds something, or the exported code does not carry this model.
        DepthmixError: no MoDE is attached, or the tuning method cannot be merged.
    """
    with whole_folder(folder) as staging:
        runtime = runtime_of(model)
        host = merged(model)
        mixture = runtime.mixture()
        if mixture is None or mixture.config.k == 1:
            raise DepthmixError("there is no mixture to export: k is 1, or MoDE is switched off")
        exported = _rebuilt(host, mixture, runtime.anatomy, staging / f"{MODULE}.py")
        # By the names they have in memory: those on the hub belong to the class of the base.
        exported.save_pretrained(staging, save_original_format=False)
        tokenizer.save_pretrained(staging)


def merged(model: nn.Module) -> Any:
    """Return the causal language model with the tuning method merged and MoDE kept.

    Raises:
        DepthmixError: it was tuned by a learned prompt.
    """
    if not isinstance(model, PeftModel):
        return host_of(model)
    if model.active_peft_config.is_prompt_learning:
        raise DepthmixError("a learned prompt cannot be merged into weights")
    merge: Any = model.merge_and_unload
    return merge()


def _rebuilt(host: Any, mixture: DepthMixture, anatomy: Anatomy, file: Path) -> Any:
    """Write the code, and return the model by it: its weights are the host's own.

    Raises:
        ConfigError: the code does not carry this model.
    """
    name = type(host).__name__
    if anatomy.between is Between.MODULES:
        raise ConfigError(
            f"{name}: more than a final norm lies between its layers and its head, which the "
            "exported code does not carry"
        )
    reason = "its final norm is not in the model without its head"
    for trunk in _trunks(host, anatomy):
        names = Names.of(host, trunk)
        file.write_text(names.code, "utf-8")
        try:
            exported = _built(host, mixture, anatomy, trunk, names, file)
            with evaluating(exported), evaluating(host):
                found, wanted = run_probe(exported), run_probe(host)
        except (RuntimeError, TypeError, AttributeError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            continue
        gap = (found - wanted).abs().max().item()
        if gap <= 4 * torch.finfo(wanted.dtype).eps ** 0.5 * wanted.abs().max().item():
            return exported
        reason = f"its logits are others, by {gap:.3g}"
    raise ConfigError(f"{name}: the exported code does not carry this model: {reason}")


def _trunks(host: Any, anatomy: Anatomy) -> list[str]:
    """Return where the model without its head may be: around the layers and the final norm."""
    inner = anatomy.layers_path.rpartition(".")[0]
    places = inner.split(".")
    paths = [".".join(places[:count]) for count in range(1, min(len(places), 2) + 1)]
    norm = anatomy.norm_path or anatomy.layers_path
    return [path for path in paths if path and norm.startswith(f"{path}.")]


def _built(
    host: Any, mixture: DepthMixture, anatomy: Anatomy, trunk: str, names: Names, file: Path
) -> Any:
    config = copy.deepcopy(host.config)
    parameters = folded(mixture, _take_scaling(config) * temperature_of(host))
    config.depthmix = {
        "layers": [path.removeprefix(f"{trunk}.") for path in anatomy.layer_paths],
        "norm": anatomy.norm_path and anatomy.norm_path.removeprefix(f"{trunk}."),
        "mixture": described(mixture),
        "parameters": {name: list(tensor.shape) for name, tensor in parameters.items()},
    }
    config.auto_map = names.auto_map
    weights: dict[str, Any] = {
        name: tensor
        for name, tensor in host.state_dict(keep_vars=True).items()
        if not name.startswith(f"{MODULE_NAME}.")
    }
    for name, tensor in parameters.items():
        weights[f"{trunk}.{MODULE_NAME}.{name}"] = nn.Parameter(tensor, requires_grad=False)
    with init_empty_weights(include_buffers=False):
        exported = getattr(run_code(file), f"DepthMix{names.host}")(config)
    exported.load_state_dict(weights, assign=True)
    exported.tie_weights()
    exported.generation_config = host.generation_config
    return exported


def _take_scaling(config: Any) -> float:
    """Return by what the model divides its logits, as far as engines do not do so themselves.

    vLLM applies `logit_scale` and `final_logit_softcapping`, and not Granite's `logits_scaling`:
    that goes into the mixture, and out of the configuration.
    """
    text = config.get_text_config()
    scaling = float(getattr(text, "logits_scaling", 1.0))
    if "dim_model_base" in vars(text):  # MiniCPM3, which works it out of this
        text.dim_model_base = text.hidden_size
    elif scaling != 1.0:
        text.logits_scaling = 1.0
    return scaling
