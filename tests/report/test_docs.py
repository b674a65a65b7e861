"""What docs/report.md shows is run as it stands there, on a tiny run."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from depthmix.cli import main

PAGE = (Path(__file__).parents[2] / "docs" / "report.md").read_text("utf-8")

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")


@pytest.fixture
def tuned(train, rows, tmp_path, monkeypatch):
    """A run `tuned` and rows `heldout.jsonl` in the working directory."""
    flags = ["--validation_split", "0.5", "--max_steps", "2"]
    assert train(*flags, output="tuned") == 0
    shutil.copy(rows, tmp_path / "heldout.jsonl")
    monkeypatch.chdir(tmp_path)


def test_commands_run(tuned, capsys):
    commands = re.findall(r"^depthmix (report .*)$", PAGE, flags=re.M)
    assert len(commands) == 3
    for command in commands:
        short = ["--permutations", "99", "--generate", "0", "--rows", "4"]
        assert main([*shlex.split(command), *short]) == 0, capsys.readouterr().err
        assert "report: tuned/report/report.html" in capsys.readouterr().out


def test_python_runs(tuned, capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(compile(block, "docs/report.md", "exec"), names)
    assert "end of sequence" in capsys.readouterr().out
    assert [line.group for line in names["table"]] == ["digits"] * 2 + ["words"] * 2
