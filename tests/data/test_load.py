"""Loading, recognising and checking training rows."""

import json

import pytest
from datasets import Dataset

from depthmix.data.formats import prompt_for
from depthmix.data.load import load_data
from depthmix.data.template import TEMPLATES
from depthmix.errors import DataError

PAIR = {"prompt": "2 + 2 =", "completion": " 4"}
ALPACA = {"instruction": "Add. ", "input": "", "output": "\nA: 2 + 2 = 4.", "answer": "4"}
QUESTION = {"question": "Half of 48?", "answer": "48/2 = <<48/2=24>>24 clips.\n#### 24"}
CHAT = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]


def write_json(path, rows):
    path.write_text(json.dumps(rows, indent=4))
    return str(path)


def write_lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def write_csv(path, rows):
    Dataset.from_list(rows).to_csv(path, index=False)
    return str(path)


def write_parquet(path, rows):
    Dataset.from_list(rows).to_parquet(path)
    return str(path)


WRITERS = {
    "json": write_json,
    "jsonl": write_lines,
    "csv": write_csv,
    "parquet": write_parquet,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    path = WRITERS[kind](tmp_path / f"rows.{kind}", [PAIR, {**PAIR, "completion": " vier\n"}])
    data, format = load_data([path])
    assert format == "prompt_completion"
    assert data.to_list() == [PAIR, {**PAIR, "completion": " vier\n"}]


@pytest.mark.parametrize(
    ("row", "format", "converted"),
    [
        (PAIR, "prompt_completion", PAIR),
        (
            {"prompt": CHAT[:1], "completion": CHAT[1:], "source": 3},
            "chat_completion",
            {"prompt": CHAT[:1], "completion": CHAT[1:]},
        ),
        ({"messages": CHAT}, "messages", {"messages": CHAT}),
        ({"text": "Once."}, "text", {"text": "Once."}),
        (
            ALPACA,
            "alpaca",
            {
                "prompt": "Below is an instruction that describes a task. Write a response that "
                "appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Response:\n",
                "completion": "A: 2 + 2 = 4.",
            },
        ),
        (
            QUESTION,
            "question",
            {
                "prompt": "Question: Half of 48?\nAnswer:",
                "completion": " 48/2 = 24 clips.\n#### 24",
            },
        ),
    ],
)
def test_formats_are_recognised_and_converted(tmp_path, row, format, converted):
    data, found = load_data([write_lines(tmp_path / "rows.jsonl", [row])])
    assert found == format
    assert data.to_list() == [converted]


def test_an_alpaca_input_stands_in_the_prompt(tmp_path):
    rows = [{"instruction": "Add.", "input": "2 and 2", "output": "4"}]
    data, _ = load_data([write_json(tmp_path / "rows.json", rows)])
    assert data[0]["prompt"] == TEMPLATES["alpaca"].prompt("Add.", "2 and 2")
    assert "### Input:\n2 and 2\n\n### Response:\n" in data[0]["prompt"]


def test_prompts_to_generate_with_are_those_of_training(tmp_path):
    for row, format, text in ((ALPACA, "alpaca", "Add."), (QUESTION, "question", "Half of 48?")):
        data, _ = load_data([write_lines(tmp_path / "rows.jsonl", [row])])
        assert prompt_for(text, format) == data[0]["prompt"]
    assert prompt_for("as it is", "text") == "as it is"
    assert TEMPLATES["question"].prompt("x") == "Question: x\nAnswer:"


def test_json_lines_in_a_json_file(tmp_path):
    assert len(load_data([write_lines(tmp_path / "rows.json", [PAIR, PAIR])])[0]) == 2


def test_byte_order_mark_is_no_data(tmp_path):
    for name, text in (("a.jsonl", json.dumps(PAIR)), ("b.csv", "text\nOnce.")):
        (tmp_path / name).write_text(f"\ufeff{text}")
        assert len(load_data([str(tmp_path / name)])[0]) == 1


def test_several_files_and_a_folder(tmp_path):
    write_lines(tmp_path / "train-00000.jsonl", [PAIR])
    write_json(tmp_path / "train.json", [PAIR, PAIR])
    write_lines(tmp_path / "test.jsonl", [PAIR])
    write_lines(tmp_path / "training_notes.jsonl", [{"other": 1}])
    assert len(load_data([str(tmp_path)])[0]) == 3
    assert len(load_data([str(tmp_path)], split="test")[0]) == 1
    files = [str(tmp_path / "train.json"), str(tmp_path / "test.jsonl")]
    assert len(load_data(files)[0]) == 3
    with pytest.raises(DataError, match=r"no file validation\.\*"):
        load_data([str(tmp_path)], split="validation")


def test_format_and_text_field_can_be_named(tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [{**PAIR, "text": "Once."}])
    assert load_data([path], format="text")[0].to_list() == [{"text": "Once."}]
    path = write_lines(tmp_path / "rows.jsonl", [{"content": "Once."}])
    data, format = load_data([path], text_field="content")
    assert (data.to_list(), format) == ([{"content": "Once."}], "text")


@pytest.mark.parametrize(
    ("good", "bad", "complaint"),
    [
        (PAIR, {"prompt": "2 ="}, "field completion is missing"),
        (PAIR, {"prompt": "2 =", "completion": " "}, "field completion is empty"),
        (PAIR, {"prompt": "2 =", "completion": 4}, "field completion must be a text, not a number"),
        (PAIR, {"prompt": CHAT, "completion": "4"}, "field prompt must be a text, not a list"),
        (PAIR, [1, 2], "a row must be an object with named fields, not a list"),
        (ALPACA, {**ALPACA, "output": ""}, "field output is empty"),
        (ALPACA, {**ALPACA, "input": 3}, "field input must be a text, not a number"),
        (QUESTION, {"question": "?", "answer": None}, "field answer is missing"),
        ({"messages": CHAT}, {"messages": []}, "field messages must be a list of messages"),
        ({"messages": CHAT}, {"messages": CHAT[:1]}, "holds no answer of the assistant"),
        ({"messages": CHAT}, {"messages": ["hi"]}, "message 1: must be an object"),
        ({"messages": CHAT}, {"messages": [{"role": "user"}]}, "message 1: field content is miss"),
    ],
)
def test_a_broken_row_names_file_line_and_field(tmp_path, good, bad, complaint):
    path = write_lines(tmp_path / "rows.jsonl", [good, good, bad])
    with pytest.raises(DataError) as raised:
        load_data([path])
    assert str(raised.value).startswith(f"{path}: line 3: ")
    assert complaint in str(raised.value)


def test_tool_calls_need_no_content(tmp_path):
    call = {"role": "assistant", "tool_calls": [{"name": "add"}]}
    tools = [{"name": "add"}]
    row = {"messages": [CHAT[0], call], "tools": tools}
    data, _ = load_data([write_lines(tmp_path / "rows.jsonl", [row])])
    assert data[0]["tools"] == tools


def test_bad_json_names_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{json.dumps(PAIR)}\n\n{{"prompt": "a",\n')
    with pytest.raises(DataError, match=r"rows.jsonl: line 3: not valid JSON"):
        load_data([str(path)])
    path = tmp_path / "rows.json"
    path.write_text('[\n{"prompt": "a"},\n]')
    with pytest.raises(DataError, match=r"rows.json: line \d: not valid JSON"):
        load_data([str(path)])


def test_first_line_broken(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("oops")
    with pytest.raises(DataError, match=r"rows.jsonl: line 1: not valid JSON"):
        load_data([str(path)])


def test_bytes_that_are_no_text(tmp_path):
    for name in ("a.json", "a.jsonl", "a.csv"):
        (tmp_path / name).write_bytes(b'["text\n\xff\xfe"]' if name == "a.json" else b"\xff\n")
        with pytest.raises(DataError, match=f"{name}.*(UTF-8|CSV)"):
            load_data([str(tmp_path / name)])


def test_csv_problems_name_the_line(tmp_path):
    path = tmp_path / "rows.csv"
    for text, complaint in (
        ('prompt,completion\n"a\nb",c\n\nd\n', "line 5: field completion is empty"),
        ("prompt,completion\na,b\nc\nd,e,f\n", "line 4: more cells than the header has columns"),
        ("prompt,completion\na,b,c\nd,e,f\n", "line 2: more cells than the header has columns"),
        ("prompt,prompt\na,b\n", "line 1: the column 'prompt' is named twice"),
        ('prompt,completion\na,"b\n', "cannot be read as csv: .* EOF inside string"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=rf"rows\.csv: {complaint}"):
            load_data([str(path)])


def test_a_broken_parquet_file(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"rows.parquet: cannot be read as parquet: "):
        load_data([str(path)])


def test_the_first_problems_and_how_many_more(tmp_path):
    rows = [PAIR] + [{"prompt": "a", "completion": ""}] * 8
    first = write_json(tmp_path / "a.json", rows)
    second = write_json(tmp_path / "b.json", rows)
    with pytest.raises(DataError) as raised:
        load_data([first, second])
    message = str(raised.value)
    assert message.startswith(f"{first}: row 2: field completion is empty; row 3: ")
    assert message.count("is empty") == 5
    assert message.endswith("; and 11 more")


def test_unknown_columns_name_what_is_expected(tmp_path):
    path = write_json(tmp_path / "rows.json", [{"original_text": "a", "ans": 2.0}])
    with pytest.raises(DataError, match=r"columns original_text, ans .* instruction \+ output"):
        load_data([path])


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        (["missing.jsonl"], "missing.jsonl: No such file"),
        (["no-such-owner/no-such-data"], "neither a file or folder here nor readable from the hub"),
        (["missing.jsonl", "other.jsonl"], "missing.jsonl: No such file"),
    ],
)
def test_missing_sources(source, complaint, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=complaint):
        load_data(source)


def test_wrong_kind_of_file_and_no_rows(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"notes.txt: expected a file of type .json"):
        load_data([str(tmp_path / "notes.txt")])
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="there are no rows"):
        load_data([str(tmp_path / "empty.jsonl")])
