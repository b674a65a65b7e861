"""What breaks in the middle: a killed process, a full disk, a loss that is no number, Ctrl-C."""

import gc
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import depthmix
from depthmix.cli import main
from depthmix.data.load import load_data
from depthmix.errors import CheckpointError, DataError
from depthmix.train import output

# Runs `depthmix train` with a fault in the n-th adapter that is written: {fault} gets its path.
FAULTY = """
import os, resource, signal, sys
import peft.peft_model
import depthmix.cli

written, whole = [], peft.peft_model.safe_save_file

def save(tensors, path, **options):
    written.append(path)
    if len(written) == {number}:
        {fault}
    return whole(tensors, path, **options)

peft.peft_model.safe_save_file = save
sys.exit(depthmix.cli.main(sys.argv[1:]))
"""
KILLED = "open(path, 'wb').write(b'half a file'); os.kill(os.getpid(), signal.SIGKILL)"
FULL = "resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"


def command(tiny, rows, folder, *flags):
    return [
        *("train", "--model_name_or_path", tiny, "--dataset", str(rows), "--k", "2"),
        *("--output_dir", str(folder), "--per_device_train_batch_size", "4", "--disable_tqdm"),
        *("--logging_steps", "1", "--save_steps", "1", "--max_steps", "4", *flags),
    ]


def faulty(arguments, fault, number):
    program = FAULTY.format(fault=fault, number=number)
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=120,
    )


def adapter(folder):
    return load_file(Path(folder) / "adapter_model.safetensors")


def assert_same(folder, other):
    ours, theirs = adapter(folder), adapter(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=0, msg=name)


@pytest.fixture(scope="module")
def whole(tiny, rows, tmp_path_factory):
    """What four steps without a fault give."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert main(command(tiny, rows, folder)) == 0
    return folder


@pytest.mark.parametrize("number", [1, 3], ids=["first save", "third save"])
def test_killed_while_saving(tiny, rows, whole, tmp_path, number):
    """kill -9 with half a file written: nothing else is lost, and resuming is bit for bit."""
    out = tmp_path / "out"
    run = faulty(command(tiny, rows, out), KILLED, number)
    assert run.returncode == -signal.SIGKILL
    assert not (out / "adapter_config.json").exists()
    if number == 1:
        assert main(command(tiny, rows, out, "--overwrite")) == 0
    else:
        assert main(["train", str(out / "depthmix.yaml"), "--resume"]) == 0
    assert_same(out, whole)


def test_killed_while_the_result_is_saved(tiny, rows, whole, tmp_path):
    """After four checkpoints the fifth save is the result's own."""
    out = tmp_path / "out"
    run = faulty(command(tiny, rows, out), KILLED, 5)
    assert run.returncode == -signal.SIGKILL
    assert not (out / "adapter_config.json").exists()
    assert main(["train", str(out / "depthmix.yaml"), "--resume"]) == 0
    assert_same(out, whole)
    assert not (out / ".saving").exists()


@pytest.mark.parametrize("which", ["adapter", "optimizer"])
def test_disk_that_is_full(tiny, rows, whole, tmp_path, which):
    """No file may grow beyond a limit: less than the adapter, or than Adam's states."""
    out = tmp_path / "out"
    size = (whole / "adapter_model.safetensors").stat().st_size
    limit = 4096 if which == "adapter" else size + 4096
    run = faulty(command(tiny, rows, out), FULL.format(limit=limit), 3)
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("depthmix: error: a checkpoint could not be written, is the disk full?")
    assert "Traceback" not in run.stderr
    assert_same(out / "checkpoint-2", whole / "checkpoint-2")
    assert main(["train", str(out / "depthmix.yaml"), "--resume"]) == 0
    assert_same(out, whole)


def test_loss_that_is_no_number(tiny, rows, tmp_path, capsys):
    """The learning rate sends the weights to infinity; no broken checkpoint is left behind."""
    out = tmp_path / "out"
    flags = ["--learning_rate", "1e30", "--lr_scheduler_type", "constant", "--max_grad_norm", "0"]
    assert main(command(tiny, rows, out, "--max_steps", "9", *flags)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the loss is not a finite number at step" in error
    checkpoints = sorted(out.glob("checkpoint-*"))
    step = int(error.partition("at step ")[2].split()[0])
    assert [path.name for path in checkpoints] == [f"checkpoint-{i}" for i in range(1, step)]


@pytest.mark.parametrize("stage", ["loading the model", "reading the data", "saving the result"])
def test_ctrl_c_at_every_stage(tiny, rows, tmp_path, monkeypatch, capsys, stage):
    """One line, status 130, no sign of a finished run; then the run can be made whole."""

    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    owner, name = {
        "loading the model": (LlamaForCausalLM, "__init__"),
        "reading the data": (json, "loads"),
        "saving the result": (output, "save"),
    }[stage]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        assert main(command(tiny, rows, out)) == 130
    errors = capsys.readouterr().err
    assert errors.strip().splitlines()[-1] == "depthmix: stopped"
    assert not (out / "adapter_config.json").exists()
    again = ["--resume"] if stage == "saving the result" else []
    assert main(command(tiny, rows, out, *again)) == 0
    assert (out / "adapter_config.json").exists()


class Malice:
    """Pickled, it makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def test_no_pickle_is_loaded(tiny, whole, tmp_path):
    folder, trap = tmp_path / "adapter", tmp_path / "trapped"
    folder.mkdir()
    for name in ("adapter_config.json", "README.md"):
        (folder / name).write_text((whole / name).read_text())
    with (folder / "adapter_model.bin").open("wb") as file:
        pickle.dump(Malice(trap), file)
    with pytest.raises(CheckpointError, match="no safetensors file"):
        depthmix.load(AutoModelForCausalLM.from_pretrained(tiny), folder)
    assert not trap.exists()


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
fields = st.sampled_from(["prompt", "completion", "text", "messages", "instruction", "output"])


def loads_or_names(path):
    """Tell whether a file is read, or refused with its name; let other errors through."""
    try:
        load_data([str(path)])
    except DataError as error:
        return str(path) in str(error)
    return True


@given(st.lists(st.dictionaries(fields, values, max_size=3) | values, min_size=1, max_size=4))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_rows_of_any_kind_load_or_are_named(tmp_path, rows_of_any_kind):
    """Whatever a file holds, it is read, or the error names the file; nothing else is raised."""
    path = tmp_path / "any.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows_of_any_kind))
    assert loads_or_names(path)


# pandas leaves a table open that it cannot read.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@given(st.binary(max_size=60))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_bytes_of_any_kind_load_or_are_named(tmp_path, content):
    for name in ("any.jsonl", "any.json", "any.csv", "any.tsv.gz", "any.parquet", "any.arrow"):
        path = tmp_path / name
        path.write_bytes(content)
        assert loads_or_names(path)
    gc.collect()
