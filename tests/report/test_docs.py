"""What docs/report.md shows is run as it stands there, on a tiny run."""

import shutil

import pytest

from depthmix.cli import main
from doc_blocks import blocks, commands

PAGE = "docs/report.md"

pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning")


@pytest.fixture
def tuned(train, rows, tmp_path, monkeypatch):
    """A run `tuned` and rows `heldout.jsonl` in the working directory."""
    flags = ["--validation_split", "0.5", "--max_steps", "2"]
    assert train(*flags, output="tuned") == 0
    shutil.copy(rows, tmp_path / "heldout.jsonl")
    monkeypatch.chdir(tmp_path)


def test_commands_run(tuned, capsys):
    reports = [words for _, words in commands(PAGE) if words[:2] == ["depthmix", "report"]]
    assert len(reports) == 3
    for _, *words in reports:
        short = ["--permutations", "99", "--generate", "0", "--rows", "4"]
        assert main([*words, *short]) == 0, capsys.readouterr().err
        assert "report: tuned/report/report.html" in capsys.readouterr().out


def test_python_runs(tuned, capsys):
    names = {}
    for block in blocks(PAGE, kinds=("python",)):
        block.run(names)
    assert "end of sequence" in capsys.readouterr().out
    assert [line.group for line in names["table"]] == ["digits"] * 2 + ["words"] * 2
