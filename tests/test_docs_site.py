"""The documentation site builds without a warning; needs what `make docs` installs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from depthmix.cli import COMMANDS

ROOT = Path(__file__).parents[1]


@pytest.mark.optional
def test_it_builds_without_a_warning_and_has_every_command(tmp_path):
    pytest.importorskip("material")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    commands = (tmp_path / "commands.html").read_text()
    assert all(f"depthmix {name} --help" in commands for name in COMMANDS)
    assert "mixture-of-depths ensemble" in (tmp_path / "index.html").read_text()
    assert "depthmix.config.MoDEConfig" in (tmp_path / "api.html").read_text()
    assert (tmp_path / "examples" / "routing.ipynb").exists()
