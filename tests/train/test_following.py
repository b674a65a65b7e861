"""What follows a run: accuracy by generation, early stopping, lines in a log, pushes to the hub."""

import json
import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import filter_repo_objects
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from depthmix.cli import main
from depthmix.train.accuracy import Asked, EvalAccuracy, asked, is_right
from depthmix.train.progress import Lines

ONE = ["--max_steps", "1"]


def state(folder):
    """The Trainer's record of the last checkpoint."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    return json.loads((last / "trainer_state.json").read_text())


def error(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if "depthmix: error:" in line]
    assert len(lines) == 1
    return lines[0]


# --- accuracy


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        (" 7.", " 7.", True),
        (" 3 + 4 = 7", "\n#### 7", True),
        (" 8.", " 7.", False),
        ("", " 7.", False),
        (" Paris\n", " Paris", True),
        (" Paris, 7", " Paris", False),
        (" in 1990 he was in Rome", "in 1990 he was in Paris", False),
    ],
)
def test_a_reply_is_the_answer_or_ends_with_its_number(reply, answer, right):
    assert is_right(reply, answer) is right


def test_the_last_answer_is_asked_for():
    row = {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, 2, -100, -100, 5, 6]}
    assert asked(row) == Asked([1, 2, 3, 4], [5, 6])
    assert asked({"input_ids": [1, 2], "labels": [1, 2]}) == Asked([], [1, 2])
    assert asked({"input_ids": [1, 2], "labels": [-100, -100]}) == Asked([], [])


def test_accuracy_is_in_the_figures_of_every_evaluation(train, rows, tmp_path, monkeypatch, capsys):
    """The first rows' replies are made right, so that the share is known."""
    answers = iter([[" 4.", " 5."], [" 99."], [" 4.", " 0."], [" 0."]])
    prompts = []

    def replies(self, asked_rows, tokenizer):
        prompts.extend(tokenizer.decode(row.prompt) for row in asked_rows)
        return next(answers)

    monkeypatch.setattr(EvalAccuracy, "_replies", replies)
    flags = ["--eval_dataset", rows, "--eval_accuracy", "3", "--per_device_eval_batch_size", "2"]
    assert train(*flags, "--num_train_epochs", "2") == 0
    history = state(tmp_path / "out")["log_history"]
    evaluated = [entry for entry in history if "eval_loss" in entry]
    assert [entry["eval_accuracy"] for entry in evaluated] == [2 / 3, 1 / 3]
    assert prompts == [f"What is {n} + 4?" for n in (0, 1, 2)] * 2
    assert "eval accuracy 0.6667" in capsys.readouterr().out


def on(path, row):
    """Write one row and return the options that train on it alone."""
    path.write_text(json.dumps(row))
    return [f"--dataset={path}", f"--eval_dataset={path}", "--eval_accuracy", "1"]


@pytest.fixture
def train_on(tiny, tmp_path):
    """Run `depthmix train` on one row; returns the status."""

    def run(row, *flags):
        argv = ["train", "--model_name_or_path", tiny, "--output_dir", str(tmp_path / "out")]
        return main([*argv, *on(tmp_path / "one.jsonl", row), "--k", "2", *flags])

    return run


def test_rows_that_are_learned_are_answered(train_on, tmp_path):
    """One row, learned by heart: the accuracy goes from 0 to 1."""
    row = {"prompt": "What is 3 + 4?", "completion": " 7."}
    flags = ["--max_steps", "60", "--eval_steps", "30", "--save_steps", "30", "--eval_on_start"]
    assert train_on(row, *flags, "--learning_rate", "2e-2", "--method", "full") == 0
    history = state(tmp_path / "out")["log_history"]
    found = [entry["eval_accuracy"] for entry in history if "eval_accuracy" in entry]
    assert (found[0], found[-1]) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--eval_accuracy", "3"], "eval_accuracy needs evaluations: give eval_dataset"),
        (["--early_stopping_patience", "3"], "early_stopping_patience needs evaluations"),
        (["--eval_accuracy", "3", "--packing", "--eval_dataset"], "set eval_packing to false"),
        (["--eval_accuracy", "3", "--max_length", "5", "--eval_dataset"], "no row is left"),
    ],
)
def test_what_accuracy_needs(train, rows, tmp_path, capsys, flags, complaint):
    data = [rows] if flags[-1] == "--eval_dataset" else []
    assert train(*ONE, *flags, *data) in (1, 2)
    assert complaint in error(capsys)
    assert not (tmp_path / "out").exists()


