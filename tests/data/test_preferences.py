"""Pairs of answers and prompts to answer, in the forms in which they come."""

import json

import pytest

from depthmix.data.load import Source, load_source
from depthmix.errors import DataError

USER = {"role": "user", "content": "What?"}
YES = {"role": "assistant", "content": "Yes."}
NO = {"role": "assistant", "content": "No."}


def read(tmp_path, *rows, purpose="pairs", **options):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return load_source(Source([str(path)], purpose=purpose, **options))


@pytest.mark.parametrize(
    ("row", "prompt", "chosen"),
    [
        ({"prompt": "What?", "chosen": " Yes.", "rejected": " No."}, "What?", " Yes."),
        (
            {"chosen": "Human: What?\n\nBot: It is", "rejected": "Human: What?\n\nBot: Isn't"},
            "Human: What?\n\nBot:",
            " It is",
        ),
        ({"chosen": "A:\nyes", "rejected": "A:\nno"}, "A:\n", "yes"),
    ],
)
def test_texts(tmp_path, row, prompt, chosen):
    rows, format = read(tmp_path, row)
    assert format == "preference"
    assert (rows[0]["prompt"], rows[0]["chosen"]) == (prompt, chosen)
    assert rows[0]["prompt"] + rows[0]["chosen"] in (row["chosen"], "What? Yes.")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": "What?", "chosen": [USER, YES], "rejected": [USER, NO]},
        {"prompt": "What?", "chosen": [YES], "rejected": [NO]},
    ],
)
def test_messages(tmp_path, row):
    rows, format = read(tmp_path, row)
    assert format == "chat_preference"
    made = {name: json.loads(rows[0][name]) for name in ("prompt", "chosen", "rejected")}
    assert made == {"prompt": [USER], "chosen": [YES], "rejected": [NO]}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "?", "chosen": "a", "rejected": "a"}, "chosen and rejected are the same"),
        ({"prompt": "?", "chosen": "a", "rejected": ""}, "field rejected is empty"),
        ({"chosen": "yes", "rejected": "no"}, "no beginning in common"),
        ({"chosen": "So ", "rejected": "So yes"}, "the beginning of the other"),
        ({"chosen": [USER, YES], "rejected": [USER, YES]}, "chosen and rejected"),
        ({"chosen": [YES], "rejected": [NO]}, "no beginning in common"),
        ({"chosen": [USER, YES], "rejected": [USER]}, "rejected holds no answer"),
        ({"prompt": "?", "completion": "a"}, "expected chosen + rejected"),
    ],
)
def test_broken_pairs_are_named_by_line(tmp_path, row, said):
    good = {"prompt": [USER], "chosen": [YES], "rejected": [NO]}
    if isinstance(row.get("chosen"), str):
        good = {"prompt": "?", "chosen": "a", "rejected": "b"}
    rows = [good, row] if "chosen" in row else [row]
    with pytest.raises(DataError, match=rf"line {len(rows)}: .*{said.replace('+', '.')}"):
        read(tmp_path, *rows)


def test_pairs_are_no_rows_to_learn_by_heart(tmp_path):
    with pytest.raises(DataError, match="are of no known format"):
        read(tmp_path, {"prompt": "?", "chosen": "a", "rejected": "b"}, purpose="completions")


@pytest.mark.parametrize(
    ("row", "format", "prompt"),
    [
        ({"prompt": "What?", "completion": "Yes."}, "prompt", "What?"),
        ({"prompt": [USER]}, "chat_prompt", [USER]),
        ({"messages": [USER, YES, USER, NO]}, "messages", [USER, YES, USER]),
        ({"messages": [USER]}, "messages", [USER]),
        ({"question": "What?", "answer": "#### 7"}, "question", "Question: What?\nAnswer:"),
        (
            {
                "conversations": [
                    {"from": "human", "value": "What?"},
                    {"from": "gpt", "value": "No."},
                ]
            },
            "sharegpt",
            [USER],
        ),
    ],
)
def test_prompts_with_what_is_carried_along(tmp_path, row, format, prompt):
    row |= {"truth": {"n": 1.5}}
    rows, found = read(tmp_path, row, purpose="prompts", kept=("truth",))
    assert (found, rows.column_names) == (format, ["prompt", "truth"])
    made = rows[0]["prompt"]
    assert (made if isinstance(prompt, str) else json.loads(made)) == prompt
    assert json.loads(rows[0]["truth"]) == {"n": 1.5}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "What?"}, "field truth is missing"),
        ({"messages": [YES], "truth": 1}, "field messages holds no question"),
        ({"messages": [USER], "truth": 1, "tools": [{"name": "f"}]}, "field tools: prompts to"),
    ],
)
def test_broken_prompts_are_named_by_line(tmp_path, row, said):
    with pytest.raises(DataError, match=f"line 1: {said}"):
        read(tmp_path, row, purpose="prompts", kept=("truth",))
