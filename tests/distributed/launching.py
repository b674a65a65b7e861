"""Start a worker script in one process or in several, and see it through."""

import os
import subprocess
import sys
from pathlib import Path


def launch(worker, processes, *arguments, python=sys.executable):
    """Run a worker under torchrun; its programs come from where `python` is."""
    command = [python, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", processes, worker, *arguments]
    run(command, os.environ | {"PATH": f"{Path(python).parent}:{os.environ['PATH']}"})


def run(command, environment=None):
    done = subprocess.run(
        list(map(str, command)),
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def leave(status=0):
    """End a worker at once, with all saved.

    A gloo thread that still frees a tensor aborts a process whose interpreter ends, and can hang
    one that destroys its process groups.
    """
    os._exit(status)
