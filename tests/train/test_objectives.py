"""`--objective dpo | grpo`: from rows to a saved adapter, by TRL's own trainers."""

import json
import signal
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, GRPOTrainer

import depthmix
from depthmix.cli import main
from depthmix.train.interrupt import StopOnRequest

PAIRS = [
    {"prompt": f"What is {n} + 4?", "chosen": f" {n + 4}.", "rejected": f" {n + 5}, is it?"}
    for n in range(8)
]
ASKED = [{"prompt": f"What is {n} + 4?", "answer": n + 4} for n in range(8)]
GRPO = ["--num_generations", "2", "--max_completion_length", "4", "--max_steps", "2"]
GRPO += ["--gradient_accumulation_steps", "2", "--reward", "number:answer"]


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def weights(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def logged(folder):
    return json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]


def error(capsys):
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "depthmix: error:" in x]
    return line


@pytest.fixture
def run(tiny, tmp_path):
    """Run `depthmix train` on rows; returns the status."""

    def run(objective, rows, *flags, output="out", model=tiny):
        data = write(tmp_path / f"{objective}.jsonl", rows) if isinstance(rows, list) else rows
        own = [] if "--k" in flags or "--no_mode" in flags or model != tiny else ["--k", "2"]
        return main(
            [
                *("train", "--objective", objective, "--model_name_or_path", model),
                *("--dataset", data, "--output_dir", str(tmp_path / output), *own),
                *("--logging_steps", "1", "--disable_tqdm", *flags),
            ]
        )

    return run


def test_preferences_are_learned_and_told(run, tiny, tmp_path, capsys):
    assert run("dpo", PAIRS, "--num_train_epochs", "8", "--learning_rate", "1e-2") == 0
    said = capsys.readouterr().out
    assert "pairs right 1" in said
    assert "margin" in said
    assert "router 0." in said
    out = tmp_path / "out"
    history = [entry for entry in logged(out) if "rewards/margins" in entry]
    assert history[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)  # itself is the reference
    assert history[-1]["rewards/margins"] > 0.1
    assert not (out / "ref").exists()
    stored = yaml.safe_load((out / "depthmix.yaml").read_text())
    assert (stored["objective"], stored["dataset_format"]) == ("dpo", "preference")
    model = depthmix.load(AutoModelForCausalLM.from_pretrained(tiny), out)
    assert list(model.peft_config) == ["default"]
    assert main(["generate", str(out), "--prompt", "What is 3 + 4?", "--max-new-tokens", "3"]) == 0


def test_rewards_are_learned_and_told(run, tmp_path, capsys):
    assert run("grpo", ASKED, *GRPO, "--beta", "0.1", "--distill_signed") == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("step ")]
    assert len(lines) == 2
    for figure in ("reward ", " ± ", "answer length ", "KL ", "router 0."):
        assert all(figure in line for line in lines), figure
    out = tmp_path / "out"
    facts = json.loads((out / "depthmix_run.json").read_text())["options"]
    assert (facts["objective"], facts["reward"]) == ("grpo", ["number:answer"])
    assert (facts["per_device_train_batch_size"], facts["num_generations"]) == (2, 2)
    assert not (out / "ref").exists()
    assert main(["generate", str(out), "--prompt", "What is 3 + 4?", "--max-new-tokens", "3"]) == 0
