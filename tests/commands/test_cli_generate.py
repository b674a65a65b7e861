"""`depthmix generate` and `depthmix chat`: what a tuned model says."""

import io
import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import depthmix
from depthmix.cli import main
from depthmix.data.template import TEMPLATES

alpaca_prompt = TEMPLATES["alpaca"].prompt


def greedy(tiny, adapter, ids, new_tokens):
    """Complete by the plain API, without a cache."""
    model = depthmix.load(AutoModelForCausalLM.from_pretrained(tiny), adapter).eval()
    for _ in range(new_tokens):
        ids = [*ids, int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids


def test_completes_a_prompt_as_the_model_does(tiny, adapter, capsys):
    assert main(["generate", adapter, "--prompt", "What is 3 + 4?", "--max-new-tokens", "6"]) == 0
    said = capsys.readouterr().out.strip()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    prompt = tokenizer("What is 3 + 4?")["input_ids"]
    completed = greedy(tiny, adapter, prompt, 6)[len(prompt) :]
    if tokenizer.eos_token_id in completed:
        completed = completed[: completed.index(tokenizer.eos_token_id)]
    assert said == tokenizer.decode(completed).strip()


def test_several_prompts_give_what_each_gives_alone(adapter, tmp_path, capsys):
    prompts = ["What is 3 + 4?", "What is 3?", "The answer is 7. What is 3 + 4 + 4?"]
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n".join(prompts))
    limit = ["--max-new-tokens", "5"]
    assert (
        main(["generate", adapter, "--prompts-file", str(path), "--batch-size", "2", *limit]) == 0
    )
    together = capsys.readouterr().out.splitlines()
    alone = []
    for number, prompt in enumerate(prompts, 1):
        assert main(["generate", adapter, "--prompt", prompt, *limit]) == 0
        alone.append(f"[{number}] {capsys.readouterr().out.strip()}".strip())
    assert [line.strip() for line in together] == alone


def test_sampling_follows_the_seed(adapter, capsys):
    def sample(seed):
        flags = ["--temperature", "5", "--top-p", "0.95", "--seed", seed, "--max-new-tokens", "8"]
        assert main(["generate", adapter, "--prompt", "What", *flags]) == 0
        return capsys.readouterr().out

    assert sample("1") == sample("1")
    assert len({sample(seed) for seed in "123"}) > 1


def test_routing_is_shown(adapter, capsys):
    flags = ["--show-routing", "--max-new-tokens", "3"]
    assert main(["generate", adapter, "--prompt", "What", *flags]) == 0
    line = next(x for x in capsys.readouterr().err.splitlines() if x.startswith("routing: layer 2"))
    weights = [float(part.split(": ")[1]) for part in line.removeprefix("routing: ").split(", ")]
    assert sum(weights) == pytest.approx(1, abs=2e-3)


def test_the_prompt_takes_the_form_of_the_training_data(adapter, prompt_seen, tmp_path):
    command = ["generate", adapter, "--prompt", "Add."]
    assert main(command) == 0
    assert main([*command, "--format", "alpaca"]) == 0
    assert main([*command, "--format", "messages"]) == 0
    assert prompt_seen == ["Add.", alpaca_prompt("Add."), "<|user|>Add.<|end|><|assistant|>"]


def test_the_form_is_recorded_by_training(tiny, tmp_path, prompt_seen):
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps([{"instruction": "Add.", "input": "", "output": "4"}]))
    out = str(tmp_path / "out")
    command = ["train", "--model_name_or_path", tiny, "--dataset", str(path), "--output_dir", out]
    assert main([*command, "--max_steps", "1", "--method", "none", "--disable_tqdm"]) == 0
    assert (
        yaml.safe_load((tmp_path / "out/depthmix.yaml").read_text())["dataset_format"] == "alpaca"
    )
    assert main(["generate", out, "--prompt", "Add."]) == 0
    assert prompt_seen == [alpaca_prompt("Add.")]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_full_and_plain_models_work_too(method, tiny, rows, tmp_path, capsys, recwarn):
    out = str(tmp_path / "out")
    command = ["train", "--model_name_or_path", tiny, "--dataset", rows, "--output_dir", out]
    plain = ["--no_mode"] if method == "lora" else []
    flags = ["--max_steps", "1", "--method", method, "--disable_tqdm", *plain]
    assert main([*command, *flags]) == 0
    assert main(["generate", out, "--prompt", "What", "--max-new-tokens", "3"]) == 0
    if plain:
        assert main(["generate", out, "--prompt", "What", "--show-routing"]) == 2
        assert "holds no MoDE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "status", "complaint"),
    [
        (
            ["none", "--prompt", "x"],
            1,
            "none: there is no such folder, and no such model in the cache",
        ),
        (["none", "--model", "{tiny}", "--prompt", "x"], 1, "none: there is no such folder"),
        (["{tmp}", "--prompt", "x"], 1, "neither adapter_config.json nor config.json"),
        (["{tiny}", "--model", "x", "--prompt", "x"], 2, "--model: {tiny} holds a whole model"),
        (["{adapter}", "--prompt", "x", "--n", "2"], 2, "--n: at --temperature 0 all samples"),
        (["{adapter}", "--prompt", "x", "--system", "y"], 2, "rows, on which the model was tuned"),
        (["{adapter}", "--prompt", "What " * 300], 2, "tokens fills the model's window of 256"),
        (["{adapter}", "--prompts-file", "none.txt"], 1, "none.txt: No such file"),
        (["{adapter}", "--prompt", " "], 2, "there is no prompt"),
        (["{adapter}", "--prompt", "x", "--model", "./none"], 1, "./none: there is no such folder"),
    ],
)
def test_what_goes_wrong_is_one_line(tiny, adapter, tmp_path, capsys, flags, status, complaint):
    argv = [flag.format(tmp=tmp_path, adapter=adapter, tiny=tiny) for flag in flags]
    assert main(["generate", *argv]) == status
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("depthmix: error: ")
    assert complaint.format(tiny=tiny) in line


