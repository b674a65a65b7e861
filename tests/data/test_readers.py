"""What is read is what was written, from every kind of source."""

import bz2
import gzip
import json
import lzma

import pytest
from datasets import Dataset, load_dataset

from depthmix.data.files import read_items
from depthmix.data.load import Source, load_data, load_source
from depthmix.errors import DataError

PAIR = {"prompt": "2 + 2 =", "completion": " 4"}


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    return str(path)


def pair(number):
    return {"prompt": f"{number} + 0 =", "completion": f" {number}"}


def call(arguments):
    function = {"name": "f", "arguments": arguments}
    return {
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "tool_calls": [{"type": "function", "function": function}]},
        ]
    }


EXACT = [
    {"date": "2024-05-01"},  # no date
    {"text": "42", "number": 42},  # no number
    {"share": 0.12345678901234567, "none": None},
    {"share": "0.5", "list": [1, "a", {"b": []}]},
    {"large": 2**70, "small": -(2**63)},
    {"empty": {}, "nested": {"a": {"b": {"c": [None, True, 1.5]}}}},
]


def test_tool_calls_and_tools_are_as_they_were_written(tmp_path):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    rows = [{**call(arguments), "tools": [tool]} for arguments in EXACT]
    rows[0].pop("tools")
    loaded, format = load_source(Source([lines(tmp_path / "rows.jsonl", rows)]))
    assert format == "messages"
    assert [json.loads(text) for text in loaded["messages"]] == [row["messages"] for row in rows]
    assert list(loaded["tools"]) == [None] + [json.dumps([tool])] * 5
    array = tmp_path / "rows.json"
    array.write_text(json.dumps(rows, indent=2))
    assert load_source(Source([str(array)]))[0]["messages"] == loaded["messages"]


def test_the_reader_of_json_of_datasets_would_change_them(tmp_path):
    """Why JSON is read as text: see `readers`."""
    path = lines(
        tmp_path / "rows.jsonl", [{"completion": "2024-05-01", "list": [{"a": 0.1 + 0.2}]}]
    )
    changed = load_dataset("json", data_files=path, split="train")[0]
    assert changed["completion"] != "2024-05-01"


def test_a_typed_table_brings_no_keys_of_its_own(tmp_path):
    rows = [call({"city": "Rome"}), call({"day": 3})]
    path = tmp_path / "rows.parquet"
    Dataset.from_list(rows).to_parquet(path)
    loaded, _ = load_source(Source([str(path)]))
    assert [json.loads(text) for text in loaded["messages"]] == [row["messages"] for row in rows]


@pytest.mark.parametrize(("suffix", "module"), [("gz", gzip), ("bz2", bz2), ("xz", lzma)])
def test_compressed_shards_of_a_folder_are_read(tmp_path, suffix, module):
    lines(tmp_path / "train-0.jsonl", [pair(0)])
    with module.open(tmp_path / f"train-1.jsonl.{suffix}", "wt") as file:
        file.write(json.dumps(pair(1)))
    assert load_data([str(tmp_path)])[0].to_list() == [pair(0), pair(1)]


def test_compressed_arrays_and_tables(tmp_path):
    with gzip.open(tmp_path / "a.json.gz", "wt") as file:
        json.dump([pair(0), pair(1)], file)
    with gzip.open(tmp_path / "b.csv.gz", "wt") as file:
        file.write("prompt,completion\n2 + 0 =, 2\n")
    names = [str(tmp_path / "a.json.gz"), str(tmp_path / "b.csv.gz")]
    assert load_data(names)[0].to_list() == [pair(0), pair(1), pair(2)]


def test_tables_with_tabs_and_arrow(tmp_path):
    (tmp_path / "a.tsv").write_text("prompt\tcompletion\n0 + 0 =\t 0\n1\t1,5\n")
    assert load_data([str(tmp_path / "a.tsv")])[0].to_list() == [
        pair(0),
        {"prompt": "1", "completion": "1,5"},
    ]
    Dataset.from_list([pair(3)]).save_to_disk(tmp_path / "saved")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    assert load_data([str(arrow)])[0].to_list() == [pair(3)]


