"""What is saved: a checkpoint's tensors, and whether they meet the base they were trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from depthmix.errors import CheckpointError
from depthmix.method.mixture import MODULE_NAME, read_spec
from depthmix.model.anatomy import Anatomy
from depthmix.model.partitioned import gathered


class Checkpoint:
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

    def require_same_embeddings(self, model: PreTrainedModel) -> None:
        """Refuse a base model that was not loaded from this, a whole fine-tuned model."""
        embeddings: Any = model.get_input_embeddings().weight
        name = next(n for n, p in model.named_parameters() if p is embeddings)
        with gathered([embeddings]):
            sample = _sample(embeddings)
        if name in self and not _close(_sample(self.read(name)), sample):
            raise CheckpointError(
                f"{self.folder}: holds a whole fine-tuned model, and the base model given has "
                "other weights: load the base model from this folder with from_pretrained"
            )


SAMPLES = 64  # numbers of each weight
SAMPLED_ROWS = 64  # the first rows of it: a vocabulary may grow behind them
# Two roundings to bf16 apart: the same base in another dtype is the same base.
TOLERANCE = 2**-7
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def fingerprint(host: PreTrainedModel, anatomy: Anatomy) -> dict[str, Any]:
    """Return the shape of a model and samples of its weights, as JSON types.

    Of the embeddings, of every matrix of the late layers and of the final norm, as they are
    beneath a tuning method. A quantised weight has no sample: the same base may come in any form.
    """
    parts = {"embeddings": host.get_input_embeddings()}
    parts |= {path: host.get_submodule(path) for path in anatomy.layer_paths}
    if anatomy.norm_path is not None:
        parts[anatomy.norm_path] = host.get_submodule(anatomy.norm_path)
    samples = {}
    for path, part in parts.items():
        with gathered(part.parameters()):
            for name, weight in _base_weights(part).items():
                if weight.dtype in _PLAIN and (weight.ndim > 1 or path == anatomy.norm_path):
                    samples[f"{path}.{name}"] = _sample(weight)
    return {
        "name": host.config.name_or_path,
        "revision": getattr(host.config, "_commit_hash", None),
        "model_type": host.config.model_type,
        "layers_path": anatomy.layers_path,
        "last_layer": anatomy.layer_indices[-1],
        "hidden_size": anatomy.hidden_size,
        "samples": samples,
    }


def check_fingerprint(saved: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise `CheckpointError`, naming the differences, unless both are of the same base model."""
    different = [
        f"{name} is {found[name]!r}, saved with {saved[name]!r}"
        for name in ("model_type", "layers_path", "last_layer", "hidden_size")
        if saved[name] != found[name]
    ]
    samples, others = saved.get("samples", {}), found["samples"]
    unlike = [n for n in samples if n in others and not _close(samples[n], others[n])]
    if not different and unlike:
        more = f" and {len(unlike) - 1} more" if len(unlike) > 1 else ""
        different = [f"other weights in {unlike[0]}{more}"]
    if different:
        where = f" ({saved['name']}, revision {saved.get('revision')})" if saved.get("name") else ""
        raise CheckpointError(
            f"the adapter was trained on another base{where}: {'; '.join(different)}"
        )


def _base_weights(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of a module beneath what PEFT has put around or into it, by name."""
    found: dict[str, Tensor] = {}
    for name, weight in module.named_parameters():
        path = name.split(".")
        if "modules_to_save" in path or "trainable_tokens_delta" in name or _adds(module, path):
            continue
        kept = [part for part in path if part not in ("base_layer", "original_module")]
        found[".".join(kept)] = weight
    return found


def _adds(module: nn.Module, path: list[str]) -> bool:
    """Tell whether a parameter lies in a layer of a tuning method, outside of the base layer."""
    owners = [module.get_submodule(".".join(path[:depth])) for depth in range(len(path))]
    return any(
        isinstance(owner, BaseTunerLayer) and path[depth] != "base_layer"
        for depth, owner in enumerate(owners)
    )


def _close(a: list[float], b: list[float]) -> bool:
    if len(a) != len(b):
        return False
    return torch.allclose(torch.tensor(a), torch.tensor(b), rtol=TOLERANCE, atol=1e-6)


def _sample(weight: Tensor) -> list[float]:
    flat = weight.detach()[:SAMPLED_ROWS].flatten()
    places = torch.linspace(0, flat.numel() - 1, SAMPLES, dtype=torch.float64).long()
    values = flat[places.to(flat.device)].float().tolist()
    return [float(f"{value:.4g}") for value in values]
