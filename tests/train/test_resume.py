"""Going on with a run: what may change and what may not, and checkpoints that do not fit."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from depthmix.train.interrupt import StopOnRequest

# Without what draws at random in every forward, so that a batch may be split otherwise.
SURE = [
    "--distill_fraction",
    "1",
    "--lora_dropout",
    "0",
    "--num_train_epochs",
    "2",
    "--save_strategy",
    "no",
]


@pytest.fixture
def stopped(train, monkeypatch):
    """Train to step 2 of 6 and be stopped by a signal; returns the folder's name."""

    def run(*flags, output="out", number=signal.SIGTERM):
        original = StopOnRequest.on_step_end

        def interrupt_at_2(self, args, state, control, **kwargs):
            if state.global_step == 2:
                signal.raise_signal(number)
            original(self, args, state, control, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(StopOnRequest, "on_step_end", interrupt_at_2)
            assert train(*SURE, *flags, output=output) == 128 + number
        return output

    return run


def error(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if "depthmix: error:" in line]
    assert len(lines) == 1
    return lines[0]


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_sigterm_saves_and_resumes_bit_for_bit(train, stopped, tmp_path, capsys):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stopped()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    said = capsys.readouterr().err
    assert "depthmix: stopped after step 2 of 6; go on with: depthmix train" in said
    assert train(*SURE, output="whole") == 0
    assert train(*SURE, "--resume") == 0
    whole, continued = weights(tmp_path / "whole"), weights(tmp_path / "out")
    for name, tensor in whole.items():
        torch.testing.assert_close(continued[name], tensor, rtol=0, atol=0, msg=name)


def test_a_stop_saves_the_optimiser_even_where_checkpoints_are_weights_alone(stopped, tmp_path):
    stopped("--save_only_model")
    assert (tmp_path / "out" / "checkpoint-2" / "optimizer.pt").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--lora_alpha", "64"], "lora_alpha was 32 and is 64 now"),
        (["--seed", "7"], "seed was 42 and is 7 now"),
        (["--data_seed", "7"], "data_seed was None and is 7 now"),
        (["--learning_rate", "1e-3"], "learning_rate was 0.0002 and is 0.001 now"),
        (["--norm_learning_rate", "1e-3"], "norm_learning_rate was None and is 0.001 now"),
        (["--per_device_train_batch_size", "2"], "per_device_train_batch_size was 4 and is 2 now"),
        (["--gradient_accumulation_steps", "2"], "gradient_accumulation_steps was 1 and is 2 now"),
        (["--optim", "adafactor"], "optim was"),
        (["--weight_decay", "0.1"], "weight_decay was 0.0 and is 0.1 now"),
        (["--lora_modules_to_save", "lm_head"], "lora_modules_to_save was None and is ['lm_head']"),
        (["--max_length", "64"], "max_length was 1024 and is 64 now"),
        (["--num_train_epochs", "3"], "num_train_epochs was 2.0 and is 3.0 now"),
        (["--k", "3"], "k was 2 and is 3 now"),
        (["--lr_scheduler_type", "constant", "--seed", "7"], "seed was 42 and is 7 now"),
    ],
)
def test_what_would_change_what_is_learned_is_refused_by_name(
    train, tmp_path, capsys, flags, named
):
    checkpoint = tmp_path / "out" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    for name in ("trainer_state.json", "optimizer.pt"):
        (checkpoint / name).write_text("{}")
    write_record(train, tmp_path)
    assert train(*SURE, "--resume", *flags) == 2
    assert named in error(capsys)
    named_checkpoint = ["--resume_from_checkpoint", str(checkpoint)]
    assert train(*SURE, *named_checkpoint, *flags) == 2
    assert named in error(capsys)


def write_record(train, tmp_path):
    """Let a run write its configuration, but for the folder."""
    record = tmp_path / "out" / "depthmix.yaml"
    if not record.exists():
        assert train(*SURE, output="other") == 0
        shutil.copy(tmp_path / "other" / "depthmix.yaml", record)


def test_what_does_not_change_what_is_learned_is_accepted(train, stopped, tmp_path):
    """Logging, saving and messages follow the options of now; the batch is split otherwise."""
    stopped()
    assert train(*SURE, output="whole") == 0
    assert (
        train(
            *(*SURE, "--resume", "--save_strategy", "steps", "--save_steps", "4"),
            *("--logging_steps", "3", "--per_device_train_batch_size", "2"),
            *("--gradient_accumulation_steps", "2", "--report_to", "none", "--run_name", "new"),
        )
        == 0
    )
    whole, continued = weights(tmp_path / "whole"), weights(tmp_path / "out")
    for name, tensor in whole.items():
        torch.testing.assert_close(continued[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    assert (tmp_path / "out" / "checkpoint-4").exists()
    state = json.loads((tmp_path / "out" / "checkpoint-4" / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"]] == [1, 2, 3]


def test_rows_that_have_changed_are_refused(train, stopped, rows, tmp_path, capsys):
    """The file has the same name and other rows."""
    path = tmp_path / "mine.jsonl"
    shutil.copy(rows, path)
    stopped(f"--dataset={path}")
    path.write_text(path.read_text().replace("What is 3", "What is 30"))
    capsys.readouterr()
    assert train(*SURE, f"--dataset={path}", "--resume") == 2
    assert "--resume: dataset: its rows are others than those of the run in" in error(capsys)


def test_more_steps_are_accepted_where_the_learning_rate_is_constant(train, stopped, tmp_path):
    constant = ["--lr_scheduler_type", "constant"]
    stopped(*constant)
    assert train(*SURE, *constant, "--num_train_epochs", "3", "--resume") == 0
    assert train(*SURE, *constant, "--num_train_epochs", "3", output="whole") == 0
    whole, continued = weights(tmp_path / "whole"), weights(tmp_path / "out")
    for name, tensor in whole.items():
        torch.testing.assert_close(continued[name], tensor, rtol=0, atol=0, msg=name)


def test_weights_without_the_optimiser_are_refused(train, tmp_path, capsys):
    saved = ["--save_strategy", "steps", "--save_steps", "2", "--save_only_model"]
    assert train(*SURE, *saved) == 0
    assert train(*SURE, *saved, "--resume") == 2
    assert "holds weights without the optimiser's state (save_only_model)" in error(capsys)


@pytest.mark.parametrize(
    "flags",
    [
        ["--optim", "adafactor"],
        ["--lora_modules_to_save", "lm_head"],
        ["--weight_decay", "0.1", "--method", "full"],
    ],
)
def test_a_checkpoint_that_does_not_fit_is_one_line(train, stopped, tmp_path, capsys, flags):
    """Where no record tells what has changed."""
    stopped(*flags[2:])
    (tmp_path / "out" / "depthmix.yaml").unlink()
    named = ["--resume_from_checkpoint", str(Path(tmp_path / "out" / "checkpoint-2"))]
    capsys.readouterr()
    assert train(*SURE, *flags, *named, output="new") == 2
    assert "checkpoint-2 does not fit this run" in error(capsys)