def test_texts_have_no_prompt_to_answer(train_on, capsys):
    assert train_on({"text": "The answer is 7."}, *ONE) == 2
    assert "eval_accuracy needs evaluation rows with prompt and answer" in error(capsys)


# --- early stopping


def test_early_stopping_keeps_the_best(train, tmp_path, capsys):
    """Rows of other tokens get worse: stopped early, a finished run, its best checkpoint."""
    others = tmp_path / "others.jsonl"
    others.write_text(json.dumps({"prompt": "What is", "completion": " the the the the the the"}))
    flags = ["--eval_dataset", str(others), "--early_stopping_patience", "2", "--eval_steps", "1"]
    flags += ["--learning_rate", "2e-2", "--max_steps", "30", "--lr_scheduler_type", "constant"]
    assert train(*flags) == 0
    found = state(tmp_path / "out")
    assert found["global_step"] < 30
    assert found["best_global_step"] == found["global_step"] - 2
    best = (tmp_path / "out" / f"checkpoint-{found['best_global_step']}").glob("*.safetensors")
    assert next(best).read_bytes() == next((tmp_path / "out").glob("*.safetensors")).read_bytes()
    assert "saved in" in capsys.readouterr().out


# --- what cannot be trained on


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_rows_beyond_learned_positions_are_refused(train, tiny, rows, tmp_path, capsys):
    folder = tmp_path / "gpt2"
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.save_pretrained(folder)
    config = GPT2Config(
        **{"vocab_size": len(tokenizer), "n_positions": 8, "n_embd": 32, "n_layer": 4},
        **{"n_head": 2, "bos_token_id": 0, "eos_token_id": 0},
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    flags = ["--model_name_or_path", str(folder), *ONE]
    assert train(*flags) == 1
    assert "the model has learned 8 positions: set max_length to 8" in error(capsys)
    assert train(*flags, "--max_length", "7") in (0, 1)


def test_a_run_is_replaced_only_once_the_new_one_can_be_trained(train, tmp_path, capsys):
    assert train(*ONE) == 0
    assert train(*ONE, "--overwrite", "--dataset", "none.jsonl") == 1
    assert train(*ONE, "--overwrite", "--k", "9") == 1
    assert (tmp_path / "out" / "adapter_config.json").exists()
    assert train(*ONE, "--overwrite", "--method", "none") == 0
    assert "lora" not in (tmp_path / "out" / "depthmix.yaml").read_text().split("method: ")[1][:5]


# --- lines in a log


def test_a_log_has_one_readable_line_a_step(train, capsys):
    assert train("--max_steps", "3") == 0
    shown = capsys.readouterr()
    lines = [line for line in shown.out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == ["1/3", "2/3", "3/3"]
    for line in lines:
        for part in ("loss ", "lr ", "router entropy ", "ETA 0:00:0"):
            assert part in line
        assert "{" not in line
        assert len(line) < 140
    assert "\r" not in shown.out


def test_the_time_left_is_told_by_the_steps_since_a_resume(capsys, monkeypatch):
    """Two steps of 10 s since the checkpoint of step 90, and eight to go."""
    clock = iter([100.0, 120.0])
    monkeypatch.setattr("depthmix.train.progress.time.monotonic", lambda: next(clock))
    lines, args, control = Lines(), TrainingArguments("out", report_to=[]), TrainerControl()
    state = TrainerState(global_step=90, max_steps=100, is_world_process_zero=True)
    lines.on_train_begin(args, state, control)
    state.global_step = 92
    lines.on_log(args, state, control, {"loss": 1.0})
    assert capsys.readouterr().out.split("ETA ")[1] == "0:01:20\n"
    lines.on_log(args, state, control, {"train_runtime": 20.0})
    assert capsys.readouterr().out == "trained 2 steps in 0:00:20, from step 90 on\n"


def test_a_resumed_run_begins_to_count_at_its_checkpoint(train, tmp_path, capsys):
    steps = ["--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2"]
    assert train(*steps) == 0
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    capsys.readouterr()
    assert train(*steps, "--resume") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["3/4", "4/4"]
    assert any(line.startswith("trained 2 steps in ") for line in lines)
    assert any(line.endswith(", from step 2 on") for line in lines)


def test_a_single_entry_is_no_course_of_the_loss(train, capsys):
    assert train(*ONE) == 0
    lines = capsys.readouterr().out.splitlines()
    said = next(line for line in lines if line.startswith("saved in"))
    assert "; loss " in said
    assert "->" not in said


# --- the hub


class Sent:
    """A hub that keeps what is sent in folders."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        monkeypatch.setattr(HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", self.upload_folder)

    def create_repo(self, name, **_options):
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(
        self, *, repo_id, folder_path, ignore_patterns, path_in_repo="", run_as_future=False, **_
    ):
        files = [str(p.relative_to(folder_path)) for p in folder_path.rglob("*") if p.is_file()]
        for name in filter_repo_objects(files, ignore_patterns=ignore_patterns):
            target = self.folder / repo_id / path_in_repo / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / name, target)
        done = Future()
        done.set_result("https://hub/me/out")
        return done if run_as_future else "https://hub/me/out"

    def names(self):
        root = self.folder / "me" / "out"
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


RESULT = {
    *("adapter_config.json", "adapter_model.safetensors", "depthmix.yaml", "README.md"),
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "depthmix_run.json"),
    "trainer_state.json",  # the logs, which a report reads
}


@pytest.mark.parametrize("strategy", ["end", "every_save", "checkpoint"])
def test_what_is_sent_is_the_result(train, tmp_path, monkeypatch, capsys, strategy):
    hub = Sent(tmp_path / "hub", monkeypatch)
    flags = ["--push_to_hub", "--hub_strategy", strategy, "--save_steps", "1", "--max_steps", "2"]
    assert train(*flags) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "sent to https://hub/me/out"
    checkpoint = {name for name in hub.names() if name.startswith("last-checkpoint/")}
    assert hub.names() - checkpoint == RESULT
    assert ("last-checkpoint/optimizer.pt" in checkpoint) == (strategy == "checkpoint")
    card = (tmp_path / "hub" / "me" / "out" / "README.md").read_text()
    assert "Mixture-of-Depths Ensemble" in card
    assert "TRL" in card
    for name in RESULT:
        sent = (tmp_path / "hub" / "me" / "out" / name).read_bytes()
        assert sent == (tmp_path / "out" / name).read_bytes()


def test_no_right_to_send_is_found_before_training(train, tmp_path, monkeypatch, capsys):
    def refuse(self, name, **_options):
        raise OSError("401 Client Error")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    assert train(*ONE, "--push_to_hub", "--model_name_or_path", "./none") == 2
    assert "push_to_hub: the repository out cannot be written to (hf auth login" in error(capsys)
    assert not (tmp_path / "out").exists()


def test_a_run_that_cannot_be_sent_is_saved(train, tmp_path, monkeypatch, capsys):
    Sent(tmp_path / "hub", monkeypatch)

    def fail(self, **_options):
        raise OSError("connection lost")

    monkeypatch.setattr(HfApi, "upload_folder", fail)
    assert train(*ONE, "--push_to_hub", "--hub_strategy", "end") == 1
    assert "send it with: hf upload me/out" in error(capsys)
    assert (tmp_path / "out" / "adapter_config.json").exists()
