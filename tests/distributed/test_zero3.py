"""A model that ZeRO-3 spreads over two real processes learns what a whole one learns."""

import shutil
import sys
from pathlib import Path

import pytest
from launching import launch, run
from parameters import assert_same
from safetensors.torch import load_file

from models import tiny_model

WORKER = Path(__file__).with_name("zero3.py")
# Of its own: accelerate imports DeepSpeed wherever it is installed.
ENVIRONMENT = Path(sys.prefix) / "zero3" / "bin"


@pytest.mark.optional
@pytest.mark.skipif(
    not ENVIRONMENT.exists() or shutil.which("c++") is None,
    reason="`make optional` installs DeepSpeed, which needs a C++ compiler",
)
@pytest.mark.parametrize("tied", [False, True])
def test_two_parts_are_one(tmp_path, tied):
    tiny_model("llama", tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    run([sys.executable, WORKER, tmp_path / "base", tmp_path / "one"])
    python = ENVIRONMENT / "python"
    launch(WORKER, 2, tmp_path / "base", tmp_path / "two", python=python)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert_same(two, one)
