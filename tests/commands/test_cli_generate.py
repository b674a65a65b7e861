"""`depthmix generate` and `depthmix chat`: what a tuned model says."""

import io
import json

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import depthmix
from depthmix.cli import main
from depthmix.commands import chat as chat_command
from depthmix.commands import generate as generate_command
from depthmix.data.template import TEMPLATES

alpaca_prompt = TEMPLATES["alpaca"].prompt


@pytest.fixture(scope="module")
def adapter(tiny, rows, tmp_path_factory):
    """Folder of a LoRA with MoDE, tuned for a few steps."""
    folder = str(tmp_path_factory.mktemp("adapters") / "out")
    flags = ["--max_steps", "8", "--learning_rate", "1e-2", "--disable_tqdm", "--k", "2"]
    command = ["train", "--model_name_or_path", tiny, "--dataset", rows, "--output_dir", folder]
    assert main([*command, *flags]) == 0
    return folder


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


@pytest.fixture
def prompt_seen(monkeypatch, tiny):
    """The text of the prompt that the model gets."""
    seen = []
    tokenizer = AutoTokenizer.from_pretrained(tiny)

    def record(model, tokenizer_, prompts, arguments, stream=False):
        seen.append(tokenizer.decode(prompts[0]))
        return ["four<|end|>"] * len(prompts)

    monkeypatch.setattr(generate_command, "complete", record)
    monkeypatch.setattr(chat_command, "complete", record)
    return seen


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
        (["none", "--prompt", "x"], 1, "none: there is no such folder"),
        (["{tmp}", "--prompt", "x"], 1, "neither adapter_config.json nor config.json"),
        (["{adapter}", "--prompts-file", "none.txt"], 1, "none.txt: No such file"),
        (["{adapter}", "--prompt", " "], 2, "there is no prompt"),
        (["{adapter}", "--prompt", "x", "--model", "./none"], 1, "model ./none: there is no such"),
    ],
)
def test_what_goes_wrong_is_one_line(adapter, tmp_path, capsys, flags, status, complaint):
    argv = [flag.format(tmp=tmp_path, adapter=adapter) for flag in flags]
    assert main(["generate", *argv]) == status
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("depthmix: error: ")
    assert complaint in line


def chat(monkeypatch, adapter, said, *flags):
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    return main(["chat", adapter, *flags])


def test_chat_keeps_and_forgets_the_conversation(adapter, prompt_seen, monkeypatch, capsys):
    said = "Hi\n\nMore\n/reset\nNew\n/exit\nnever read\n"
    assert chat(monkeypatch, adapter, said, "--system", "Be brief.") == 0
    opening = "<|system|>Be brief.<|end|><|user|>"
    assert prompt_seen == [
        f"{opening}Hi<|end|><|assistant|>",
        f"{opening}Hi<|end|><|assistant|>four<|end|><|end|><|user|>More<|end|><|assistant|>",
        f"{opening}New<|end|><|assistant|>",
    ]


def test_chat_answers_and_ends_at_end_of_file(adapter, monkeypatch, capsys):
    assert chat(monkeypatch, adapter, "Hi\n", "--max-new-tokens", "4", "--show-routing") == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("/reset forgets")
    assert shown.err.count("routing: ") == 1


def test_chat_needs_a_template(tiny, tmp_path, rows, capsys):
    bare = tmp_path / "bare"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(bare)
    AutoModelForCausalLM.from_pretrained(tiny).save_pretrained(bare)
    assert main(["chat", str(bare)]) == 2
    assert "no chat template" in capsys.readouterr().err