def test_shards_whose_columns_differ(tmp_path):
    names = []
    for number, more in enumerate(({}, {"note": 3})):
        names.append(str(tmp_path / f"train-{number}.parquet"))
        Dataset.from_list([{**pair(number), **more}]).to_parquet(names[-1])
    with pytest.raises(DataError, match=r"train-0\.parquet and 1 more: their columns differ"):
        load_data([str(tmp_path)])
    assert load_data(names)[0].to_list() == [pair(0), pair(1)]


def test_patterns_and_names_that_look_like_one(tmp_path, monkeypatch):
    lines(tmp_path / "a" / "x.jsonl", [pair(0)])
    lines(tmp_path / "b" / "y[1].jsonl", [pair(1)])
    assert load_data([str(tmp_path / "**" / "*.jsonl")])[0].to_list() == [pair(0), pair(1)]
    assert load_data([str(tmp_path / "b" / "y[1].jsonl")])[0].to_list() == [pair(1)]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_data(["~/a/x.jsonl"])[0]) == 1
    with pytest.raises(DataError, match=r"z\*\.jsonl: No such file"):
        load_data([str(tmp_path / "z*.jsonl")])


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train[:3]", [0, 1, 2]),
        ("train[-2:]", [8, 9]),
        ("train[:20%]+train[90%:]", [0, 1, 9]),
        ("train[2:4]", [2, 3]),
        ("train", list(range(10))),
    ],
)
def test_slices_of_files(tmp_path, split, numbers):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([pair(n) for n in range(10)]))
    assert load_data([str(path)], split=split)[0].to_list() == [pair(n) for n in numbers]
    items = list(read_items([str(path)], split, None))
    assert [item.row for item in items] == [pair(n) for n in numbers]


def test_slices_count_rows_and_not_blank_lines(tmp_path):
    (tmp_path / "train.jsonl").write_text("\n\n".join(json.dumps(pair(n)) for n in range(3)))
    lines(tmp_path / "test.jsonl", [pair(7)])
    rows, _ = load_data([str(tmp_path)], split="train[1:]+test")
    assert rows.to_list() == [pair(1), pair(2), pair(7)]


@pytest.mark.parametrize("split", ["train[:5", "train[a:b]", "[:3]", "train[:120%]", ""])
def test_wrong_splits(tmp_path, split):
    path = lines(tmp_path / "rows.jsonl", [PAIR])
    with pytest.raises(DataError, match="split"):
        load_data([path], split=split)


def test_a_file_that_changes_is_read_anew(tmp_path):
    path = tmp_path / "rows.jsonl"
    for number in range(3):
        lines(path, [pair(number)] * (number + 1))
        assert load_data([str(path)])[0].to_list() == [pair(number)] * (number + 1)


def test_broken_rows_are_named_in_the_right_file(tmp_path):
    good = lines(tmp_path / "train-0.jsonl", [PAIR, PAIR])
    (tmp_path / "train-1.jsonl").write_text(f"{json.dumps(PAIR)}\n\n{{}}\n")
    with pytest.raises(DataError, match=r"train-1\.jsonl: line 3: field prompt is missing$"):
        load_data([str(tmp_path)])
    with pytest.raises(DataError, match=r"train-1\.jsonl: line 3: field prompt is missing$"):
        load_data([str(tmp_path)])  # out of the cache
    assert len(load_data([good])[0]) == 2


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"prompt": "a", "completion": "b \\ud83d c"}', r"line 1: field completion holds half of"),
        (
            '{"prompt": "a", "completion": ' + "9" * 5000 + "}",
            "line 1: not valid JSON: a number of",
        ),
        ('{"prompt": "a", "completion": ' + "[" * 99999 + "}", "line 1: not valid JSON: .*deep"),
        ('{"prompt": "a", "completion": NaN}', "line 1: field completion must be a text"),
    ],
)
def test_what_python_or_arrow_cannot_hold(tmp_path, text, complaint):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=complaint):
        load_data([str(path)])
    path = tmp_path / "rows.json"
    path.write_text(f"[{text}]")
    with pytest.raises(
        DataError, match=complaint.replace("line 1: ", "").replace("field", ".*field")
    ):
        load_data([str(path)])


def test_a_hub_data_set_is_asked_for_its_split(monkeypatch):
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return Dataset.from_list([pair(0), pair(1)])

    monkeypatch.setattr("datasets.load_dataset", load)
    rows, _ = load_data(["owner/name"], split="train[:2]", config="main")
    assert rows.to_list() == [pair(0), pair(1)]
    assert asked == [("owner/name", "main", "train[:2]")]
