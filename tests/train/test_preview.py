"""What a preview shows of a row."""

import pytest
from rich.console import Console

from command_fixtures import build_tokenizer
from depthmix.train.preview import _marked, pieces


@pytest.fixture
def row():
    tokenizer = build_tokenizer()
    ids = tokenizer("What is 7?<|end|>")["input_ids"]
    answer = tokenizer("What")["input_ids"]
    labels = [-100] * len(answer) + ids[len(answer) :]
    return tokenizer, ids, labels


def test_pieces_add_up_to_the_text(row):
    tokenizer, ids, labels = row
    assert list(pieces(tokenizer, ids, labels)) == [(False, "What"), (True, " is 7?<|end|>")]
    assert list(pieces(tokenizer, ids, ids)) == [(True, "What is 7?<|end|>")]
    assert list(pieces(tokenizer, [], [])) == []


def test_colour_where_there_is_some_and_marks_where_there_is_none(row, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = _marked(Console(force_terminal=True, color_system="standard"), *row)
    assert coloured.plain == "What is 7?<|end|>"
    (span,) = coloured.spans
    assert (span.start, str(span.style)) == (4, "bold green")
    assert _marked(Console(force_terminal=False), *row).plain == "What{+ is 7?<|end|>+}"
    dull = Console(force_terminal=True, color_system="standard", no_color=True)
    assert _marked(dull, *row).plain == "What{+ is 7?<|end|>+}"
