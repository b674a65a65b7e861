"""`depthmix eval` on tiny models: prompts as in training, batches as singles, cache, overlap."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from depthmix.calibration.reliability import Reliability
from depthmix.cli import main
from depthmix.data.load import load_data
from depthmix.data.template import TEMPLATES
from depthmix.evaluate.harness import evaluate
from depthmix.evaluate.replies import ReplyFile
from depthmix.evaluate.tasks import known_tasks, local_task
from depthmix.provenance import versions
from models import attached

SOURCES = Path(__file__).parents[2] / "src"
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
        for a, b in zip(one_samples["boolq"], four_samples["boolq"], strict=True):
            assert a.pop("confidence") == pytest.approx(b.pop("confidence"), rel=1e-4)
            assert a == b
    else:
        for a, b in zip(one_samples["boolq"], four_samples["boolq"], strict=True):
            assert a["accuracy"] == b["accuracy"]
    assert one["boolq"]["accuracy"] == four["boolq"]["accuracy"]
    assert one["boolq"]["questions"] == 4
    assert "accuracy_stderr" in one["boolq"]


@pytest.mark.parametrize("scoring", ["generate", "likelihood"])
def test_confidence_is_the_probability_of_the_answer(tmp_path, model, tokenizer, scoring):
    task = local_task("boolq", write(tmp_path, "b.json", LABELS), None, None)
    figures, samples = evaluate(model, tokenizer, [task], scoring=scoring, max_new_tokens=5)
    for row in samples["boolq"]:
        if scoring == "generate":
            expected = probability(model, tokenizer, row["prompt"], row["replies"][0])
        else:
            weights = [math.exp(reply[0][0]) for reply in row["replies"]]
            expected = max(weights) / sum(weights)
        assert row["confidence"] == pytest.approx(expected, rel=1e-3)
    rows = samples["boolq"]
    found = Reliability.of([r["confidence"] for r in rows], [r["accuracy"] for r in rows])
    assert figures["boolq"]["ece"] == pytest.approx(found.error)


def probability(model, tokenizer, prompt, reply):
    before = tokenizer(prompt)["input_ids"]
    ids = torch.tensor([tokenizer(prompt + reply)["input_ids"]])
    with torch.no_grad():
        logs = model(input_ids=ids).logits[0].log_softmax(-1)
    places = range(len(before), ids.shape[1])
    return math.exp(sum(logs[t - 1, ids[0, t]].item() for t in places))


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
    picture = tmp_path / "r.png"
    arguments += ["--output", str(tmp_path / "out"), "--train-data", data, "--plot", str(picture)]
    assert main(arguments) == 0
    assert "6 of 6 questions stand in the training data" in capsys.readouterr().out
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["results"]["addsub"]["questions"] == 3
    assert results["made_by"]["versions"] == versions("lm_eval")
    rows = [json.loads(x) for x in (tmp_path / "out/samples-addsub.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert all(row["replies"] and row["prompt"].startswith("Below is") for row in rows)

    def no_generation(*_, **__):
        raise AssertionError("the replies are in the cache")

    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", no_generation)
    assert main(arguments) == 0
    assert json.loads((tmp_path / "out/results.json").read_text())["results"] == results["results"]


def test_a_log_holds_no_bars_and_nothing_of_git(tiny, tmp_path):
    """Asked for outside of any repository, with standard error in a pipe."""
    task = f"boolq={write(tmp_path, 'l.json', LABELS)}"
    flags = ["--tasks", task, "--max-new-tokens", "3", "--scoring"]
    for scoring in ("generate", "likelihood"):
        done = subprocess.run(
            [sys.executable, "-m", "depthmix", "eval", tiny, *flags, scoring],
            check=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(SOURCES), "GIT_CEILING_DIRECTORIES": "/"},
            capture_output=True,
            text=True,
        )
        assert "boolq" in done.stdout
        assert done.stderr == ""


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


@pytest.mark.parametrize(
    "torn", [b'["b", "half a li\n', b"\xff\n", b"5\n", b'["b"]\n', b"[1, 2]\n"]
)
def test_a_torn_line_among_replies_costs_that_reply_alone(tmp_path, torn):
    path = tmp_path / "replies.jsonl"
    path.write_bytes(b'["a", "x"]\n' + torn + b'["c", "y"]\n')
    assert dict(ReplyFile(path)) == {"a": "x", "c": "y"}
    assert path.read_bytes() == b'["a", "x"]\n["c", "y"]\n'


def test_generator_is_scored_by_its_own_verifier(tiny, tmp_path, monkeypatch):
    source = "reasoning_gym:chain_sum?size=3&seed=5&min_terms=2&max_terms=2"
    task = local_task(source, source, None, None)
    assert len(task.documents) == 3
    for document in task.documents:
        assert task.is_right(f" {document['answer']}\nMore.", document)
        assert not task.is_right("nonsense", document)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "mawps"], "give a file: mawps=FILE"),
        (["--tasks", "nope=rows.jsonl"], "unknown task nope; tasks are gsm8k"),
        (["--tasks", "arc_essy"], "has such a task; did you mean arc_easy?"),
        (["--tasks", "mawps=A", "mawps=B"], "--tasks: mawps is named 2 times"),
        (["--tasks", "mawps=A", "--tasks", "mawps=B"], "--tasks: mawps is named 2 times"),
        (["--tasks", "mawps=A", "--limit", "0"], "--limit must be an integer >= 1"),
    ],
)
def test_what_is_wrong_is_one_line(tiny, flags, message, capsys):
    assert main(["eval", tiny, *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("addsub", {**ALPACA[0], "output": "", "answer": None}, "no answer"),
        ("addsub", {**ALPACA[0], "answer": "many"}, "the answer 'many' holds no number"),
        ("boolq", {**LABELS[0], "answer": "maybe"}, "'maybe' is none of the labels true, false"),
    ],
)
def test_a_row_that_no_reply_can_answer_is_an_error(tiny, tmp_path, task, row, message, capsys):
    source = write(tmp_path, "t.jsonl", [ALPACA[0] if task == "addsub" else LABELS[0], row])
    assert main(["eval", tiny, "--tasks", f"{task}={source}"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error
    assert source in error
    assert "2" in error.split(source)[1]


@pytest.mark.parametrize("scoring", ["generate", "likelihood"])
def test_labels_are_read_alike_by_both_scorings(tmp_path, model, tokenizer, scoring):
    """As a file of the data set itself has them: true and false, not their names."""
    rows = [{**LABELS[0], "answer": answer} for answer in (False, True, "False", "TRUE")]
    task = local_task("boolq", write(tmp_path, "b.json", rows), None, None)
    assert [document["answer"] for document in task.documents] == ["false", "true"] * 2
    figures, _ = evaluate(model, tokenizer, [task], scoring=scoring, max_new_tokens=2)
    assert figures["boolq"]["questions"] == 4


def tuned(tiny, tmp_path, row, *flags):
    path, out = write(tmp_path, "train.jsonl", [row] * 4), str(tmp_path / "tuned")
    command = ["train", "--model_name_or_path", tiny, "--dataset", path, "--output_dir", out]
    assert main([*command, "--max_steps", "1", "--method", "none", "--disable_tqdm", *flags]) == 0
    return out


def prompts(target, tmp_path, *flags, task="gsm8k", rows=GSM8K):
    source, out = write(tmp_path, "test.jsonl", rows), tmp_path / "scores"
    command = ["eval", target, "--tasks", f"{task}={source}", "--max-new-tokens", "2"]
    assert main([*command, "--output", str(out), *flags]) == 0
    lines = (out / f"samples-{task}.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines]


CHAT_ROW = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}


@pytest.mark.parametrize("scoring", ["generate", "likelihood"])
def test_models_of_messages_are_asked_in_their_template(tiny, tmp_path, scoring):
    out = tuned(tiny, tmp_path, CHAT_ROW)
    rows = [{**LABELS[0], "input": "Think."}]
    asked = prompts(out, tmp_path, "--scoring", scoring, task="boolq", rows=rows)
    assert asked == ["<|user|>Is 0 even?\nThink.<|end|><|assistant|>"]
    asked = prompts(out, tmp_path, "--template", "question")
    assert asked[0] == "Question: Add 0 and 1.\nAnswer:"


def test_a_base_model_is_asked_in_its_template_on_request(tiny, tmp_path):
    asked = prompts(tiny, tmp_path, "--template", "chat")
    assert asked[0] == "<|user|>Add 0 and 1.<|end|><|assistant|>"


def test_a_checkpoint_is_asked_as_its_run(tiny, tmp_path):
    out = tuned(tiny, tmp_path, ALPACA[0], "--save_steps", "1")
    for target in (out, f"{out}/checkpoint-1"):
        assert prompts(target, tmp_path)[0] == TEMPLATES["alpaca"].prompt("Add 0 and 1.")


@pytest.mark.parametrize("chat", [False, True])
def test_prompts_have_the_tokens_of_training(tmp_path, model, tokenizer, monkeypatch, chat):
    """A tokenizer that puts BOS before and EOS behind every text; its template writes neither."""
    marks = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<|user|>", "<|end|>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A <|end|>", special_tokens=marks
    )
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}:"
    tokenizer.bos_token = "<|user|>"
    seen = []
    generate = model.generate

    def watched(**inputs):
        seen.append(tokenizer.decode(inputs["input_ids"][0]))
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", watched)
    template = "chat" if chat else "question"
    task = local_task("gsm8k", write(tmp_path, "g.jsonl", GSM8K[:1]), template, None)
    evaluate(model, tokenizer, [task], max_new_tokens=2, chat=chat)
    question = "Question: Add 0 and 1.\nAnswer:"
    assert seen == ["Add 0 and 1.:" if chat else f"<|user|>{question}"]


def test_replies_belong_to_weights_and_not_to_a_path(tiny, tmp_path, monkeypatch):
    """Moved weights keep their replies; other weights under the same path do not get them."""
    target, asked = tmp_path / "model", []
    shutil.copytree(tiny, target)
    generate = LlamaForCausalLM.generate

    def watched(self, **inputs):
        asked.append(1)
        return generate(self, **inputs)

    monkeypatch.setattr(LlamaForCausalLM, "generate", watched)
    prompts(str(target), tmp_path)
    assert asked
    asked.clear()
    moved = target.rename(tmp_path / "moved")
    prompts(str(moved), tmp_path)
    assert not asked
    shutil.copytree(moved, target)
    model = AutoModelForCausalLM.from_pretrained(target)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    model.save_pretrained(target)
    prompts(str(target), tmp_path)
    assert asked


def test_figures_as_json(tiny, tmp_path, capsys):
    source = write(tmp_path, "t.json", ALPACA)
    command = ["eval", tiny, "--tasks", f"addsub={source}", "--max-new-tokens", "2", "--json"]
    assert main([*command, "--train-data", source, "--output", str(tmp_path / "out")]) == 0
    assert json.loads(capsys.readouterr().out)["addsub"]["questions"] == 6


def test_all_tasks_of_the_paper_are_there():
    assert len(known_tasks()) == 15
