"""Base models, tokenizers and tuned models for the commands; what goes wrong is one clear error."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from depthmix.errors import CheckpointError, DepthmixError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

_OWN_CONFIG = "depthmix.yaml"


def load_base(name: str, **options: Any) -> Any:
    """Load a causal language model from a folder or the hub.

    Args:
        name: folder or hub name.
        options: passed on to `AutoModelForCausalLM.from_pretrained`.
    """
    from transformers import AutoModelForCausalLM

    return _found("model", name, lambda: AutoModelForCausalLM.from_pretrained(name, **options))


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model from a folder or the hub."""
    from transformers import AutoTokenizer

    return _found("tokenizer of", name, lambda: AutoTokenizer.from_pretrained(name, **options))


def load_tuned(folder: str, base: str | None) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load what `depthmix train` saved and its tokenizer, for inference.

    Args:
        folder: folder with an adapter or a fully fine-tuned model.
        base: base model to use instead of the one that the adapter names.
    """
    import torch

    model = load_saved(folder, base)
    own_tokenizer = (Path(folder) / "tokenizer_config.json").exists()
    tokenizer = load_tokenizer(folder if own_tokenizer else base or base_of(folder))
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    return model.to(device).eval(), tokenizer


def load_base_for_use(name: str, base: str | None = None) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load a base model and its tokenizer, for inference; `base` takes precedence."""
    import torch

    model, tokenizer = load_base(base or name), load_tokenizer(base or name)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    return model.to(device).eval(), tokenizer


def is_saved(target: str) -> bool:
    """Whether a target is what `depthmix train` saved, rather than a base model."""
    return Path(target).is_dir() and (is_adapter(target) or has_mode(target))


def load_saved(folder: str, base: str | None, is_trainable: bool = False) -> Any:
    """Load a saved model, with MoDE or without, onto its base model."""
    from peft import PeftModel

    import depthmix

    model = load_base(base or base_of(folder))
    if has_mode(folder):
        return depthmix.load(model, folder, is_trainable=is_trainable)
    if is_adapter(folder):
        return PeftModel.from_pretrained(model, folder, is_trainable=is_trainable)
    return model


def is_adapter(folder: str) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (Path(folder) / "adapter_config.json").exists()


def base_of(folder: str) -> str:
    """Return the base model that an adapter names, or the folder of a fully fine-tuned model.

    Raises:
        CheckpointError: there is neither, or the adapter names no base model.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder")
    if not is_adapter(folder):
        if (path / "config.json").exists():
            return folder
        raise CheckpointError(f"{folder}: neither adapter_config.json nor config.json is there")
    name = json.loads((path / "adapter_config.json").read_text())["base_model_name_or_path"]
    if not name:
        raise CheckpointError(f"{folder}: the adapter names no base model; give it with --model")
    return str(name)


def trained_on(folder: str) -> tuple[str, str | None]:
    """Return format and template of the data that a model was tuned on; text if not recorded."""
    import yaml

    path = Path(folder) / _OWN_CONFIG
    if not path.exists():
        return "text", None
    config = yaml.safe_load(path.read_text())
    return config.get("dataset_format", "text"), config.get("dataset_template")


def weight_files(folder: str) -> list[Path]:
    """Return the files that hold the tuned weights of a saved model."""
    return sorted(Path(folder).glob("*.safetensors"))


def has_mode(folder: str) -> bool:
    """Whether the weights in a folder hold MoDE's, going by the names of the tensors."""
    from safetensors import safe_open

    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            if any("depthmix." in name for name in file.keys()):  # noqa: SIM118, no mapping
                return True
    return False


def _found(what: str, name: str, load: Callable[[], T]) -> T:
    """Run `load`; say what was looked for where it fails."""
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(name).is_dir():
        raise DepthmixError(f"model {name}: there is no such folder")
    try:
        return load()
    except (OSError, ValueError, ImportError) as error:
        raise DepthmixError(f"{what} {name}: cannot be loaded: {error}") from error


def ignore_renamed_properties() -> None:
    """PEFT asks for a property of transformers by its old name, at every model: not to be told."""
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