def generated(capsys, *argv):
    assert main(["generate", *argv, "--json", "--max-new-tokens", "6"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.split("\n") if line]


def test_equal_prompts_are_different_samples(adapter, tmp_path, capsys):
    """The seed is one of the run: neither of a batch nor of a prompt."""
    path = tmp_path / "prompts.txt"
    path.write_text("What\n" * 3)
    drawn = ["--temperature", "5", "--batch-size", "1"]
    rows = generated(capsys, adapter, "--prompts-file", str(path), *drawn)
    assert len({row["completion"] for row in rows}) == 3
    several = generated(capsys, adapter, "--prompt", "What", "--n", "3", *drawn)
    assert [row["completion"] for row in several] == [row["completion"] for row in rows]
    assert [(row["index"], row["sample"]) for row in several] == [(1, 1), (1, 2), (1, 3)]


def test_a_mark_and_separators_are_part_of_no_line_break(adapter, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa\u2028b\x85c\r\n\nd".encode())
    rows = generated(capsys, adapter, "--prompts-file", str(path))
    assert [row["prompt"] for row in rows] == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize(
    ("flag", "prompts"), [("--prompt", ["What\nis"]), ("--prompts-file", ["What", "is"])]
)
def test_prompts_from_standard_input(adapter, monkeypatch, capsys, flag, prompts):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"What\nis")))
    assert [row["prompt"] for row in generated(capsys, adapter, flag, "-")] == prompts


def test_bytes_that_are_no_text_are_named_by_line(adapter, tmp_path, capsys):
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"good\nb\xffd\n")
    assert main(["generate", adapter, "--prompts-file", str(path)]) == 1
    assert f"{path}: line 2: not UTF-8 text" in capsys.readouterr().err


def test_a_blank_at_the_end_is_told(adapter, capsys):
    assert main(["generate", adapter, "--prompt", "What ", "--max-new-tokens", "1"]) == 0
    assert "the prompt ends with a blank" in capsys.readouterr().err
    assert main(["generate", adapter, "--prompt", "What", "--max-new-tokens", "1"]) == 0
    assert "blank" not in capsys.readouterr().err


def test_a_system_message_goes_into_the_template(adapter, prompt_seen):
    flags = ["--format", "messages", "--system", "Be brief."]
    assert main(["generate", adapter, "--prompt", "Add.", *flags]) == 0
    expected = "<|system|>Be brief.<|end|><|user|>Add.<|end|><|assistant|>"
    assert prompt_seen == [expected]
