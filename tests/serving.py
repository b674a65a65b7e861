"""A real `depthmix serve`, in a process of its own."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import depthmix

SOURCE = str(Path(depthmix.__file__).parents[1])


@contextmanager
def serving(folder, *arguments, **environment):
    """Start `depthmix serve`; give its address and its process."""
    command = [sys.executable, "-W", "ignore", "-m", "depthmix", "serve", *arguments, "--port", "0"]
    with subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": SOURCE, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        line = process.stdout.readline()
        try:
            if "serving" not in line:
                process.kill()
                raise AssertionError(process.stderr.read())
            yield line.split()[3], process
        finally:
            process.kill()
