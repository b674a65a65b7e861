"""`export_model`: merge the tuning method, and write weights, configuration and modelling code."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

import depthmix
from depthmix.errors import ConfigError, DepthmixError
from depthmix.method.mixture import MODULE_NAME
from depthmix.model.active import host_of
from depthmix.model.anatomy import Between
from depthmix.model.runtime import runtime_of

_TEMPLATE = Path(__file__).with_name("modeling.py.txt")
_MODULE = "modeling_depthmix"
_AUTO_MAP = {"AutoModelForCausalLM": f"{_MODULE}.DepthMixForCausalLM"}


def export_model(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write a self-contained folder.

    `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)` loads it where depthmix
    is not installed; the logits are those of the merged model. It is for inference: trained
    further, it learns the plain cross-entropy of the mixture, without distillation.

    Args:
        model: a model with MoDE, PEFT-wrapped or not; the tuning method is merged in place.
        tokenizer: saved beside it.
        folder: must not exist, or be empty.

    Raises:
        ConfigError: the folder holds something, or the model is of a class of its own.
        DepthmixError: no MoDE is attached, or the tuning method cannot be merged.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty")
    runtime = runtime_of(model)
    host = _merged(model)
    mixture = runtime.mixture()
    if mixture is None or mixture.config.k == 1:
        raise DepthmixError("there is no mixture to export: k is 1, or MoDE is switched off")
    if runtime.anatomy.between is Between.MODULES:
        raise ConfigError(
            f"{type(host).__name__}: more than a final norm lies between its layers and its head, "
            "which the exported code does not carry"
        )
    base = type(host)
    if not base.__module__.startswith("transformers."):
        raise ConfigError(f"{base.__name__} is no class of transformers: its code is not there")
    anatomy, config = runtime.anatomy, mixture.config
    host.config.depthmix = {
        "k": config.k,
        "layers": list(anatomy.layer_paths),
        "norm": anatomy.norm_path or anatomy.layer_paths[-1],
        "has_norm": anatomy.between is Between.NORM,
        "adaptation": config.adaptation,
        "router_input": config.router_input,
        "router_top_k": config.router_top_k,
        "prior": mixture.router.prior.tolist(),
        "parameters": {name: list(p.shape) for name, p in mixture.named_parameters()},
    }
    host.config.auto_map = _AUTO_MAP
    staging = folder.with_name(f".{folder.name}.exporting")
    shutil.rmtree(staging, ignore_errors=True)
    weights = {n: t for n, t in host.state_dict().items() if n != f"{MODULE_NAME}.spec"}
    # By the names they have in memory: those on the hub belong to the class of the base.
    host.save_pretrained(staging, state_dict=weights, save_original_format=False)
    (staging / f"{_MODULE}.py").write_text(_code(base.__name__, base.__module__), "utf-8")
    tokenizer.save_pretrained(staging)
    if folder.exists():
        folder.rmdir()
    staging.replace(folder)


def is_own_code(folder: Path) -> bool:
    """Whether the code in an exported folder is, to the letter, what `export_model` writes.

    Then it can be run without asking: it is code of this very package.
    """
    config = json.loads((folder / "config.json").read_text("utf-8"))
    path = folder / f"{_MODULE}.py"
    if config.get("auto_map") != _AUTO_MAP or not path.exists():
        return False
    found = path.read_text("utf-8", errors="replace")
    base = re.search(r"^from (transformers\.[\w.]+) import (\w+)$", found, re.MULTILINE)
    return base is not None and found == _code(base.group(2), base.group(1))


def _code(base: str, module: str) -> str:
    return _TEMPLATE.read_text("utf-8").format(
        base=base, module=module, version=depthmix.__version__
    )


def _merged(model: nn.Module) -> Any:
    """Return the causal language model with the tuning method merged and MoDE kept."""
    if not isinstance(model, PeftModel):
        return host_of(model)
    if model.active_peft_config.is_prompt_learning:
        raise DepthmixError("a learned prompt cannot be merged into weights")
    merge: Any = model.merge_and_unload
    return merge()
