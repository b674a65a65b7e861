"""Rows to compare on."""

import json

import pytest


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    return str(path)
