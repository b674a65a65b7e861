"""`depthmix eval` on tiny models: prompts as in training, batches as singles, cache, overlap."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from depthmix.cli import main
from depthmix.data.load import load_data
from depthmix.evaluate.harness import evaluate
from depthmix.evaluate.replies import ReplyFile
from depthmix.evaluate.tasks import known_tasks, local_task
from models import attached

ALPACA = [
    {
        "instruction": f"What is {i} plus {i} ?",
        "input": "",
        "output": f"{i + i}",
        "answer": f"{2 * i}.0",
    }
    for i in range(6)
]
GSM8K = [
    {"question": f"Add {i} and 1.", "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1}"}
    for i in range(4)
]
MAWPS = [
    {"id": i, "original_text": f"Sam has {i} .", "equation": f"X=({i}.0+1.0)", "ans": i + 1.0}
    for i in range(4)
]
LABELS = [
    {
        "instruction": f"Is {i} even?",
        "input": "",
        "output": "the correct answer is true",
        "answer": "true",
    }
    for i in range(4)
]


def write(tmp_path, name, rows):
    path = tmp_path / name
    text = "\n".join(map(json.dumps, rows)) if name.endswith("l") else json.dumps(rows)
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize(
    ("name", "rows", "task"),
    [("a.json", ALPACA, "addsub"), ("g.jsonl", GSM8K, "gsm8k"), ("m.json", MAWPS, "mawps")],
)
@pytest.mark.parametrize("template", [None, "alpaca", "question"])
def test_prompts_are_those_of_training_byte_for_byte(tmp_path, name, rows, task, template):
    source = write(tmp_path, name, rows)
    training, _ = load_data([source], template=template)
    documents = local_task(task, source, template, None).documents
    assert [d["prompt"].encode() for d in documents] == [r["prompt"].encode() for r in training]
    if rows is not LABELS:
        assert documents[0]["answer"] in ("0.0", "1")


@pytest.fixture
def model(tiny):
    torch.manual_seed(0)
    return attached(AutoModelForCausalLM.from_pretrained(tiny).eval(), k=3)


@pytest.fixture
def tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny)


@pytest.mark.parametrize("scoring", ["generate", "likelihood"])
def test_batch_gives_what_singles_give(tmp_path, model, tokenizer, scoring):
    rows = [{**row, "instruction": row["instruction"] * (i + 1)} for i, row in enumerate(LABELS)]
    task = local_task("boolq", write(tmp_path, "b.json", rows), None, None)
    found = [
        evaluate(model, tokenizer, [task], batch_size=size, scoring=scoring, max_new_tokens=6)
        for size in (1, 4)
    ]
    (one, one_samples), (four, four_samples) = found
    if scoring == "generate":
        assert one_samples == four_samples
    else:
        for a, b in zip(one_samples["boolq"], four_samples["boolq"], strict=True):
            assert a["accuracy"] == b["accuracy"]
    assert one["boolq"]["accuracy"] == four["boolq"]["accuracy"]
    assert one["boolq"]["questions"] == 4
    assert "accuracy_stderr" in one["boolq"]


def test_overlapping_questions_are_not_clean(tmp_path, model, tokenizer):
    train = [{**ALPACA[0], "instruction": "what is 0 PLUS 0.0?"}, ALPACA[3]]
    task = local_task(
        "addsub", write(tmp_path, "t.json", ALPACA), None, [write(tmp_path, "train.json", train)]
    )
    assert [d["clean"] for d in task.documents] == [False, True, True, False, True, True]
    figures, samples = evaluate(model, tokenizer, [task], max_new_tokens=2)
    assert figures["addsub"]["questions"] == 6
    assert figures["addsub"]["clean_questions"] == 4
    assert [row["clean"] for row in samples["addsub"]] == [d["clean"] for d in task.documents]


def test_command_scores_writes_and_reuses_replies(tiny, tmp_path, capsys, monkeypatch):
    data = write(tmp_path, "t.json", ALPACA)
    arguments = ["eval", tiny, "--tasks", f"addsub={data}", "--limit", "3", "--max-new-tokens", "4"]
    arguments += ["--output", str(tmp_path / "out"), "--train-data", data]
    assert main(arguments) == 0
    assert "6 of 6 questions stand in the training data" in capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["results"]["addsub"]["questions"] == 3
    assert results["made_by"]["versions"]["lm_eval"]
    rows = [json.loads(x) for x in (tmp_path / "out/samples-addsub.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert all(row["replies"] and row["prompt"].startswith("Below is") for row in rows)

    def no_generation(*_, **__):
        raise AssertionError("the replies are in the cache")

    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", no_generation)
    assert main(arguments) == 0
    assert json.loads((tmp_path / "out/results.json").read_text())["results"] == results["results"]


def test_replies_survive_a_process_that_is_killed(tmp_path):
    path = tmp_path / "cache" / "replies.jsonl"
    replies = ReplyFile(path)
    replies["a"], replies["b"] = "text\n", (-1.5, True)
    with path.open("ab") as file:
        file.write(b'["c", "half a li')
    again = ReplyFile(path)
    assert dict(again) == {"a": "text\n", "b": [-1.5, True]}
    again["d"] = "more"
    assert list(ReplyFile(path)) == ["a", "b", "d"]


def test_generator_is_scored_by_its_own_verifier(tiny, tmp_path, monkeypatch):
    source = "reasoning_gym:chain_sum?size=3&seed=5&min_terms=2&max_terms=2"
    task = local_task(source, source, None, None)
    assert len(task.documents) == 3
    for document in task.documents:
        assert task.is_right(f" {document['answer']}\nMore.", document)
        assert not task.is_right("nonsense", document)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("mawps", "give a file: mawps=FILE"),
        ("nope=rows.jsonl", "unknown task nope; tasks are gsm8k"),
    ],
)
def test_wrong_task_is_one_line(tiny, task, message, capsys):
    assert main(["eval", tiny, "--tasks", task]) == 2
    assert message in capsys.readouterr().err


def test_all_tasks_of_the_paper_are_there():
    assert len(known_tasks()) == 15
