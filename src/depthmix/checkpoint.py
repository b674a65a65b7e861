"""`load`: bring a saved adapter, or a fully fine-tuned MoDE checkpoint, onto its base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from depthmix.adapters import MODULE_NAME, describe_in, description
from depthmix.config import MoDEConfig
from depthmix.errors import CheckpointError
from depthmix.fingerprint import check_fingerprint, same_sample
from depthmix.mixture import read_spec
from depthmix.surgery import attach, detach


def load(base_model: PreTrainedModel, folder: str | Path, is_trainable: bool = False) -> Any:
    """Attach the MoDE saved in `folder` to `base_model`, with the adapter saved beside it.

    Args:
        base_model: the model that was tuned. For a fully fine-tuned checkpoint: the model
            loaded from `folder` itself with `from_pretrained`.
        folder: what `save_pretrained` or a trainer wrote: an adapter or a whole model.
        is_trainable: continue training; otherwise the adapter is frozen.

    Returns:
        The PeftModel, or `base_model` for a fully fine-tuned checkpoint.

    Raises:
        CheckpointError: no MoDE in `folder`; a missing, extra or misshapen tensor; another base.
    """
    saved = _Checkpoint(Path(folder))
    spec = saved.spec()
    attach(base_model, MoDEConfig.from_dict(spec["config"]))
    try:
        if (saved.folder / CONFIG_NAME).exists():
            return _load_adapter(base_model, saved, spec, is_trainable)
        return _load_whole(base_model, saved, is_trainable)
    except BaseException:
        detach(base_model)
        raise


def read_peft_config(folder: Path) -> PeftConfig:
    """Read an adapter's configuration, without the description that MoDE adds to it."""
    values = json.loads((folder / CONFIG_NAME).read_text())
    values.pop(MODULE_NAME, None)
    return PeftConfig.from_peft_type(**values)  # type: ignore[no-any-return]


def _load_adapter(
    base_model: PreTrainedModel, saved: _Checkpoint, spec: dict[str, Any], is_trainable: bool
) -> PeftModel:
    mixture: Any = base_model.get_submodule(MODULE_NAME)
    check_fingerprint(spec["base"], read_spec(mixture.spec)["base"])
    config = read_peft_config(saved.folder)
    config.inference_mode = not is_trainable
    model = get_peft_model(base_model, config)
    try:
        saved.require(get_peft_model_state_dict(model), extra_allowed=False)
        model.load_adapter(str(saved.folder), "default", is_trainable=is_trainable)
    except BaseException:
        if not config.is_prompt_learning:
            model.unload()
        raise
    describe_in(config, description(mixture.config))
    return model


def _load_whole(
    base_model: PreTrainedModel, saved: _Checkpoint, is_trainable: bool
) -> PreTrainedModel:
    mixture: Any = base_model.get_submodule(MODULE_NAME)
    _check_same_weights(base_model, saved)
    saved.require({f"{MODULE_NAME}.{n}": t for n, t in mixture.state_dict().items()})
    mixture.load_state_dict(saved.read_mode())
    mixture.requires_grad_(is_trainable)
    return base_model


def _check_same_weights(base_model: PreTrainedModel, saved: _Checkpoint) -> None:
    """Refuse a base model that was not loaded from the fully fine-tuned checkpoint itself."""
    embeddings: Any = base_model.get_input_embeddings().weight
    name = next(n for n, p in base_model.named_parameters() if p is embeddings)
    if name in saved and not same_sample(saved.read(name), embeddings):
        raise CheckpointError(
            f"{saved.folder}: holds a whole fine-tuned model, and the base model given has other "
            "weights: load the base model from this folder with from_pretrained"
        )


class _Checkpoint:
    """The tensors in a folder, by name, read lazily from its safetensors files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = self._find()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def _find(self) -> dict[str, Path]:
        """Return the file that holds each tensor."""
        names = [SAFETENSORS_WEIGHTS_NAME, SAFE_WEIGHTS_NAME]
        index = self.folder / SAFE_WEIGHTS_INDEX_NAME
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        paths = [self.folder / name for name in names if (self.folder / name).exists()]
        if not paths:
            raise CheckpointError(f"{self.folder}: no safetensors file of an adapter or a model")
        return {name: path for path in paths for name in self._open(path).keys()}  # noqa: SIM118

    def _open(self, path: Path) -> Any:
        try:
            return safe_open(str(path), framework="pt")
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a whole safetensors file ({error})") from error

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        return self._open(self._files[name]).get_tensor(name)  # type: ignore[no-any-return]

    def read_mode(self) -> dict[str, Tensor]:
        """Read the tensors of MoDE, under their names within the module."""
        return {
            name.rpartition(f"{MODULE_NAME}.")[2]: self.read(name)
            for name in self._files
            if f"{MODULE_NAME}." in name
        }

    def spec(self) -> dict[str, Any]:
        """Read the configuration and the description of the base model."""
        name = next((n for n in self._files if n.endswith(f"{MODULE_NAME}.spec")), None)
        if name is None:
            raise CheckpointError(
                f"{self.folder}: no MoDE in this checkpoint (no {MODULE_NAME}.spec)"
            )
        return read_spec(self.read(name))

    def require(self, expected: dict[str, Tensor], extra_allowed: bool = True) -> None:
        """Raise unless every expected tensor is there in its shape (and, if asked, no other)."""
        problems = [f"missing {name}" for name in expected if name not in self._files]
        for name, tensor in expected.items():
            if name in self._files and not name.endswith(f"{MODULE_NAME}.spec"):
                shape = tuple(self._open(self._files[name]).get_slice(name).get_shape())
                if shape != tuple(tensor.shape):
                    problems.append(f"{name} is {shape}, the model needs {tuple(tensor.shape)}")
        if not extra_allowed:
            problems += [f"extra {name}" for name in self._files if name not in expected]
        if problems:
            raise CheckpointError(
                f"{self.folder}: {'; '.join(problems[:5])}"
                + (f" and {len(problems) - 5} more" if len(problems) > 5 else "")
            )
