"""A model that ZeRO-3 spreads over two real processes learns what a whole one learns."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models import tiny_model

WORKER = Path(__file__).with_name("zero3.py")
# Of its own: accelerate imports DeepSpeed wherever it is installed.
ENVIRONMENT = Path(sys.prefix) / "zero3" / "bin"


def run(*command):
    environment = os.environ | {"PATH": f"{ENVIRONMENT}:{os.environ['PATH']}"}
    done = subprocess.run(
        list(map(str, command)), check=False, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(
    not ENVIRONMENT.exists() or shutil.which("c++") is None,
    reason="`make test` installs DeepSpeed, which needs a C++ compiler",
)
@pytest.mark.parametrize("tied", [False, True])
def test_two_parts_are_one(tmp_path, tied):
    tiny_model("llama", tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    run(sys.executable, WORKER, tmp_path / "base", tmp_path / "one")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run(ENVIRONMENT / "python", *launch, WORKER, tmp_path / "base", tmp_path / "two")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6, msg=name)
