"""`experiments/gpu.py` in small: every part runs on a CPU, and what it checks is right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "experiments" / "gpu.py"


@pytest.mark.slow
def test_every_part_runs(tiny, rows, tmp_path):
    output = tmp_path / "gpu.json"
    arguments = ["--model", tiny, "--data", rows, "--output", str(output), "--seeds", "1"]
    arguments += ["--minutes", "60"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [sys.executable, str(SCRIPT), *arguments, "--workers", "2"], check=True, env=environment
    )
    parts = json.loads(output.read_text())["parts"]
    assert {name: part["error"] for name, part in parts.items()} == dict.fromkeys(parts)
    assert list(parts) == [
        "correctness",
        "loss alone",
        "steps",
        "decoding",
        "evidence",
        "objectives",
    ]
    assert [row["check"] for row in parts["correctness"]["rows"] if not row["right"]] == []
    assert len(parts["correctness"]["rows"]) == 3 * 7 + 1
    assert {row["loss"] for row in parts["loss alone"]["rows"]} == {
        *("depthmix", "naive", "trl, fused head")
    }
    assert {"lora", "half", "light", "mode"} <= {row["method"] for row in parts["steps"]["rows"]}
    assert {row["seeds"] for row in parts["evidence"]["rows"]} == {1}
    methods = [row["method"] for row in parts["objectives"]["rows"]]
    assert {"none", "kl, layers", "sft", "grpo", "grpo+mode, js signed"} <= set(methods)
    assert len(methods) == 7 + 5


def test_what_fails_is_named_and_loses_nothing(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import gpu

    def fails(*_):
        raise RuntimeError("no such thing")

    monkeypatch.setitem(gpu.PARTS, "steps", fails)
    options = gpu.Options("m", [], Path("x.json"), 1.0, 1, 1, small=True)
    assert gpu.run("steps", options, float("inf"))["error"] == "RuntimeError: no such thing"
    assert gpu.run("steps", options, float("-inf"))["error"] == "no time left"
