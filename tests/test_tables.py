"""Tables on a terminal of 80 columns: whole numbers, no ellipsis."""

import json

import pytest

from depthmix.bench.report import print_table
from depthmix.cli import main
from depthmix.compare.report import print_tables


@pytest.fixture
def shown(monkeypatch, capsys):
    """Return what was printed, once it fits."""
    monkeypatch.setenv("COLUMNS", "80")

    def read():
        text = capsys.readouterr().out
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= 80
        return text

    return read


def test_of_bench(shown):
    row = {
        **{"seconds": 12.345, "peak_bytes": 67890 * 2**20, "projected": 123456},
        **{"pulled_back": 123456, "largest_logits_bytes": 1234.5 * 2**20},
    }
    names = ["lora", "lora, TRL loss", "lora+mode, all distilled", "lora+mode, naive"]
    print_table("one training step", dict.fromkeys(names, row), "lora")
    text = shown()
    for figure in ("12.345", "67890", "123456", "1234.5"):
        assert text.count(figure) >= len(names)


def test_of_compare(shown):
    methods = ["lora", "late-lora+mode@1e-2 with a long name"]
    run = {
        **{"task": "mawps", "split": "test", "trainable_parameters": 123_456_789},
        **{"seconds": 12345.0, "peak_bytes": 79 * 2**30},
    }
    runs = [
        {**run, "method": method, "seed": seed, "loss": 0.5 + seed / 7, "accuracy": seed / 7}
        for method in methods
        for seed in (1, 2)
    ]
    differences = [
        {
            **{"task": "mawps", "method": methods[1], "metric": metric},
            **{"mean": 0.1234, "low": -0.0567, "high": 0.2345},
        }
        for metric in ("loss", "accuracy")
    ]
    print_tables({"runs": runs, "differences": differences})
    text = shown()
    assert "[-0.057, +0.234]" in text
    assert "123,456,789" in text


def test_of_plan(tiny, shown):
    assert main(["plan", tiny, "--cached-tokens", "100000000000"]) == 0
    assert "late-lora+mode" in shown()


def test_of_info(tiny, shown, capsys):
    assert main(["info", tiny, "--k", "2"]) == 0
    shown()
    assert main(["info", tiny, "--k", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["k"] == 2
