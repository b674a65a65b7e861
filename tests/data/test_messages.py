"""Conversations: messages, parts, ShareGPT, tools; and columns of other names."""

import json

import pytest

from depthmix.data.formats import Columns
from depthmix.data.load import Source, load_data, load_source
from depthmix.errors import ConfigError, DataError

USER, ASSISTANT = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
CHAT = [USER, ASSISTANT]


def lines(path, *rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def part(text):
    return [{"type": "text", "text": text}]


def messages(path):
    return [json.loads(text) for text in load_source(Source([path]))[0]["messages"]]


def test_sharegpt(tmp_path):
    call = {"name": "f", "arguments": {"a": 1}}
    row = {
        "system": "Be short.",
        "conversations": [
            {"from": "human", "value": "x"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "y"},
        ],
        "tools": json.dumps([{"name": "f"}]),
    }
    rows, format = load_source(Source([lines(tmp_path / "rows.jsonl", row)]))
    assert format == "sharegpt"
    assert json.loads(rows[0]["messages"]) == [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "x"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": call}],
        },
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "y"},
    ]
    assert json.loads(rows[0]["tools"]) == [{"name": "f"}]


def test_content_as_parts_is_joined(tmp_path):
    chat = [{"role": "user", "content": [*part("2 + "), *part("2?")]}, ASSISTANT]
    assert messages(lines(tmp_path / "a.jsonl", {"messages": chat})) == [CHAT]


def test_messages_in_a_cell_of_a_table(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_text("messages\n" + json.dumps(CHAT).replace('"', '""').join('""') + "\n")
    assert messages(str(path)) == [CHAT]


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"messages": [{**USER, "role": "usr"}, ASSISTANT]}, "'usr' is no role; did you mean user"),
        ({"messages": [USER, {**ASSISTANT, "content": " "}]}, "message 2: field content is empty"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "content is missing"),
        ({"messages": [{**USER, "content": part("x")}, ASSISTANT]}, "a text as in the first row"),
        ({"messages": [USER, ASSISTANT, {"role": "tool", "content": [3]}]}, "not a number"),
        (
            {"messages": [USER, ASSISTANT, {"role": "tool", "content": [{"type": "image"}]}]},
            "a part must be of type text, not image",
        ),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": "f"}]}, "tool_calls must be a list"),
        ({"messages": CHAT, "tools": {"a": 1}}, "field tools must be a list, not an object"),
        ({"messages": [{**USER, "name": "\ud83d"}, ASSISTANT]}, "messages holds half of a surr"),
        ({"messages": [{**USER, "n": float("nan")}, ASSISTANT]}, "holds NaN or an infinite number"),
    ],
)
def test_broken_messages(tmp_path, row, complaint):
    path = lines(tmp_path / "rows.jsonl", {"messages": CHAT}, row)
    with pytest.raises(DataError, match=f"line 2: .*{complaint}"):
        load_data([path])


def test_a_speaker_that_nobody_knows(tmp_path):
    row = {"conversations": [{"from": "humn", "value": "x"}, {"from": "gpt", "value": "y"}]}
    with pytest.raises(DataError, match=r"line 1: .*message 1: field from: 'humn' is no speaker"):
        load_data([lines(tmp_path / "rows.jsonl", row)])


def test_columns_of_other_names(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"q": "x", "a": "y", "text": "z", "messages": 3})
    columns = Columns(prompt="q", completion="a")
    rows, format = load_source(Source([path], columns=columns))
    assert (format, rows.to_list()) == ("prompt_completion", [{"prompt": "x", "completion": "y"}])
    path = lines(tmp_path / "b.jsonl", {"chat": CHAT, "text": "z"})
    rows, format = load_source(Source([path], columns=Columns(messages="chat")))
    assert (format, json.loads(rows[0]["messages"])) == ("messages", CHAT)
    path = lines(tmp_path / "c.jsonl", {"q": "x", "a": "y"}, {"q": "x", "a": ""})
    with pytest.raises(DataError, match="line 2: field a is empty"):
        load_source(Source([path], columns=columns))
    path = lines(tmp_path / "d.jsonl", {"prompt": "x", "completion": "y"})
    with pytest.raises(DataError, match=r"line 1: the columns prompt, completion .* q \+ a"):
        load_source(Source([path], columns=columns))


def test_several_sources(tmp_path):
    def pairs(name, count):
        rows = [{"prompt": name, "completion": f"{n}"} for n in range(count)]
        return lines(tmp_path / f"{name}.jsonl", *rows)

    names = [pairs("a", 30), pairs("b", 10)]
    assert load_source(Source(names))[0]["prompt"][:] == ["a"] * 30 + ["b"] * 10
    mixed, _ = load_source(Source(names, weights=[1.0, 4.0], seed=3))
    again, _ = load_source(Source(names, weights=[1.0, 4.0], seed=3))
    prompts = mixed["prompt"][:]
    assert again["prompt"][:] == prompts
    assert 0.6 < prompts.count("b") / len(prompts) < 0.95
    for name, count in (("a", 30), ("b", 10)):
        found = {row["completion"] for row in mixed if row["prompt"] == name}
        assert found == {f"{n}" for n in range(count)}
    with pytest.raises(ConfigError, match="1 weights for 2 sources"):
        load_source(Source(names, weights=[1.0]))


def test_tools_of_few_rows_outlive_a_mixture(tmp_path):
    plain, tools = {"messages": CHAT}, {"messages": CHAT, "tools": [{"name": "f"}]}
    names = [lines(tmp_path / "a.jsonl", *[plain] * 6), lines(tmp_path / "b.jsonl", plain, tools)]
    mixed, _ = load_source(Source(names, weights=[1.0, 1.0]))
    assert json.dumps([{"name": "f"}]) in mixed["tools"][:]
    mixed, _ = load_source(Source(names[:1] * 2, weights=[1.0, 1.0]))
    assert mixed.column_names == ["messages"]


def test_sources_that_would_be_prompted_in_different_ways(tmp_path):
    question = lines(tmp_path / "a.jsonl", {"question": "x", "answer": "y"})
    alpaca = lines(tmp_path / "b.jsonl", {"instruction": "x", "output": "y"})
    with pytest.raises(ConfigError, match=r"is question, .* is alpaca"):
        load_source(Source([question, alpaca]))
    rows, _ = load_source(Source([question, alpaca], template="question"))
    assert len(set(rows["prompt"])) == 1
    chat = lines(tmp_path / "c.jsonl", {"messages": CHAT})
    with pytest.raises(ConfigError, match="prompted in different ways"):
        load_source(Source([question, chat], template="question"))


@pytest.mark.parametrize("answer", ["", " ", "nan", None, float("nan")])
def test_questions_without_an_answer_to_score_by(tmp_path, answer):
    from depthmix.data.load import load_questions

    row = {"instruction": "x", "input": "", "output": "", "answer": answer}
    path = lines(tmp_path / "rows.jsonl", {**row, "answer": "3"}, row)
    with pytest.raises(DataError, match="line 2: there is no answer to score by"):
        load_questions([path])


def test_an_answer_that_is_no_number_is_not_trained_on(tmp_path):
    row = {"original_text": "x", "equation": "X=1", "ans": float("nan")}
    with pytest.raises(DataError, match="line 1: field ans must be a number, not nan"):
        load_data([lines(tmp_path / "a.jsonl", row)])
    with pytest.raises(DataError, match="line 1: field answer is empty"):
        load_data([lines(tmp_path / "b.jsonl", {"question": "x", "answer": "nan"})])
