"""Set-up of all tests: offline, one thread, shapes checked at run time, a fixed seed."""

import os
import shutil
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp(prefix="depthmix-tests-")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

# Before the hook: configurations check their values themselves, with errors that are tested.
import depthmix.compare.experiment
import depthmix.config  # noqa: F401

# Before all other imports of depthmix: shapes and types are checked at every call.
install_import_hook("depthmix", "beartype.beartype")

torch.set_num_threads(1)
settings.register_profile("depthmix", deadline=None, derandomize=True, database=None)
settings.load_profile("depthmix")


def pytest_unconfigure():
    """Remove what `datasets` has cached."""
    shutil.rmtree(os.environ["HF_DATASETS_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_model_folder():
    """Folder of the embedded 135M model; tests that use it carry the mark `real`."""
    from embedded_model import embedded_model

    return embedded_model()


pytest_plugins = ["command_fixtures"]
