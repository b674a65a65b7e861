"""A tuned model for the commands that use one, and the prompts that it gets."""

import pytest
from transformers import AutoTokenizer

from depthmix.cli import main
from depthmix.commands import chat as chat_command
from depthmix.commands import generate as generate_command


@pytest.fixture(scope="session")
def adapter(tiny, rows, tmp_path_factory):
    """Folder of a LoRA with MoDE, tuned for a few steps, with two checkpoints."""
    folder = str(tmp_path_factory.mktemp("adapters") / "out")
    flags = ["--max_steps", "8", "--learning_rate", "1e-2", "--disable_tqdm", "--k", "2"]
    command = ["train", "--model_name_or_path", tiny, "--dataset", rows, "--output_dir", folder]
    assert main([*command, *flags]) == 0
    return folder


@pytest.fixture
def prompt_seen(monkeypatch, tiny):
    """The text of the prompt that the model gets."""
    seen = []
    tokenizer = AutoTokenizer.from_pretrained(tiny)

    def record(model, tokenizer_, prompts, sampling, said=None):
        seen.append(tokenizer.decode(prompts[0]))
        if said:
            said("four")
        return ["four"] * len(prompts)

    monkeypatch.setattr(generate_command, "complete", record)
    monkeypatch.setattr(chat_command, "complete", record)
    return seen
