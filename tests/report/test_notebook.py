"""The example notebook is executed as it stands, on a tiny run."""

from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).parents[2] / "examples" / "routing.ipynb"


# The kernel's own client warns of the loop that it makes.
@pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument:UserWarning", "ignore::DeprecationWarning"
)
def test_it_runs_and_shows_its_charts(train, tmp_path, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    assert train("--max_steps", "2") == 0
    monkeypatch.setenv("DEPTHMIX_RUN", str(tmp_path / "out"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert "accuracy" in text
    pages = [output.get("data", {}).get("text/html", "") for output in outputs]
    assert sum("vega-lite" in page for page in pages) == 3


def test_it_is_kept_without_outputs():
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
